"""How good the model is on dev questions while it trains: quick, greedy, through the very functions that serve it."""

from collections.abc import Sequence
from statistics import fmean

import torch

from core.config import Mode
from core.decoding import generate
from core.errors import InputError
from core.model import Model
from core.pipeline import build_prompt, choose_modes, compress, prepare
from core.sampling import GenerationOptions
from training.batches import TrainExample, make_example, micro_batches
from training.config import TrainConfig
from training.data_format import Row
from training.metrics import best_over_references, exact_match, gold_first, token_f1
from training.objective import Objective

BATCH = 16
OPTIONS = GenerationOptions(max_new_tokens=32)


@torch.no_grad()
def evaluate_dev(objective: Objective, rows: Sequence[Row], config: TrainConfig) -> dict[str, float]:
    """Losses per token, passage or row; `pointer` accuracy, `gold_first`, and `f1_<mode>`, `em_<mode>` of answers."""
    objective.eval()
    rows = [row for row in rows if can_be_read(objective.model, row)]
    examples = [make_example(objective.model, row, config.data, config.loss, f"dev/{row.id}") for row in rows]
    scores = dev_losses(objective, examples, config)
    if config.loss.relevance > 0:
        scores["gold_first"] = rank_gold(objective.model, rows)
    if config.loss.needs_generator:
        for mode in config.data.modes:
            scores |= answer_questions(objective.model, rows, mode)
    objective.train()
    return scores


def can_be_read(model: Model, row: Row) -> bool:
    """Whether the pipeline accepts the row: a question that it refuses must not end a run."""
    try:
        prepare(model, row.query, row.passages)
    except InputError:
        return False
    return True


@torch.no_grad()
def dev_losses(objective: Objective, examples: Sequence[TrainExample], config: TrainConfig) -> dict[str, float]:
    """The parts of the loss on dev examples: per token, passage or row."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    pointed = 0
    for piece in micro_batches(objective.model, examples, config.loop.micro_batch_tokens):
        parts = objective(piece)
        pointed += parts.pointed
        for name, loss in parts.losses.items():
            sums[name] = sums.get(name, 0.0) + float(loss)
            counts[name] = counts.get(name, 0) + parts.counts[name]
    scores = {f"loss_{name}": sums[name] / max(counts[name], 1) for name in sums}
    if counts.get("alignment"):
        scores["pointer"] = pointed / counts["alignment"]
    return scores


def rank_gold(model: Model, rows: Sequence[Row]) -> float:
    """Share of questions whose best-scored passage is a relevant one; questions without labels do not count."""
    firsts = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        requests = [prepare(model, row.query, row.passages) for row in batch]
        for row, compressed in zip(batch, compress(model, requests), strict=True):
            gains = [float((passage.relevance or 0) > 0.5) for passage in row.passages]
            if 0 < sum(gains) < len(gains):
                best = [max(chunk.score for chunk in passage.chunks) for passage in compressed]
                firsts.append(gold_first(best, gains))
    return fmean(firsts) if firsts else 0.0


def answer_questions(model: Model, rows: Sequence[Row], mode: Mode) -> dict[str, float]:
    """Mean token F1 and exact match of greedy answers in one mode, at the default rate."""
    f1, em = [], []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        requests = [prepare(model, row.query, row.passages) for row in batch]
        compressed = compress(model, requests)
        prompts = [
            build_prompt(model, request, passages, choose_modes(model, passages, mode))
            for request, passages in zip(requests, compressed, strict=True)
        ]
        completions = generate(model.generator, prompts, [OPTIONS] * len(prompts))
        for row, completion in zip(batch, completions, strict=True):
            answers = row.answers or (row.target,)
            f1.append(best_over_references(token_f1, completion.text, answers))
            em.append(best_over_references(exact_match, completion.text, answers))
    return {f"f1_{mode}": fmean(f1), f"em_{mode}": fmean(em)}


def dev_score(scores: dict[str, float]) -> float:
    """The one number that `best/` goes by: mean F1 over modes; without a generator, pointer accuracy and ranking."""
    answers = [value for name, value in scores.items() if name.startswith("f1_")]
    others = [scores[name] for name in ("pointer", "gold_first") if name in scores]
    losses = [value for name, value in scores.items() if name.startswith("loss_")]
    return fmean(answers or others or [-value for value in losses])
