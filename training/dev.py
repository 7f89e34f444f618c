"""How good the model is on dev questions while it trains: quick, greedy, through the very functions that serve it."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from statistics import fmean

import torch
from tqdm import tqdm

from core.errors import ConfigError, InputError
from core.model import Model
from core.pipeline import prepare, rows_of
from core.sampling import GenerationOptions
from training.answering import Compressed, compress_batch, generate_batch, needs_compression
from training.batches import TrainExample, make_example, micro_batches, prompt_tokens
from training.config import TrainConfig
from training.data_format import Row
from training.metrics import best_over_references, exact_match, gold_first, token_f1
from training.objective import Objective
from training.results import Setting

BATCH = 16


@torch.no_grad()
def evaluate_dev(
    objective: Objective, rows: Sequence[Row], config: TrainConfig, show: bool = False
) -> dict[str, float]:
    """Losses per token, passage or row; `pointer` accuracy, `gold_first`, and `f1_<mode>`, `em_<mode>` of answers.

    `show`: how far it is, on the terminal.
    """
    objective.eval()
    rows = [row for row in rows if can_be_read(objective.model, row, config)]
    examples = [make_example(objective.model, row, config.data, config.loss, f"dev/{row.id}") for row in rows]
    scores = dev_losses(objective, examples, config, show)
    scores |= served_scores(objective.model, rows, config, show)
    objective.train()
    return scores


def can_be_read(model: Model, row: Row, config: TrainConfig) -> bool:
    """Whether the pipeline accepts the row in every mode: a question that it refuses must not end a run."""
    try:
        request = prepare(model, row.query, row.passages)
    except InputError:
        return False
    rows = rows_of(model, request)
    room = model.generator.max_tokens - 1  # for a first token of the answer
    return not config.loss.needs_generator or all(
        prompt_tokens(model, request, rows, mode) <= room for mode in config.data.modes
    )


@torch.no_grad()
def dev_losses(
    objective: Objective, examples: Sequence[TrainExample], config: TrainConfig, show: bool = False
) -> dict[str, float]:
    """The parts of the loss on dev examples: per token, passage or row."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    pointed = 0
    pieces = micro_batches(objective.model, examples, config.loop.micro_batch_tokens)
    for piece in tqdm(pieces, desc="losses on dev", unit="batch", disable=not show, leave=False):
        parts = objective(piece)
        pointed += parts.pointed
        for name, loss in parts.losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss)
            counts[name] = counts.get(name, 0) + parts.counts[name]
    scores = {f"loss_{name}": sums[name] / max(counts[name], 1) for name in sums}
    if counts.get("alignment"):
        scores["pointer"] = pointed / counts["alignment"]
    return scores


def served_scores(model: Model, rows: Sequence[Row], config: TrainConfig, show: bool = False) -> dict[str, float]:
    """`gold_first`, and `f1_<mode>` and `em_<mode>` of greedy answers at the default rate, whatever the loss trains.

    From all passages of each row, as they would be served. A batch of questions is compressed once, for its ranking
    and for the answers in every mode.
    """
    ranks, answers = config.loss.relevance > 0, config.loss.needs_generator
    settings = [Setting(mode, rate=None, passages=0) for mode in config.data.modes] if answers else []
    options = GenerationOptions(max_new_tokens=config.data.answer_tokens)
    values: dict[str, list[float]] = {"gold_first": []} if ranks else {}
    starts = range(0, len(rows), BATCH)
    for start in tqdm(starts, desc="answers on dev", unit="batch", disable=not show, leave=False):
        batch = rows[start : start + BATCH]
        requests = [prepare(model, row.query, row.passages) for row in batch]
        compressed = None
        if ranks or any(needs_compression(model, setting) for setting in settings):
            compressed = compress_batch(model, requests, None, nullcontext)
        if ranks and compressed is not None:
            values["gold_first"] += rank_gold(batch, compressed)
        for setting in settings:
            read = compressed if needs_compression(model, setting) else None
            answered = generate_batch(model, requests, read, setting, options, nullcontext)
            for row, answer in zip(batch, answered, strict=True):
                for name, metric in (("f1", token_f1), ("em", exact_match)):
                    score = best_over_references(metric, answer.text, row.answers or (row.target,))
                    values.setdefault(f"{name}_{setting.mode}", []).append(score)
    return {name: fmean(scores) if scores else 0.0 for name, scores in values.items()}


def rank_gold(rows: Sequence[Row], compressed: Compressed) -> list[float]:
    """For each question with labels, whether its best-scored passage is a relevant one.

    Raises ConfigError where scores are no numbers any more.
    """
    firsts = []
    for row, passages in zip(rows, compressed, strict=True):
        gains = [float(passage.relevant) for passage in row.passages]
        if 0 < sum(gains) < len(gains):
            scores = [max(chunk.score for chunk in passage.chunks) for passage in passages]
            if any(math.isnan(score) for score in scores):
                raise ConfigError("relevance is no number any more: the run has diverged; lower optimizer.*_lr")
            firsts.append(gold_first(scores, gains))
    return firsts


def dev_score(scores: dict[str, float]) -> float:
    """The one number that `best/` goes by: mean F1 over modes; without a generator, pointer accuracy and ranking."""
    answers = [value for name, value in scores.items() if name.startswith("f1_")]
    others = [scores[name] for name in ("pointer", "gold_first") if name in scores]
    losses = [value for name, value in scores.items() if name.startswith("loss_")]
    return fmean(answers or others or [-value for value in losses])
