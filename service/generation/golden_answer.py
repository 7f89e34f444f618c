"""Whether a server that is not ours has a checkpoint's weights: it is asked the checkpoint's golden example.

An answer of the base model without the adapter, or of another checkpoint's generator, is found out here.
"""

from dataclasses import dataclass
from typing import Any

from core.errors import CheckpointError
from core.golden_check import GREEDY, golden_prompt, record_golden
from core.model import Model
from service.generation.vllm_wire import Written, completion_fields, prompt_fields, with_logprobs

# Of a log-probability, relative to 1 + the largest: as core.golden_check allows 16-bit weights; a server may have them.
TOLERANCE = 0.15


@dataclass(frozen=True)
class GoldenRequest:
    """The example as a completion's fields, and what its answer should be."""

    fields: dict[str, Any]
    answer_ids: tuple[int, ...]
    logprobs: list[float]


def golden_request(model: Model) -> GoldenRequest:
    """Compress the golden example of `model`'s checkpoint; without a checkpoint, record one first (seconds)."""
    golden = model.golden or record_golden(model)
    fields = prompt_fields(model.generator, golden_prompt(model, golden.example))
    fields |= completion_fields(GREEDY, model.generator.eos_ids)
    return GoldenRequest(with_logprobs(fields), golden.example.answer_ids, golden.logprobs.tolist())


def check_golden(request: GoldenRequest, written: Written) -> None:
    """Compare an answer with the recorded one, token by token. Raises CheckpointError where the weights are others.

    Each recorded token must have about its recorded log-probability. Rounding may tip a close choice, and what comes
    after it cannot be compared: so the tokens after the first that differs are not looked at.
    """
    allowed = TOLERANCE * (1 + max(abs(value) for value in request.logprobs))
    compared = zip(request.answer_ids, request.logprobs, written.token_ids, written.top_logprobs, strict=False)
    steps = 0
    for token, expected, got, top in compared:
        steps += 1
        if token not in top or not abs(top[token] - expected) <= allowed:  # written so that NaN fails
            found = f"{top[token]:.2f}" if token in top else "not among the likeliest"
            raise CheckpointError(
                f"the generator does not have this checkpoint's weights: token {steps} of the golden answer has "
                f"log-probability {found}, not {expected:.2f}; serve the folder `generator` of a merged export"
            )
        if got != token:
            return
    if steps < len(request.answer_ids):
        raise CheckpointError(
            "the generator ended the golden answer too early: it must end where the recorded one does"
        )
