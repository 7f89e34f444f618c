"""How costs grow with passages, with their length, and with the questions asked at a time: curves and their slopes."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from core.costs import Stages, clock, current_memory, peak_memory, reset_peak_memory
from core.errors import TooLargeError
from core.model import Model
from service.benchmark.engine import Case, case_questions
from service.benchmark.statistics import fit_slope, spread
from service.benchmark.variants import STAGES, VARIANTS, without_end

Notify = Callable[[str], None]
SIZES = {"passages": "passages", "passage tokens": "passage_tokens", "concurrency": "batch"}  # curve -> field of Case


def run_curve(
    model: Model, over: str, sizes: Sequence[int], base: Case, variant: str, repeats: int, notify: Notify
) -> dict[str, Any]:
    """One curve's entry of the JSON: `base` with each size in turn. A size the model has no positions for ends it.

    The sizes take turns within a repeat, so that a drift of the machine bends no curve.
    """
    endless = without_end(model)
    cases = [replace(base, **{SIZES[over]: size}) for size in sorted(set(sizes))]
    points: list[dict[str, Any]] = []
    for case in cases:
        notify(f"{over}: {case.label}, memory")
        try:
            points.append(_first_run(endless, case, variant))
        except TooLargeError as error:
            notify(f"{over}: {case.label} is left out: {error.message}")
            break
    for repeat in range(repeats):
        notify(f"{over}: repeat {repeat + 1} of {repeats}")
        for case, point in zip(cases[: len(points)], points, strict=True):
            point["runs"].append(_timed_run(endless, case, variant, seed=repeat + 1))
    return summarise(over, [getattr(case, SIZES[over]) for case in cases[: len(points)]], variant, points)


def _first_run(model: Model, case: Case, variant: str) -> dict[str, Any]:
    """Not timed: it warms up, and is where memory is taken."""
    questions = case_questions(model, case, seed=0)
    reset_peak_memory(model.device)
    before = current_memory(model.device)
    work = VARIANTS[variant](model, questions, case.new_tokens, Stages(clock(model.device)))
    peak = peak_memory(model.device)
    tokens = max(work.prompt_tokens)
    return {"prompt_tokens": tokens, "peak_bytes": peak, "working_bytes": max(0, peak - before), "runs": []}


def _timed_run(model: Model, case: Case, variant: str, seed: int) -> dict[str, float]:
    questions = case_questions(model, case, seed)
    gc.collect()
    stages = Stages(clock(model.device))
    VARIANTS[variant](model, questions, case.new_tokens, stages)
    return stages.values


def summarise(
    over: str, sizes: Sequence[int], variant: str, points: Sequence[dict[str, Any]], names: Sequence[str] = STAGES
) -> dict[str, Any]:
    """Medians of each point, and a slope of every stage in `names`, of all of them and of memory."""
    shown = []
    for size, point in zip(sizes, points, strict=True):
        runs = point["runs"]
        stages = {stage: asdict(spread([run.get(stage, 0.0) for run in runs])) for stage in names}
        seconds = asdict(spread([sum(run.values()) for run in runs]))
        kept = {name: value for name, value in point.items() if name != "runs"}
        shown.append({"size": size, "seconds": seconds, "stages_s": stages, **kept})
    costs = {f"{stage}, s": [point["stages_s"][stage]["median"] for point in shown] for stage in names}
    costs["all, s"] = [point["seconds"]["median"] for point in shown]
    costs["memory, bytes"] = [float(point["working_bytes"]) for point in shown]
    slopes = {name: asdict(fit_slope(sizes, values)) for name, values in costs.items()} if len(shown) > 1 else {}
    return {"over": over, "variant": variant, "sizes": list(sizes), "points": shown, "slopes": slopes}
