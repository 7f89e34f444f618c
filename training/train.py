"""The one training loop, for every compressor, read top to bottom: `python -m training train CONFIG --out RUN`."""

import argparse
import json
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch
from torch import nn
from tqdm import tqdm

from core.errors import ConfigError, InputError
from core.model import Model
from training.batches import TrainExample, make_example, micro_batches, plan_epoch, row_length
from training.config import TrainConfig, dump_yaml, load_config
from training.data_format import Row, read_rows
from training.data_quality import ReadPolicy
from training.dev import dev_score, evaluate_dev
from training.metrics_log import MetricsLog
from training.objective import Objective, Parts
from training.run_state import Progress, optimizer_tensors, recover_folder, restore_run, save_weights
from training.runtime import AccelerateRuntime, Runtime
from training.trainee import build_trainee


class Stop:
    """Set by SIGTERM or SIGINT: the loop saves and ends after the step it is in."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def schedule(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first share `warmup` of `steps`, then linear to 0: the factor for step 0, 1, ..."""
    rising = max(1, round(steps * warmup))
    return (step + 1) / rising if step < rising else max(0.0, (steps - step) / max(1, steps - rising))


def iterate_batches(rows: Sequence[Row], config: TrainConfig, first_step: int) -> Iterator[tuple[int, int, list[int]]]:
    """`(step, epoch, row indices)` from `first_step` to the end of the run."""
    lengths = [row_length(row, config.data.passages) for row in rows]
    step = 0
    for epoch in range(config.loop.epochs):
        for batch in plan_epoch(lengths, config.loop.batch_size, config.loop.seed, epoch):
            if config.loop.max_steps is not None and step >= config.loop.max_steps:
                return
            if step >= first_step:
                yield step, epoch, batch
            step += 1


def count_steps(rows: Sequence[Row], config: TrainConfig) -> int:
    """Optimiser steps of the whole run."""
    whole = config.loop.epochs * -(-len(rows) // config.loop.batch_size)
    return min(whole, config.loop.max_steps or whole)


def load_examples(model: Model, rows: Sequence[Row], config: TrainConfig, key: str) -> tuple[list[TrainExample], int]:
    """Tokenise one batch's rows; a row that cannot be used is skipped and counted."""
    examples, skipped = [], 0
    for row in rows:
        try:
            example = make_example(model, row, config.data, config.loss, f"{key}/{row.id}")
        except InputError:
            skipped += 1
            continue
        text = sum(len(chunk.generator_ids) for chunk in example.request.chunks)
        too_long = example.mode != "compressed" and text + len(example.answer_ids) + 128 > config.data.prompt_tokens
        skipped += too_long
        examples += [] if too_long else [example]
    return examples, skipped


def train_step(
    objective: Objective, examples: list[TrainExample], config: TrainConfig, runtime: Runtime
) -> dict[str, float]:
    """Forward and backward over one batch; gradients and returned sums are over all processes.

    Every part of the loss is a mean over the whole batch, so neither the split into micro-batches nor the number of
    processes changes the gradient.
    """
    weights = {"answer": config.loss.answer, "relevance": config.loss.relevance, "alignment": config.loss.alignment}
    counts = runtime.sum_counts(
        {
            "answer": float(sum(len(example.answer_ids) for example in examples)),
            "relevance": float(sum(len(example.relevance or []) for example in examples)),
            "alignment": float(sum(bool(hit) for example in examples for hit in example.hits)),
        }
    )
    sums = {f"sum_{name}": 0.0 for name in weights} | {"real": 0.0, "padded": 0.0, "pointed": 0.0}
    for piece in micro_batches(objective.model, examples, config.loop.micro_batch_tokens):
        with runtime.autocast(config.loop.precision):
            parts: Parts = objective(piece)
            losses = [weights[name] * loss / max(counts[name], 1) for name, loss in parts.losses.items()]
        if losses and (total := torch.stack(losses).sum()).requires_grad:
            total.backward()
        for name, loss in parts.losses.items():
            sums[f"sum_{name}"] += float(loss.detach())
        sums["real"] += parts.real
        sums["padded"] += parts.padded
        sums["pointed"] += parts.pointed
    return runtime.sum_counts(sums) | {f"count_{name}": count for name, count in counts.items()}


def summarise(window: list[dict[str, float]], config: TrainConfig, seconds: float) -> dict[str, float]:
    """Means over the steps since the last log line."""
    total = {key: sum(step[key] for step in window) for key in window[0]}
    weights = {"answer": config.loss.answer, "relevance": config.loss.relevance, "alignment": config.loss.alignment}
    means = {name: total[f"sum_{name}"] / total[f"count_{name}"] for name in weights if total[f"count_{name}"]}
    summary = {f"loss_{name}": mean for name, mean in means.items() if weights[name] > 0}
    summary["loss"] = sum(weights[name] * mean for name, mean in means.items())
    if total["count_alignment"]:
        summary["pointer"] = total["pointed"] / total["count_alignment"]
    summary["tokens_per_s"] = total["real"] / seconds
    summary["padding_share"] = 1 - total["real"] / max(total["padded"], 1)
    return summary


def train(config: TrainConfig, folder: Path, runtime: Runtime) -> Progress:
    """Run `config` to its end or to a stop signal, going on from `folder/last` where there is one."""
    stop = Stop()
    rows = load_rows(config, config.data.train)
    dev_rows = load_rows(config, config.data.dev)[: config.data.dev_questions or None]
    model, groups, names = build_trainee(config, runtime)
    optimizer = torch.optim.AdamW(groups, betas=config.optimizer.betas)
    objective = Objective(model, config.loss, config.loop.row_batch_tokens, config.optimizer.compressor_dropout).train()
    main = runtime.rank == 0
    recover_folder(folder / "last")
    progress = restore_run(folder / "last", optimizer, names) if (folder / "last").exists() else Progress()
    log = MetricsLog(folder, main)
    steps = count_steps(rows, config)
    window: list[dict[str, float]] = []
    started = time.perf_counter()
    bar = tqdm(total=steps, initial=progress.step, unit="step", disable=not main)
    for step, epoch, indices in iterate_batches(rows, config, progress.step):
        # Seeded by position: dropout after a resume is what it would have been.
        torch.manual_seed(hash((config.loop.seed, step, runtime.rank)))
        mine = [rows[index] for index in indices][runtime.rank :: runtime.world]
        examples, skipped = load_examples(model, mine, config, f"{config.loop.seed}/{epoch}")
        window.append(train_step(objective, examples, config, runtime))
        update(optimizer, names, config, schedule(step, steps, config.optimizer.warmup), runtime)
        progress.step, progress.examples = step + 1, progress.examples + len(indices)
        progress.skipped += skipped
        bar.update()
        last = progress.step == steps
        if progress.step % config.loop.log_every == 0 or last:
            log.write(progress.step, "train", summarise(window, config, time.perf_counter() - started))
            window, started = [], time.perf_counter()
        if progress.step % config.loop.eval_every == 0 or last:
            keep_best(objective, dev_rows, config, folder, progress, log, runtime)
        exhausted = config.loop.patience is not None and progress.evaluations_since_best >= config.loop.patience
        if main and (progress.step % config.loop.save_every == 0 or last or stop.requested or exhausted):
            save_last(model, config, progress, folder, optimizer, names)
        if stop.requested or exhausted:
            break
    runtime.wait()
    return progress


def update(
    optimizer: torch.optim.Optimizer,
    names: dict[nn.Parameter, str],
    config: TrainConfig,
    factor: float,
    runtime: Runtime,
) -> None:
    """One optimiser step at the scheduled rate, gradients clipped."""
    runtime.sum_gradients(names)
    nn.utils.clip_grad_norm_(list(names), config.optimizer.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    runtime.end_step()


def keep_best(
    objective: Objective,
    rows: Sequence[Row],
    config: TrainConfig,
    folder: Path,
    progress: Progress,
    log: MetricsLog,
    runtime: Runtime,
) -> None:
    """Evaluate on dev and write `best/` where this is the best so far."""
    with runtime.autocast(config.loop.precision):
        scores = evaluate_dev(objective, rows, config)
    log.write(progress.step, "dev", scores)
    score = dev_score(scores)
    progress.scores = scores
    progress.evaluations_since_best += 1
    if progress.best_score is None or score > progress.best_score:
        progress.best_score, progress.evaluations_since_best = score, 0
        if runtime.rank == 0:
            save_weights(objective.model, config, progress, folder / "best")


def save_last(
    model: Model,
    config: TrainConfig,
    progress: Progress,
    folder: Path,
    optimizer: torch.optim.Optimizer,
    names: dict[nn.Parameter, str],
) -> None:
    """Write `last/`: all that is needed to go on."""
    state = {
        "trainable.safetensors": {name: parameter.detach().cpu().clone() for parameter, name in names.items()},
        "optimizer.safetensors": optimizer_tensors(optimizer, names),
    }
    save_weights(model, config, progress, folder / "last", state)


def load_rows(config: TrainConfig, name: str) -> list[Row]:
    """Rows of a data file; what was wrong with the others is printed with line numbers."""
    rows, report = read_rows(Path(name), ReadPolicy(on_problem=config.data.on_bad_row))
    tqdm.write(str(report))
    if not rows:
        raise ConfigError(f"data: {name} has no usable row")
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m training train`."""
    parser.description = "Train a compressor and the generator's LoRA. Run it again with the same --out to resume."
    parser.add_argument("config", type=Path, help="a YAML file, e.g. training/configs/smollm2-cpu.yaml")
    parser.add_argument("overrides", nargs="*", help="settings to change, as a.b=c (data.train=rows.jsonl)")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; an unfinished run there is resumed")


def run(args: argparse.Namespace) -> int:
    """Entry point of `python -m training train`."""
    config = load_config(args.config, args.overrides)
    args.out.mkdir(parents=True, exist_ok=True)
    runtime = AccelerateRuntime()
    if runtime.rank == 0:
        (args.out / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    progress = train(config, args.out, runtime)
    if runtime.rank == 0:
        print(json.dumps(asdict(progress)))
    return 0
