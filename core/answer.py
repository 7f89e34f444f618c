"""One request answered: every step of `pipeline.py`, as `planning.py` has it, timed. Knows no other requests."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from core.compressed import CompressedPassage
from core.costs import measure_token_costs
from core.decoding import generate
from core.model import Model
from core.passages import Passage
from core.pipeline import build_prompt, compress, prepare, text_prompt_tokens
from core.planning import choose_modes, plan_request
from core.policy import Choice, Plan, Policy, RequestMode, Shown
from core.sampling import GenerationOptions


@dataclass(frozen=True)
class Answer:
    """An answer with what it was made from. Passages and choices are in the caller's order; timings in milliseconds."""

    text: str
    finish_reason: str
    passages: list[CompressedPassage]
    choices: list[Choice]
    plan: Plan
    text_tokens: int
    prompt_tokens: int
    completion_tokens: int
    timings_ms: dict[str, float]

    @property
    def modes(self) -> list[Shown]:
        """How each passage was shown."""
        return [choice.mode for choice in self.choices]


def answer(
    model: Model,
    query: str,
    passages: Sequence[Passage],
    mode: RequestMode | Policy = "compressed",
    rate: int | None = None,
    options: GenerationOptions | None = None,
) -> Answer:
    """Answer one query from its passages. Raises InputError.

    `auto` mode measures what a token costs where `model.costs` does not say, and keeps it there.
    """
    options = options or GenerationOptions()
    policy = mode if isinstance(mode, Policy) else Policy(mode)
    if policy.mode == "auto" and model.costs is None:
        model.costs = measure_token_costs(model)
    marks = [time.perf_counter()]
    request = prepare(model, query, passages)
    plan = plan_request(model, request, policy, rate, options.max_new_tokens)
    marks.append(time.perf_counter())
    compressed = compress(model, [request], plan.rate, read=[plan.read], hops=policy.hops)[0]
    marks.append(time.perf_counter())
    choices = choose_modes(model, request, compressed, policy, options.max_new_tokens)
    prompt = build_prompt(model, request, compressed, [choice.mode for choice in choices])
    completion = generate(model.generator, [prompt], [options], passes=model.decode_passes())[0]
    marks.append(time.perf_counter())
    stages = zip(("prepare", "compress", "generate"), pairwise(marks), strict=True)
    timings_ms = {name: 1000 * (end - begin) for name, (begin, end) in stages}
    return Answer(
        text=completion.text,
        finish_reason=completion.finish_reason,
        passages=compressed,
        choices=choices,
        plan=plan,
        text_tokens=text_prompt_tokens(model, request),
        prompt_tokens=prompt.tokens,
        completion_tokens=len(completion.token_ids),
        timings_ms=timings_ms | {"total": 1000 * (marks[-1] - marks[0])},
    )
