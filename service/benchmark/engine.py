"""The engine's variants side by side: seconds, operations and memory of each, and the ratios between them.

Within a repeat all variants answer the same questions one after the other, so that a drift of the machine is in all of
them; every repeat has new questions and another order. Prints nothing and writes nothing.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from core.costs import Stages, clock, current_memory, flop_stages, peak_memory, reset_peak_memory
from core.errors import ScaledownError
from core.model import Model
from core.pipeline import prepare
from service.benchmark.questions import Question, make_questions
from service.benchmark.shapes import compressor_flops, generator_flops
from service.benchmark.statistics import paired_ratios, spread
from service.benchmark.variants import VARIANTS, Variant, Work, without_end

Notify = Callable[[str], None]
BASELINES = ("transformers", "text")  # what the others are divided by
COMPRESSING = ("compressed", "hybrid", "vllm compressed", "vllm hybrid")
ELSEWHERE = "vllm "  # begins the names of variants whose generator runs in another process
# OSCAR, arXiv 2504.07109: its table 1 (128-token query, 10 x 128 tokens, 32 new tokens, batch 1) and its figure over
# 1 to 50 documents. Operations of compression and generation against the uncompressed generator's.
PAPER = {
    "source": "arXiv 2504.07109",
    "flops_ratio_at_10_passages": [2.2, 3.3],
    "flops_ratio_at_50_passages": 5,
}


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration: `batch` questions at a time, each of so many passages; lengths in generator tokens.

    vary    share of `passage_tokens` by which single passages are longer or shorter, at most
    """

    passages: int
    batch: int
    passage_tokens: int = 128
    query_tokens: int = 16
    new_tokens: int = 32
    vary: float = 0.0

    @property
    def label(self) -> str:
        """For tables and plots."""
        query = "" if self.query_tokens == 16 else f", query {self.query_tokens}"
        vary = "" if not self.vary else f" ± {self.vary:.0%}"
        return f"{self.passages} x {self.passage_tokens}{vary}{query}, batch {self.batch}"


@dataclass
class Measured:
    """One variant in one case.

    stages_s      of each repeat, seconds by stage
    flops         of one repeat, by stage; peak_bytes, working_bytes of the same run: at most, and above what it found
    prompt_tokens of each question of the batch
    """

    prompt_tokens: list[int]
    flops: dict[str, float]
    peak_bytes: int
    working_bytes: int
    stages_s: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Of each repeat, all of it."""
        return [sum(stages.values()) for stages in self.stages_s]

    @property
    def first_token_s(self) -> list[float]:
        """Of each repeat, from its beginning to the first token of every question in the batch."""
        return [sum(stages.values()) - stages.get("decode", 0.0) for stages in self.stages_s]


def run_case(
    model: Model, case: Case, repeats: int, notify: Notify, variants: Mapping[str, Variant] = VARIANTS
) -> dict[str, Any]:
    """Measure every variant in one case; the case's entry of the JSON.

    A variant that fails, such as one whose prompts are too long for the model, is left out of the case, and said to be.
    """
    endless = without_end(model)
    measured: dict[str, Measured] = {}
    for name, variant in variants.items():
        notify(f"{case.label}: {name}, operations and memory")
        try:
            measured[name] = _measure_cost(endless, case, variant)
        except ScaledownError as error:
            notify(f"{case.label}: {name} is left out: {error.message}")
    for repeat in range(repeats):
        notify(f"{case.label}: repeat {repeat + 1} of {repeats}")
        questions = case_questions(endless, case, seed=repeat + 1)
        names = list(measured)
        first = repeat % max(1, len(names))
        for name in names[first:] + names[:first]:
            gc.collect()
            stages = Stages(clock(model.device))
            try:
                _check(variants[name](endless, questions, case.new_tokens, stages), case)
            except ScaledownError as error:
                notify(f"{case.label}: {name} is left out: {error.message}")
                del measured[name]
                continue
            measured[name].stages_s.append(stages.values)
    return summarise(case, measured, _flops_by_shapes(endless, case, measured))


def _measure_cost(model: Model, case: Case, variant: Variant) -> Measured:
    """One run that is not timed: it warms up, and is where operations and memory are taken."""
    questions = case_questions(model, case, seed=0)
    reset_peak_memory(model.device)
    before = current_memory(model.device)
    with flop_stages() as stages:
        work = variant(model, questions, case.new_tokens, stages)
    peak = peak_memory(model.device)
    _check(work, case)
    flops = {stage: flops for stage, flops in stages.values.items() if flops}
    return Measured(work.prompt_tokens, flops, peak, max(0, peak - before))


def case_questions(model: Model, case: Case, seed: int) -> list[Question]:
    """The questions of one repeat of a case; every `seed` gives others of the same lengths."""
    return make_questions(
        model.generator.tokenizer,
        case.batch,
        passages=case.passages,
        passage_tokens=case.passage_tokens,
        query_tokens=case.query_tokens,
        vary=case.vary,
        seed=seed,
    )


def _check(work: Work, case: Case) -> None:
    """Variants that do not do the same work must not be compared."""
    lengths = {len(tokens) for tokens in work.written}
    if len(work.written) != case.batch or lengths != {case.new_tokens}:
        raise RuntimeError(f"{case.label}: {len(work.written)} answers of {sorted(lengths)} tokens were written")


def _flops_by_shapes(model: Model, case: Case, measured: Mapping[str, Measured]) -> dict[str, int]:
    """Operations that each variant of our engine must do for one batch."""
    requests = [prepare(model, each.query, each.passages) for each in case_questions(model, case, seed=0)]
    compressing = sum(compressor_flops(model, request) for request in requests)
    return {
        name: sum(generator_flops(model, tokens, case.new_tokens) for tokens in each.prompt_tokens)
        + (compressing if name in COMPRESSING else 0)
        for name, each in measured.items()
    }


def summarise(case: Case, measured: Mapping[str, Measured], by_shapes: Mapping[str, int]) -> dict[str, Any]:
    """The case's entry of the JSON: figures of each variant, then ratios, where more than 1 is better than the base."""
    entry: dict[str, Any] = {**asdict(case), "label": case.label, "variants": {}, "ratios": {}}
    for name, each in measured.items():
        stages = dict.fromkeys(stage for values in each.stages_s for stage in values)
        entry["variants"][name] = {
            "prompt_tokens": max(each.prompt_tokens),
            "seconds": asdict(spread(each.seconds)),
            "first_token_s": asdict(spread(each.first_token_s)),
            "answers_per_s": asdict(spread([case.batch / seconds for seconds in each.seconds])),
            "stages_s": {s: asdict(spread([values.get(s, 0.0) for values in each.stages_s])) for s in stages},
            "flops_by_shapes": by_shapes[name],
            **_counted(each, elsewhere=name.startswith(ELSEWHERE)),
        }
        entry["ratios"][name] = {
            f"over_{base}": _ratios(
                measured[base], each, by_shapes[base] / by_shapes[name], elsewhere=name.startswith(ELSEWHERE)
            )
            for base in BASELINES
            if base in measured and base != name
        }
    return entry


def _counted(each: Measured, *, elsewhere: bool) -> dict[str, Any]:
    """Operations and memory; None where most of them are another process's, which cannot be seen from here."""
    if elsewhere:
        return {"flops": {}, "flops_total": None, "peak_bytes": None, "working_bytes": None}
    return {
        "flops": each.flops,
        "flops_total": sum(each.flops.values()),
        "peak_bytes": each.peak_bytes,
        "working_bytes": each.working_bytes,
    }


def _ratios(base: Measured, variant: Measured, by_shapes: float, *, elsewhere: bool) -> dict[str, Any]:
    return {
        "answers_per_s": asdict(paired_ratios(base.seconds, variant.seconds)),
        "first_token": asdict(paired_ratios(base.first_token_s, variant.first_token_s)),
        "flops": None if elsewhere else sum(base.flops.values()) / sum(variant.flops.values()),
        "flops_by_shapes": by_shapes,
        "peak_bytes": None if elsewhere else base.peak_bytes / variant.peak_bytes,
    }


def plan_cases(passages: Sequence[int], batch: int, sizes: Case, paper: bool) -> list[Case]:
    """Every number of passages at batch 1 and at `batch`; with `paper`, the paper's set-up too, at batch 1.

    sizes   the lengths of all cases but the paper's
    """
    cases = [replace(sizes, passages=count, batch=size) for count in passages for size in dict.fromkeys((1, batch))]
    return cases + ([Case(10, 1, 128, query_tokens=128, new_tokens=32)] if paper else [])
