"""One optimiser step: losses and gradients over a batch, clipping, the learning rates. Knows no files and no epochs."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from training.batches import TrainExample, micro_batches
from training.config import LossConfig, TrainConfig
from training.objective import Objective, Parts
from training.runtime import Runtime


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first share `warmup` of `steps`, then linear to 0: the factor for step 0, 1, ..."""
    rising = max(1, round(steps * warmup))
    return (step + 1) / rising if step < rising else max(0.0, (steps - step) / max(1, steps - rising))


def loss_weights(loss: LossConfig) -> dict[str, float]:
    """The weight of every part of the loss, by the part's name."""
    return {"answer": loss.answer, "kl": loss.kl, "relevance": loss.relevance, "alignment": loss.alignment}


def count_targets(examples: Iterable[TrainExample]) -> dict[str, float]:
    """What each part of the loss is a mean over: answer tokens, those with logits, passages, rows with the answer."""
    counts = dict.fromkeys(("answer", "kl", "relevance", "alignment"), 0.0)
    for example in examples:
        for question in example.questions:
            counts["answer"] += len(question.answer_ids)
            counts["kl"] += len(question.answer_ids) if question.teacher else 0
        counts["relevance"] += len(example.relevance or [])
        counts["alignment"] += sum(map(bool, example.hits))
    return counts


def train_step(
    objective: Objective, examples: Sequence[TrainExample], config: TrainConfig, runtime: Runtime
) -> dict[str, float]:
    """Forward and backward over one batch; gradients are this process's share, returned sums are over all processes.

    Every part of the loss is a mean over the whole batch, so neither the split into micro-batches nor the number of
    processes changes the gradient.
    """
    weights = loss_weights(config.loss)
    counts = runtime.sum_counts(count_targets(examples))
    sums = {f"sum_{name}": 0.0 for name in weights} | {"real": 0.0, "padded": 0.0, "pointed": 0.0}
    for piece in runtime.even(micro_batches(objective.model, examples, config.loop.micro_batch_tokens)):
        with runtime.autocast(config.loop.precision):
            parts: Parts = objective(piece)
            losses = [weights[name] * loss / max(counts[name], 1) for name, loss in parts.losses.items()]
            losses += runtime.ties()
        if losses and (total := torch.stack(losses).sum()).requires_grad:
            total.backward()
        for name, loss in parts.losses.items():
            sums[f"sum_{name}"] += float(loss.detach())
        sums["real"] += parts.real
        sums["padded"] += parts.padded
        sums["pointed"] += parts.pointed
    return runtime.sum_counts(sums) | {f"count_{name}": count for name, count in counts.items()}


def update(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    config: TrainConfig,
    factor: float,
    runtime: Runtime,
) -> float:
    """One optimiser step at the scheduled rate, gradients clipped; returns their norm before clipping.

    Where that is not finite the step is left out: one bad batch must not spoil the weights.
    """
    runtime.sum_gradients(names)
    norm = runtime.clip_gradients(names, config.optimizer.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    if norm - norm == 0.0:  # neither infinite nor not a number
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    runtime.end_step()
    return norm


def summarise(window: Sequence[Mapping[str, float]], loss: LossConfig) -> dict[str, float]:
    """Means over the steps since the last log line; `skipped` rows and `not_finite` steps are counted."""
    total = {key: sum(step[key] for step in window) for key in window[0]}
    weights = loss_weights(loss)
    means = {name: total[f"sum_{name}"] / total[f"count_{name}"] for name in weights if total[f"count_{name}"]}
    summary = {f"loss_{name}": mean for name, mean in means.items() if weights[name] > 0}
    summary["loss"] = sum(weights[name] * mean for name, mean in means.items())
    summary["grad_norm"] = total["grad_norm"] / len(window)
    if total["count_alignment"]:
        summary["pointer"] = total["pointed"] / total["count_alignment"]
    summary["tokens_per_s"] = total["real"] / total["seconds"]
    summary["padding_share"] = 1 - total["real"] / max(total["padded"], 1)
    return summary | {name: total[name] for name in ("skipped", "not_finite")}
