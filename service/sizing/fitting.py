"""Costs fitted to what `service.benchmark engine` measured: linear in what a stage reads, no coefficient below 0."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from core.config import Mode
from core.errors import ConfigError
from service.sizing.costs import LABEL_TOKENS, MODES, Costs, Sizes

BUILT_IN = Path(__file__).parent / "measured.json"
BYTES_OF = {"float32": 4, "bfloat16": 2, "float16": 2}
UNKNOWN_MAX_TOKENS = 2**31  # of a benchmark that did not write it down


@dataclass(frozen=True, slots=True)
class Measured:
    """One variant of one case: sizes, and seconds of each stage for the whole batch."""

    mode: Mode
    batch: int
    sizes: Sizes
    prompt_tokens: int
    peak_bytes: int
    stages: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Of the whole batch."""
        return sum(self.stages.values())


def read_result(path: Path) -> dict[str, Any]:
    """The JSON of a benchmark. Raises ConfigError."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.name}: cannot be read as JSON ({type(error).__name__})") from None
    if not isinstance(result, dict):
        raise ConfigError(f"{path.name}: is not the JSON of a benchmark")
    return result


def measurements(result: Mapping[str, Any]) -> list[Measured]:
    """The runs of our engine. Raises ConfigError for the JSON of another command."""
    if result.get("command") != "engine":
        raise ConfigError("measured: must be the JSON of `python -m service.benchmark engine`")
    try:
        # of cases whose passages differ in length, the sizes do not say what was read
        cases = [case for case in result["cases"] if not case.get("vary")]
        return [_measured(case, mode) for case in cases for mode in MODES if mode in case["variants"]]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"measured: the benchmark's JSON lacks {error}") from None


def _measured(case: Mapping[str, Any], mode: Mode) -> Measured:
    variant = case["variants"][mode]
    return Measured(
        mode,
        case["batch"],
        Sizes(case["passages"], case["passage_tokens"], case["query_tokens"], case["new_tokens"]),
        variant["prompt_tokens"],
        variant["peak_bytes"],
        {name: float(spread["median"]) for name, spread in variant["stages_s"].items()},
    )


def fit(result: Mapping[str, Any], source: str) -> Costs:
    """Costs from the JSON of `service.benchmark engine`. Raises ConfigError where text or compression is missing."""
    runs = measurements(result)
    if not {run.mode for run in runs} >= {"text", "compressed"}:
        raise ConfigError("measured: the benchmark's JSON needs runs of text and of compressed")
    try:
        sized = _unfitted(result, runs, source)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"measured: the benchmark's JSON lacks {error}") from None

    def fitted(stage: str, columns: Callable[[Measured], list[float]]) -> list[float]:
        having = [run for run in runs if stage in run.stages]
        return least_squares([columns(run) for run in having], [run.stages[stage] for run in having])

    def positions(run: Measured) -> float:
        return run.batch * run.sizes.passages * sized.chunks(run.sizes) * sized.row_tokens(run.sizes)

    def steps(run: Measured) -> list[float]:
        count, context = run.sizes.new_tokens - 1, run.prompt_tokens + run.sizes.new_tokens / 2
        return [count, count * run.batch, count * run.batch * context]

    (prepare,) = fitted("prepare", lambda run: [run.batch * run.sizes.passages * run.sizes.passage_tokens])
    batch, position = fitted("compress", lambda run: [1.0, positions(run)])
    token, square = fitted("prefill", lambda run: [run.batch * run.prompt_tokens, run.batch * run.prompt_tokens**2])
    step, sequence, context = fitted("decode", steps)
    return replace(
        sized, prepare=prepare, compress=(batch, position), prefill=(token, square), step=(step, sequence, context)
    )


def _unfitted(result: Mapping[str, Any], runs: Sequence[Measured], source: str) -> Costs:
    """What needs no fit: names, lengths and memory."""
    model, machine = result["model"], result["machine"]
    if model["dtype"] not in BYTES_OF:
        raise ConfigError(f"measured: weights must be {', '.join(BYTES_OF)}, not {model['dtype']}")
    weights = int(model["generator_parameters"] + model["compressor_parameters"]) * BYTES_OF[model["dtype"]]
    kv_bytes = int(model.get("kv_bytes_per_token") or 0)
    held = [
        run.peak_bytes - weights - kv_bytes * run.batch * (run.prompt_tokens + run.sizes.new_tokens) for run in runs
    ]
    overheads = [
        run.prompt_tokens - run.sizes.query_tokens - run.sizes.passages * (LABEL_TOKENS + run.sizes.passage_tokens)
        for run in runs
        if run.mode == "text"
    ]
    return Costs(
        source=source,
        machine=", ".join(f"{name} {machine[name]}" for name in ("processor", "cores", "threads", "device")),
        device=str(machine["device"]),
        model=f"{model['checkpoint']}, {model['generator']}, {model['dtype']}",
        prepare=0.0,
        compress=(0.0, 0.0),
        prefill=(0.0, 0.0),
        step=(0.0, 0.0, 0.0),
        chunk_tokens=int(model["chunk_tokens"]),
        query_tokens=int(model["query_tokens"]),
        rate=int(model["rate"]),
        hybrid_top=int(model["hybrid_top"]),
        max_tokens=int(model.get("max_tokens") or UNKNOWN_MAX_TOKENS),
        overhead_tokens=max(0.0, sum(overheads) / len(overheads)),
        weights_bytes=weights,
        runtime_bytes=max(0, max(held)),
        kv_bytes=kv_bytes,
    )


def least_squares(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Coefficients, none below 0, whose errors, each relative to what was measured, are least.

    Of the subsets of columns whose least squares solution is nowhere negative, the best: there are three at most.
    """
    scale = torch.tensor(seconds, dtype=torch.float64).clamp(min=1e-9)
    matrix = torch.tensor(rows, dtype=torch.float64) / scale[:, None]  # (measurements, columns)
    width = matrix.shape[1]
    best, least = [0.0] * width, float("inf")
    for size in range(1, width + 1):
        for kept in itertools.combinations(range(width), size):
            part = matrix[:, list(kept)]
            lengths = part.norm(dim=0)  # squares of tokens beside single ones: brought to one size before solving
            solution = torch.linalg.pinv(part / lengths).sum(dim=1) / lengths
            error = float((part @ solution - 1).square().sum())
            if bool((solution >= 0).all()) and error < least - 1e-12:
                values = dict(zip(kept, solution.tolist(), strict=True))
                best, least = [values.get(column, 0.0) for column in range(width)], error
    return best
