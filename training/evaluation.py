"""Measure a model on questions: answers in every setting, rankings, costs, judgements; each record once.

Every batch of records is appended to the results file at once, so a run that was killed goes on where it stopped.
Metrics are in `metrics.py`, averages in `summary.py`, the command line in `evaluate.py`.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from core.config import Mode
from core.errors import TooLargeError
from core.model import Model
from core.pipeline import passage_text_ids, prepare, rows_of
from core.planning import plan_request
from core.policy import Policy
from core.sampling import GenerationOptions
from training.answering import Stopwatch, answer_batch, compress_batch, prepare_batch, rank_compressed
from training.chat_endpoint import ChatEndpoint
from training.costs import measure_cost
from training.judge import Case, judge
from training.questions import Question
from training.rankers import EmbeddingRanker, rank_bm25
from training.results import (
    AnswerRecord,
    JudgementRecord,
    RankingRecord,
    Record,
    ResultsFile,
    Setting,
    compressor_name,
)

MODES: tuple[Mode, ...] = ("text", "hybrid", "compressed")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    modes, rates        text mode has no rate; each other mode is run at each rate
    budgets             bounds on the prompt in tokens; `auto` mode is run under each
    passages            numbers of passages; the first is the main one
    ranking_passages    passages that are ranked, where more than are answered from
    batch_size          questions answered side by side
    embedding_model     name of a model to rank with beside BM25; None for none
    cost_questions      how many questions are answered again, one by one, to count their operations and memory
    hops                2: but in text mode, passages are read again for the query and the best of them (`core.hops`)
    """

    modes: tuple[Mode, ...] = MODES
    rates: tuple[int, ...] = (16,)
    budgets: tuple[int, ...] = ()
    passages: tuple[int, ...] = (5,)
    ranking_passages: int = 0
    batch_size: int = 16
    embedding_model: str | None = None
    cost_questions: int = 4
    hops: int = 1
    options: GenerationOptions = field(default_factory=GenerationOptions)

    def groups(self) -> Iterator[list[Setting]]:
        """Settings that share what is compressed: text by itself, the other modes by rate."""
        for passages in self.passages:
            if "text" in self.modes:
                yield [Setting("text", None, passages)]
            for rate in self.rates:
                modes = [mode for mode in self.modes if mode != "text"]
                if compressing := [Setting(mode, rate, passages, hops=self.hops) for mode in modes]:
                    yield compressing
            if self.budgets:
                yield [Setting("auto", None, passages, budget, self.hops) for budget in self.budgets]

    @property
    def ranked_counts(self) -> list[int]:
        """Numbers of passages that rankings are reported for."""
        return sorted({*self.passages, max(self.ranking_passages, *self.passages)})


def evaluate(model: Model, questions: Sequence[Question], results: ResultsFile, plan: Plan) -> None:
    """Add to `results` every record of `plan` that it lacks.

    Raises InputError for a rate that was not trained, and for a budget below a question's prompt without passages.
    """
    for question in questions if plan.budgets else ():
        plan_request(
            model, prepare(model, question.query, question.passages[:1]), Policy("auto", None, min(plan.budgets))
        )
    _rank_baselines(questions, results, plan, str(model.device))
    _answer(model, questions, results, plan)
    _rank(model, questions, results, plan)
    _measure_costs(model, questions, results, plan)


def too_long(model: Model, questions: Sequence[Question], plan: Plan) -> list[str]:
    """Ids of the questions that no fair comparison can hold: over the compressor's budget for a query, or in a mode of
    `plan` prompt and answer may not fit.

    Raises InvalidInputError for a rate that was not trained.
    """
    room = model.generator.max_tokens - plan.options.max_new_tokens

    def fits(question: Question) -> bool:
        try:
            return _longest_prompt(model, question, plan) <= room
        except TooLargeError:  # of the query
            return False

    return [question.id for question in questions if not fits(question)]


def _longest_prompt(model: Model, question: Question, plan: Plan) -> int:
    """Most tokens of a prompt, whichever passages `hybrid` will show as text too; `auto` keeps within its bound."""
    request = prepare(model, question.query, question.with_passages(max(plan.passages)).passages)
    texts = [len(ids) for ids in passage_text_ids(request)]
    memory = sum(row.memory_tokens for row in rows_of(model, request, min(plan.rates)))
    most_relevant = sum(sorted(texts, reverse=True)[: model.config.prompt.hybrid_top])
    shown = {"text": sum(texts), "compressed": memory, "hybrid": memory + most_relevant}
    frame = model.template.frame(request.query, len(texts))[-1]
    return frame + max((shown[mode] for mode in plan.modes), default=0)


def _key(record: Record) -> tuple[object, ...]:
    """What a record is about: none is made twice."""
    if isinstance(record, RankingRecord):
        return record.kind, record.question, record.ranker, record.passages
    if isinstance(record, JudgementRecord):
        return record.kind, record.question, record.setting, record.judge
    return record.kind, record.question, record.setting


def _batches(
    questions: Sequence[Question], size: int, pending: Callable[[Question], bool], title: str
) -> Iterator[list[Question]]:
    """Batches of the pending questions, longest text first so that memory peaks early and a batch is of like length."""
    todo = [question for question in questions if pending(question)]
    todo.sort(key=lambda question: -sum(len(passage.content) for passage in question.passages))
    with tqdm(
        total=len(questions), initial=len(questions) - len(todo), desc=title, unit="question", disable=None
    ) as progress:
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            yield batch
            progress.update(len(batch))


def _answer(model: Model, questions: Sequence[Question], results: ResultsFile, plan: Plan) -> None:
    """Answer every question in every setting."""
    done = {_key(record) for record in results.records}
    for group in plan.groups():

        def pending(question: Question, group: list[Setting] = group) -> bool:
            return any(("answer", question.id, setting) not in done for setting in group)

        title = f"{'/'.join(setting.label for setting in group)}, {group[0].passages} passages"
        for batch in _batches(questions, plan.batch_size, pending, title):
            answers, rankings = answer_batch(model, batch, group, plan.options)
            made: list[Record] = [*answers, *rankings]
            results.append(record for record in made if _key(record) not in done)


def _rank_baselines(questions: Sequence[Question], results: ResultsFile, plan: Plan, device: str) -> None:
    """BM25 and the embedding model on the same passages."""
    counts = plan.ranked_counts
    done = {_key(record) for record in results.records}
    results.append(record for record in rank_bm25(questions, counts) if _key(record) not in done)
    if (name := plan.embedding_model) is None:
        return

    def pending(question: Question) -> bool:
        return any(("ranking", question.id, name, count) not in done for count in counts)

    ranker = EmbeddingRanker(name, device)
    for batch in _batches(questions, plan.batch_size, pending, f"ranking with {name}"):
        records = [record for question in batch for record in ranker.rank(question, counts)]
        results.append(record for record in records if _key(record) not in done)


def _rank(model: Model, questions: Sequence[Question], results: ResultsFile, plan: Plan) -> None:
    """Rank what answering has not ranked, at the plan's first rate; a run of text mode alone ranks only on demand."""
    if set(plan.modes) == {"text"} and not plan.ranking_passages:
        return
    rate = plan.rates[0]
    done = {_key(record) for record in results.records}
    for count in plan.ranked_counts:

        def pending(question: Question, count: int = count) -> bool:
            return ("ranking", question.id, compressor_name(rate, plan.hops), count) not in done

        for batch in _batches(questions, plan.batch_size, pending, f"ranking {count} passages"):
            cut = [question.with_passages(count) for question in batch]
            stage = Stopwatch(model.device).stage
            compressed = compress_batch(model, prepare_batch(model, cut, stage), rate, stage, plan.hops)
            results.append(rank_compressed(cut, compressed, rate, count, plan.hops))


def _measure_costs(model: Model, questions: Sequence[Question], results: ResultsFile, plan: Plan) -> None:
    """Operations and memory of the first questions' answers in every setting."""
    done = {_key(record) for record in results.records}
    sample = questions[: plan.cost_questions]
    todo = [
        (question, setting)
        for group in plan.groups()
        for setting in group
        for question in sample
        if ("cost", question.id, setting) not in done
    ]
    for question, setting in tqdm(todo, desc="counting operations", unit="answer", disable=None):
        results.append([measure_cost(model, question, setting, plan.options)])


def judge_answers(endpoint: ChatEndpoint, questions: Sequence[Question], results: ResultsFile) -> None:
    """Add the endpoint's judgement of every answer to `questions` that it has not judged yet.

    Raises EndpointError; what was judged before it is kept.
    """
    done = {_key(record) for record in results.records}
    by_id = {question.id: question for question in questions}
    todo = [
        record
        for record in results.records
        if isinstance(record, AnswerRecord)
        and record.question in by_id
        and ("judgement", record.question, record.setting, endpoint.model) not in done
    ]
    cases = [Case(by_id[record.question].query, by_id[record.question].references, record.answer) for record in todo]
    position = unreadable = 0
    with tqdm(total=len(todo), desc=f"judging with {endpoint.model}", unit="answer", disable=None) as progress:
        for scores in judge(endpoint, cases):
            block = todo[position : position + len(scores)]
            results.append(
                JudgementRecord(record.question, record.setting, score, endpoint.model)
                for record, score in zip(block, scores, strict=True)
            )
            position += len(scores)
            unreadable += scores.count(None)
            progress.update(len(scores))
    if unreadable:
        log.warning("%s: %d of %d verdicts could not be read", endpoint.model, unreadable, len(todo))
