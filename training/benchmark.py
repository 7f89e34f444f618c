"""`benchmark`: trained tokens a second of the loop's real step, beside a bare forward and backward of the same shapes.

Both are measured in one run, taking turns batch by batch, so that a busy machine slows them alike: same weights, same
shapes, same precision, same threads. The bare one runs second, its kernels and caches warm, so the share errs on the
low side. Writes nothing.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from core.errors import ConfigError
from core.model import Model
from training.arguments import whole
from training.config import TrainConfig, load_config
from training.hardware import DEVICES, choose_runtime
from training.objective import Objective
from training.runtime import Runtime
from training.step import train_step, update
from training.task import load_examples, question_task
from training.train import iterate_batches
from training.trainee import build_trainee

Shape = tuple[nn.Module, tuple[int, ...]]
GOAL = 0.8  # share of the bare speed that the loop is to reach
EXAMPLES = """\
examples:
  # nothing else may run beside it
  python -m training benchmark training/configs/smollm2-cpu.yaml data.train=data/train.jsonl data.dev=data/dev.jsonl
"""


@contextmanager
def record_shapes(model: Model, shapes: list[Shape]) -> Iterator[None]:
    """Note every pass of the transformers, (rows, positions), and of the generator's head, (positions,), in order."""

    def note_pass(module: nn.Module, args: object, kwargs: dict[str, Tensor]) -> None:
        shapes.append((module, tuple(kwargs["inputs_embeds"].shape[:2])))

    def note_head(module: nn.Module, args: tuple[Tensor]) -> None:
        shapes.append((module, tuple(args[0].shape[:1])))

    transformers = (model.compressor.backbone, model.generator.model.base_model)
    handles = [module.register_forward_pre_hook(note_pass, with_kwargs=True) for module in transformers]
    handles.append(model.generator.model.get_output_embeddings().register_forward_pre_hook(note_head))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bare_step(model: Model, shapes: list[Shape], config: TrainConfig, runtime: Runtime) -> None:
    """Forward and backward of the models alone: random inputs, no padding, no data, no loss, no optimiser.

    The generator's backward reaches its inputs, as it must to train a compressor.
    """
    for module, shape in shapes:
        inside = module is model.compressor.backbone
        width = model.compressor.slots.shape[1] if inside else model.generator.hidden_size
        dtype = torch.float32 if inside else model.generator.dtype
        inputs = torch.randn(*shape, width, device=runtime.device, dtype=dtype, requires_grad=True)
        with runtime.autocast(config.loop.precision):
            head = len(shape) == 1
            output = module(inputs) if head else module(inputs_embeds=inputs).last_hidden_state
        output.sum().backward()
    model.compressor.zero_grad(set_to_none=True)
    model.generator.zero_grad(set_to_none=True)
    runtime.end_step()


def measure(config: TrainConfig, steps: int, runtime: Runtime) -> dict[str, float]:
    """Medians over `steps` steps after one that warms up."""
    task = question_task(config)
    model, groups, names = build_trainee(config, runtime)
    task.check(model)
    optimizer = torch.optim.AdamW(groups, betas=config.optimizer.betas)
    objective = Objective(model, config.loss, config.loop.row_batch_tokens, config.optimizer.compressor_dropout).train()
    shares, rates, bare_rates = [], [], []
    real = padded = 0.0
    for step, epoch, indices in iterate_batches(task.lengths, config, 0):
        if step > steps:
            break
        shapes: list[Shape] = []
        with record_shapes(model, shapes):
            start = time.perf_counter()
            examples, _ = load_examples(task, model, indices, f"{config.loop.seed}/{epoch}")
            sums = train_step(objective, examples, config, runtime)
            update(optimizer, names, config, 1.0, runtime)
            middle = time.perf_counter()
        bare_step(model, shapes, config, runtime)
        end = time.perf_counter()
        if step == 0:
            continue
        rates.append(sums["padded"] / (middle - start))
        bare_rates.append(sums["padded"] / (end - middle))
        shares.append((end - middle) / (middle - start))
        real, padded = real + sums["real"], padded + sums["padded"]
    if not shares:
        raise ConfigError("data.train: too few rows for one measured step; lower loop.batch_size")
    return {
        "steps": float(len(shares)),
        "loop_positions_per_s": median(rates),
        "bare_positions_per_s": median(bare_rates),
        "share_of_bare": median(shares),
        "loop_tokens_per_s": median(rates) * real / padded,
        "padding_share": 1 - real / padded,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m training benchmark`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("config", type=Path, help="the settings of a training run")
    parser.add_argument("overrides", nargs="*", default=[], help="settings to change, as a.b=c")
    parser.add_argument("--steps", type=whole(1), default=10, help="measured steps (default 10)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: CUDA if there is one, else CPU")


def run(args: argparse.Namespace) -> None:
    """Measure, and print one JSON object and one sentence. Raises ScaledownError for what the user can mend.

    `share_of_bare`: seconds of a bare forward and backward / seconds of a whole step, from reading the rows to new
    weights; the positions, padding included, are the same. `loop_tokens_per_s` leaves padding out.
    """
    config = load_config(args.config, args.overrides)
    measured = measure(config, args.steps, choose_runtime(args.device))
    print(json.dumps({name: round(value, 4) for name, value in measured.items()}))
    print(
        f"training loop {measured['loop_positions_per_s']:.0f} positions/s, bare forward and backward "
        f"{measured['bare_positions_per_s']:.0f} positions/s: {measured['share_of_bare']:.1%} (goal {GOAL:.0%})"
    )
