"""What a run trains on, as the loop sees it: examples by index, and a way to tell how good the model is at them.

Here is question answering; `training/pretrain.py` has the other one. Knows no optimiser and no steps.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from core.errors import ConfigError, InputError
from core.model import Model
from training.arguments import check_file
from training.batches import TrainExample, background_tokens, find_siblings, make_example, question_tokens, row_length
from training.config import LABEL_KINDS, TrainConfig
from training.data_format import Row, read_rows
from training.data_quality import ReadPolicy
from training.dev import can_be_read, evaluate_dev
from training.objective import Objective
from training.teacher_logits import TeacherLogits, tokenizer_fingerprint

SAMPLE = 200  # examples that are made before the first step, to see whether they can be
NOTABLE = 0.05  # share of them that cannot


@dataclass(frozen=True)
class Task:
    """A task of the loop.

    lengths   for each example, a cheap stand-in for its cost; batches hold examples of like length
    example   the example of an index, sampled with randomness that the key determines; None where it is over a limit.
              Raises InputError for one that cannot be used
    evaluate  scores on dev examples, the same ones every time; `training.dev.dev_score` makes one number of them. The
              second argument says whether to show how far it is
    check     raises ConfigError where the data does not fit the model; called once, before the first step
    """

    lengths: Sequence[int]
    example: Callable[[Model, int, str], TrainExample | None]
    evaluate: Callable[[Objective, bool], dict[str, float]]
    check: Callable[[Model], None] = lambda model: None


def question_task(config: TrainConfig) -> Task:
    """Answering questions from their passages. Raises DataError and ConfigError where the data cannot be used."""
    rows = load_rows(config, "data.train", config.data.train)
    dev_rows = load_rows(config, "data.dev", config.data.dev)[: config.data.dev_questions or None]
    logits = TeacherLogits(Path(config.data.logits)) if config.loss.kl > 0 else None

    siblings = find_siblings(rows) if config.data.text_questions > 1 else [[]] * len(rows)

    def example(model: Model, index: int, key: str) -> TrainExample | None:
        row, sharing = rows[index], [rows[other] for other in siblings[index]]
        made = make_example(model, row, config.data, config.loss, f"{key}/{row.id}", logits, sharing)
        too_long = config.loss.needs_generator and over_prompt_limit(model, made, config.data.prompt_tokens)
        return None if too_long else made

    def check(model: Model) -> None:
        check_dev(model, dev_rows, config)
        if logits is not None:
            check_logits(model, rows, logits)

    lengths = [row_length(row, config.data.passages) for row in rows]
    return Task(lengths, example, lambda objective, show: evaluate_dev(objective, dev_rows, config, show), check)


def load_rows(config: TrainConfig, key: str, name: str) -> list[Row]:
    """Rows of the data file that `key` names; what was wrong with the others is printed with line numbers.

    Raises ConfigError and DataError.
    """
    check_file(Path(name), key)
    rows, report = read_rows(Path(name), ReadPolicy(on_problem=config.data.on_bad_row))
    tqdm.write(str(report))
    if not rows:
        raise ConfigError(f"{key} {name}: has no usable row; `prepare` writes such files")
    if config.loss.relevance > 0 and config.loss.relevance_kind in LABEL_KINDS:
        check_relevance(rows, key, config.loss.relevance_kind)
    return rows


def check_relevance(rows: Sequence[Row], key: str, kind: str) -> None:
    """Raises ConfigError where relevance is no probability: a cross entropy with it has no least value."""
    for row in rows:
        for index, passage in enumerate(row.passages):
            if passage.relevance is not None and not 0 <= passage.relevance <= 1:
                raise ConfigError(
                    f"{key}: row {row.id!r}, passages.{index}.relevance is {passage.relevance:g}, but "
                    f"loss.relevance_kind {kind} learns labels from 0 to 1; use mse, or `label --score probability`"
                )


def over_prompt_limit(model: Model, example: TrainExample, most: int) -> bool:
    """Whether the generator's prompt and an answer would be longer than `most` tokens for any of its questions."""
    if not example.questions:
        return False
    longest = max(question_tokens(model, question) for question in example.questions)
    return background_tokens(model, example.request, example.rows, example.mode) + longest > most


def check_dev(model: Model, rows: Sequence[Row], config: TrainConfig) -> None:
    """Say how many questions cannot be asked. Raises ConfigError where none can."""
    usable = sum(can_be_read(model, row, config) for row in rows)
    if usable == len(rows):
        return
    said = f"data.dev: {usable} of {len(rows)} questions can be read in at most {model.generator.max_tokens} tokens"
    if not usable:
        raise ConfigError(f"{said}; give shorter rows, or fewer passages in each")
    tqdm.write(f"{said}; the others are left out")


def check_examples(task: Task, model: Model, config: TrainConfig) -> None:
    """Say how many of some examples would be skipped, where that is many. Raises ConfigError where all would be."""
    count = len(task.lengths)
    chosen = random.Random(config.loop.seed).sample(range(count), min(count, SAMPLE))
    made, skipped = load_examples(task, model, chosen, "check")
    # One without a question is never too long, and teaches the generator nothing.
    asked = sum(bool(example.questions) for example in made) if config.loss.needs_generator else len(made)
    if skipped <= NOTABLE * len(chosen) and asked:
        return
    said = (
        f"data.train: {skipped} of {len(chosen)} examples looked at cannot be read, or not in data.prompt_tokens "
        f"{config.data.prompt_tokens}"
    )
    if skipped and not asked:
        raise ConfigError(f"{said}; give more data.prompt_tokens, shorter rows, or fewer data.passages")
    if skipped:
        tqdm.write(f"{said}; such examples are skipped")


def check_logits(model: Model, rows: Sequence[Row], logits: TeacherLogits) -> None:
    """Raises ConfigError where the logits are of another tokenizer, or of none of the rows."""
    if logits.tokenizer != tokenizer_fingerprint(model.generator.tokenizer.get_vocab()):
        raise ConfigError("data.logits: the teacher has another tokenizer than model.generator.base_model")
    known = sum(row.id in logits for row in rows)
    tqdm.write(f"data.logits: {known} of {len(rows)} rows have the teacher's logits")
    if not known:
        raise ConfigError("data.logits: they are of none of the rows of data.train")


def load_examples(task: Task, model: Model, indices: Sequence[int], key: str) -> tuple[list[TrainExample], int]:
    """The examples of one batch, and how many were skipped because they cannot be used."""
    examples = []
    for index in indices:
        try:
            example = task.example(model, index, key)
        except InputError:
            continue
        examples += [] if example is None else [example]
    return examples, len(indices) - len(examples)
