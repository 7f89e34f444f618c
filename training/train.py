"""The one training loop, for every compressor, read top to bottom: `python -m training train CONFIG --out RUN`."""

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from core.errors import ConfigError
from core.model import Model
from training.adapters import whole_copy
from training.arguments import check_out_folder
from training.batches import plan_epoch
from training.config import TrainConfig, dump_yaml, load_config
from training.dev import dev_score
from training.hardware import DEVICES, choose_runtime
from training.metrics_log import MetricsLog
from training.objective import Objective
from training.run_state import (
    LENGTH,
    Progress,
    alone_in,
    optimizer_tensors,
    recover_folder,
    restore_run,
    run_settings,
    save_weights,
)
from training.runtime import Runtime
from training.step import schedule, summarise, train_step, update
from training.task import Task, check_examples, load_examples, question_task
from training.trainee import build_trainee

EXAMPLES = """\
examples:
  # ten steps, to see that data and machine are fit
  python -m training train training/configs/tiny-test.yaml --out runs/tiny \\
      data.train=data/train.jsonl data.dev=data/dev.jsonl
  # a shipped config on your own rows; the same line again goes on where it was stopped
  python -m training train training/configs/smollm2-cpu.yaml --out runs/first \\
      data.train=data/train.jsonl data.dev=data/dev.jsonl
  # some settings changed, beginning from the best state of another run
  python -m training train training/configs/smollm2-cpu.yaml --out runs/second start=runs/first/best \\
      loop.epochs=3 optimizer.generator_lr=2e-4
  # over the GPUs of a machine; fsdp-gpu.yaml shards the layers too
  accelerate launch --config_file training/configs/accelerate/ddp-gpu.yaml -m training train \\
      training/configs/paper-mistral-7b-n8.yaml --out runs/mistral
"""

MOST_FAILED = 20  # steps in a row whose gradient is not finite: single ones are left out, so many are no accident
DIVERGED = (
    "the gradient was not finite in {} steps in a row: the run has diverged; lower optimizer.*_lr, or give "
    "loop.precision=fp32 or a higher optimizer.warmup"
)


OVER = "nothing to do: {} is over at step {} of {} (loop.epochs {}, loop.max_steps {}, loop.patience {})"
STOPPING = b"\nstopping after this step and its evaluation on dev, if it has one\n"


class Stop:
    """While inside, SIGTERM and SIGINT only set `requested`: the loop saves and ends after the step it is in.

    say  whether the first of them is answered on stderr: an evaluation may take minutes
    """

    def __init__(self, say: bool) -> None:
        self.requested = False
        self._say = say

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._say and not self.requested:
            os.write(2, STOPPING)  # no print: it may have been interrupted itself
        self.requested = True


def iterate_batches(
    lengths: Sequence[int], config: TrainConfig, first_step: int
) -> Iterator[tuple[int, int, list[int]]]:
    """`(step, epoch, indices of examples)` from `first_step` to the end of the run."""
    step = 0
    for epoch in range(config.loop.epochs):
        for batch in plan_epoch(lengths, config.loop.batch_size, config.loop.seed, epoch):
            if config.loop.max_steps is not None and step >= config.loop.max_steps:
                return
            if step >= first_step:
                yield step, epoch, batch
            step += 1


def count_steps(examples: int, config: TrainConfig) -> int:
    """Optimiser steps of the whole run."""
    whole = config.loop.epochs * -(-examples // config.loop.batch_size)
    return min(whole, config.loop.max_steps or whole)


def train(config: TrainConfig, task: Task, folder: Path, runtime: Runtime) -> Progress:
    """Run `config` on `task` to its end or to a stop signal, going on from `folder/last` where there is one.

    Nothing is written before model and data are found to be fit. Raises ConfigError, also where gradients are not
    finite any more, CheckpointError, BaseModelError.
    """
    model, groups, names = build_trainee(config, runtime)
    task.check(model)
    optimizer = torch.optim.AdamW(groups, betas=config.optimizer.betas)
    objective = Objective(model, config.loss, config.loop.row_batch_tokens, config.optimizer.compressor_dropout).train()
    progress = resume(folder, run_settings(config, model, runtime), optimizer, names, runtime)
    steps, main = count_steps(len(task.lengths), config), runtime.rank == 0
    if progress.is_over(steps, config.loop.patience):
        if main:
            tqdm.write(OVER.format(folder, progress.step, steps, *(getattr(config.loop, name) for name in LENGTH)))
        return progress
    check_examples(task, model, config)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    runtime.wait()
    failed = 0  # steps in a row whose gradient was not finite
    with (
        alone_in(folder) if main else nullcontext(),
        Stop(main) as stop,
        MetricsLog(folder, main, progress.step) as log,
        tqdm(total=steps, initial=progress.step, unit="step", disable=not main) as bar,
    ):
        for step, epoch, indices in iterate_batches(task.lengths, config, progress.step):
            started = time.perf_counter()
            # Seeded by position: dropout after a resume is what it would have been.
            torch.manual_seed(hash((config.loop.seed, step, runtime.rank)))
            mine = indices[runtime.rank :: runtime.world]
            examples, skipped = load_examples(task, model, mine, f"{config.loop.seed}/{epoch}")
            sums = train_step(objective, examples, config, runtime)
            norm = update(optimizer, names, config, schedule(step, steps, config.optimizer.warmup), runtime)
            failed = 0 if math.isfinite(norm) else failed + 1
            if failed == min(MOST_FAILED, steps):
                raise ConfigError(DIVERGED.format(failed))
            # A signal may reach one process only: they stop together or not at all.
            shared = runtime.sum_counts({"skipped": float(skipped), "stop": float(stop.requested)})
            progress.step, progress.examples = step + 1, progress.examples + len(indices)
            progress.skipped += int(shared["skipped"])
            counts = {"skipped": shared["skipped"], "not_finite": float(failed > 0)}
            progress.window.append(sums | counts | {"grad_norm": norm, "seconds": time.perf_counter() - started})
            bar.update()
            last = progress.step == steps
            if progress.step % config.loop.log_every == 0 or last:
                log.write(progress.step, "train", summarise(progress.window, config.loss))
                progress.window = []
            if progress.step % config.loop.eval_every == 0 or last:
                keep_best(objective, task, config, folder, progress, log, runtime)
                shared |= runtime.sum_counts({"stop": float(stop.requested)})  # it may have come meanwhile
            ending = bool(shared["stop"]) or progress.is_over(steps, config.loop.patience)
            if (main or runtime.sharded) and (ending or progress.step % config.loop.save_every == 0):
                save_last(model, config, progress, folder, optimizer, names, main)
            if ending:
                break
    runtime.wait()
    return progress


def resume(
    folder: Path,
    settings: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    names: dict[nn.Parameter, str],
    runtime: Runtime,
) -> Progress:
    """Where `folder/last` stands, weights and optimiser set to it; the start of a run where there is none.

    Raises ConfigError where it was trained with other `settings`, CheckpointError where it does not fit.
    """
    if runtime.rank == 0:
        recover_folder(folder / "last")
        recover_folder(folder / "best")
    runtime.wait()
    last = folder / "last"
    return restore_run(last, settings, optimizer, names) if last.exists() else Progress(settings=settings)


def keep_best(
    objective: Objective,
    task: Task,
    config: TrainConfig,
    folder: Path,
    progress: Progress,
    log: MetricsLog,
    runtime: Runtime,
) -> None:
    """Evaluate on dev and write `best/` where this is the best so far."""
    evaluated = runtime.for_evaluation(objective)
    with runtime.autocast(config.loop.precision, evaluated.model.device), runtime.gathered():
        scores = task.evaluate(evaluated, runtime.rank == 0)
    # The first process's count for all: kernels may round apart, and what one takes for the best all must.
    scores = runtime.sum_counts({name: score if runtime.rank == 0 else 0.0 for name, score in scores.items()})
    log.write(progress.step, "dev", scores)
    score = dev_score(scores)
    progress.scores = scores
    progress.evaluations_since_best += 1
    if math.isfinite(score) and (progress.best_score is None or score > progress.best_score):
        progress.best_score, progress.evaluations_since_best = score, 0
        if runtime.rank == 0 or runtime.sharded:
            save_weights(objective.model, config, progress, folder / "best", write=runtime.rank == 0)


def save_last(
    model: Model,
    config: TrainConfig,
    progress: Progress,
    folder: Path,
    optimizer: torch.optim.Optimizer,
    names: dict[nn.Parameter, str],
    write: bool,
) -> None:
    """Write `last/`: all that is needed to go on."""
    state = {
        "trainable.safetensors": {name: whole_copy(parameter) for parameter, name in names.items()},
        "optimizer.safetensors": optimizer_tensors(optimizer, names),
    }
    save_weights(model, config, progress, folder / "last", state, write)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m training train`."""
    parser.description = "Train a compressor and the generator's LoRA. Run it again with the same --out to resume."
    add_run_arguments(parser, EXAMPLES)


def add_run_arguments(parser: argparse.ArgumentParser, examples: str) -> None:
    """What every command that runs the loop is told."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = examples
    parser.add_argument("config", type=Path, help="a YAML file, e.g. training/configs/smollm2-cpu.yaml")
    parser.add_argument("overrides", nargs="*", default=[], help="settings to change, as a.b=c (data.train=rows.jsonl)")
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; an unfinished run there is resumed")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: CUDA if there is one, else CPU")


def run(args: argparse.Namespace) -> None:
    """Entry point of `python -m training train`."""
    run_task(args, question_task)


def run_task(
    args: argparse.Namespace,
    make_task: Callable[[TrainConfig], Task],
    adapt: Callable[[TrainConfig], TrainConfig] = lambda config: config,
) -> None:
    """Train on a task as the command line says.

    Raises ScaledownError for what the user can mend, KeyboardInterrupt where a signal ended the run early.
    """
    config = adapt(load_config(args.config, args.overrides))
    check_out_folder(args.out, "--out")
    if (args.out / "config.json").exists():
        raise ConfigError(f"--out {args.out}: holds a model or a checkpoint, not a run; give another folder")
    if config.start and not (Path(config.start) / "compressor.safetensors").is_file():
        raise ConfigError(f"start {config.start}: holds no weights of a run or a checkpoint (compressor.safetensors)")
    task = make_task(config)
    runtime = choose_runtime(args.device)
    if runtime.rank == 0:
        how = ", layers sharded" if runtime.sharded else ""
        tqdm.write(f"{runtime.world} process{'es' if runtime.world > 1 else ''} on {runtime.device}{how}")
    progress = train(config, task, args.out, runtime)
    if runtime.rank == 0:
        inner = ("settings", "window")
        print(json.dumps({name: value for name, value in asdict(progress).items() if name not in inner}))
    steps = count_steps(len(task.lengths), config)
    if not progress.is_over(steps, config.loop.patience):
        if runtime.rank == 0:
            tqdm.write(f"stopped at step {progress.step} of {steps}; repeat the command to go on")
        raise KeyboardInterrupt  # as of any command that is stopped: what follows `&&` is for a run that is done
