"""A teacher's answers, logits and relevance scores for rows, block by block; finished blocks are in a journal.

Knows neither how a teacher answers nor what a command line asks for.
"""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from core.config import PromptConfig
from core.errors import ConfigError
from training.answer_match import answer_words, contains, words
from training.chat_endpoint import check_url
from training.data_format import Row, RowPassage
from training.data_quality import DataError
from training.journal import Journal
from training.relevance_teachers import RelevanceTeacher
from training.teacher_logits import shard_path, write_shard
from training.teachers import Teacher, TeacherAnswer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LabelConfig:
    """What is asked of whom.

    teacher          a base model's name, or with `endpoint` the model's name there; empty: gold answers stay
    endpoint         URL of an OpenAI-compatible server, up to and with /v1
    top_k            log-probabilities kept at each answer token; 0: none
    reranker         cross-encoders, `dense:` embedding models, `checkpoint:` folders; none: relevance stays as it is
    score            `logit`: the reranker's raw score (OSCAR sec. 4.4); `probability`: its sigmoid
    gold_bonus       added to the logit of a passage that is known to be gold; the paper adds nothing
    relabel          answer again where the row already has a teacher's answer
    must_contain_gold  an answer of the teacher's without any gold answer in it is not taken; the paper takes it
    """

    teacher: str = ""
    endpoint: str = ""
    max_new_tokens: int = 128
    top_k: int = 0
    system: str = PromptConfig().system
    reranker: Sequence[str] = ()
    score: Literal["logit", "probability"] = "logit"
    gold_bonus: float = 0.0
    relabel: bool = False
    must_contain_gold: bool = False

    def __post_init__(self) -> None:
        if not self.teacher and not self.reranker:
            raise ConfigError("give --teacher, --reranker or both: else there is nothing to label")
        if self.gold_bonus and not self.reranker:
            raise ConfigError("--gold-bonus: is added to a reranker's score; give --reranker")
        if self.endpoint and not self.teacher:
            raise ConfigError("--endpoint: also name the model there with --teacher")
        if self.endpoint and self.top_k:
            raise ConfigError("--logits: an endpoint gives no token ids; use a local teacher")
        if self.endpoint:
            check_url(self.endpoint, "--endpoint")


def label_rows(
    rows: Sequence[Row],
    config: LabelConfig,
    teacher: Teacher | None,
    reranker: RelevanceTeacher | None,
    journal: Journal,
    *,
    block: int = 16,
    logits: Path | None = None,
    tokenizer: str = "",
) -> list[Row]:
    """`rows` with their labels, in order. What the journal has is not asked again.

    logits      folder of the shards; one is written before the journal says that its rows are done, so a kill
                between the two makes the block again, shard and all
    tokenizer   fingerprint of the teacher's tokenizer, written with the logits

    Raises DataError where a reranker's score is no number.
    """
    missing: Counter[str] = Counter()
    waiting = [(number, row) for number, row in enumerate(rows) if row.id not in journal.rows]
    with tqdm(
        total=len(rows), initial=len(rows) - len(waiting), desc="labelling", unit="row", disable=None
    ) as progress:
        for start in range(0, len(waiting), block):
            number = waiting[start][0]
            members = [row for _, row in waiting[start : start + block]]
            answers = _ask(members, teacher, config)
            if logits is not None:
                targets = {i: answer.targets for i, answer in answers.items() if answer.targets is not None}
                write_shard(shard_path(logits, number), list(targets), list(targets.values()), tokenizer)
            missing.update(answer.missing for answer in answers.values() if answer.missing)
            labelled = [_with_answer(row, answers.get(row.id)) for row in members]
            journal.add(_with_scores(labelled, reranker, config) if reranker else labelled)
            progress.update(len(members))
    for reason, count in missing.most_common():
        log.warning("%d rows keep the answers they came with: %s", count, reason)
    return [journal.rows[row.id] for row in rows]


def _ask(rows: Sequence[Row], teacher: Teacher | None, config: LabelConfig) -> dict[str, TeacherAnswer]:
    """The teacher's answers by row id, for the rows that are to be answered."""
    asked = [row for row in rows if config.relabel or row.teacher_answer is None]
    if teacher is None or not asked:
        return {}
    answers = dict(zip([row.id for row in asked], teacher.answer(asked), strict=True))
    if config.must_contain_gold:
        strange = [row.id for row in asked if lacks_gold(row, answers[row.id].text)]
        answers |= dict.fromkeys(strange, TeacherAnswer("", missing="the teacher's answer contains no gold answer"))
    return answers


def lacks_gold(row: Row, text: str) -> bool:
    """Whether `text` is an answer in which none of the row's gold answers stands, word for word."""
    gold = answer_words(row.answers)
    return bool(text and gold) and not contains(words(text), gold)


def _with_answer(row: Row, answer: TeacherAnswer | None) -> Row:
    return replace(row, teacher_answer=answer.text) if answer is not None and answer.text else row


def _with_scores(rows: Sequence[Row], reranker: RelevanceTeacher, config: LabelConfig) -> list[Row]:
    """`rows` with the reranker's scores as relevance, all their passages scored together; what was gold stays so.

    Of a row whose query the reranker cannot read, no relevance is known.
    """
    read = {row.id for row in rows if reranker.reads(row.query)}
    pairs = [(row.query, passage.content) for row in rows if row.id in read for passage in row.passages]
    scores = iter(reranker.scores(pairs))
    scale = _sigmoid if config.score == "probability" else float

    def scored(row: Row, index: int, passage: RowPassage) -> RowPassage:
        gold = passage.relevant if passage.judged else None
        if row.id not in read:
            return replace(passage, relevance=None, gold=gold)
        logit = next(scores) + (config.gold_bonus if passage.relevant else 0.0)
        if not math.isfinite(logit):
            raise DataError(f"row {row.id!r}, passages[{index}]: the reranker's score is {logit}, which is no number")
        return replace(passage, relevance=scale(logit), gold=gold)

    for row in rows:
        if row.id not in read:
            log.warning("row %r: its query is too long for the reranker, so its passages have no relevance", row.id)
    return [
        replace(row, passages=tuple(scored(row, index, passage) for index, passage in enumerate(row.passages)))
        for row in rows
    ]


def _sigmoid(logit: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * logit))  # does not overflow
