"""The same requests given to the engine in this process: no HTTP, no queue, no threads. What a service is compared to.

As many requests are in progress as there are clients: one joins the running batch as soon as another is done.
"""

import time
from collections.abc import Sequence
from typing import Any

from core.config import Mode
from core.decode_passes import read_prefix
from core.decoding import DecodeBatch
from core.model import Model
from core.passages import Passage
from core.pipeline import build_prompt, compress, prepare
from core.planning import choose_modes
from core.policy import Policy
from core.prompts import Prompt
from core.sampling import GenerationOptions

Body = dict[str, Any]


def answer_directly(
    model: Model, bodies: Sequence[Body], clients: int, max_sequences: int, batch_tokens: int
) -> tuple[float, list[list[int]]]:
    """Seconds for all bodies, and the tokens of each answer; the sizes are those of the service's settings."""
    waiting = list(reversed(bodies))
    prefix = read_prefix(model.generator, model.template.prefix)
    batch = DecodeBatch(model.generator, min(clients, max_sequences), model.generator.max_tokens, prefix)
    sequences = []
    began = time.perf_counter()
    while waiting or batch.live:
        joining = [waiting.pop() for _ in range(min(batch.free_slots, len(waiting)))]
        if joining:
            options = [GenerationOptions(max_new_tokens=body["max_new_tokens"]) for body in joining]
            sequences += batch.add(_prompts(model, joining, batch_tokens), options)
        batch.step()
    return time.perf_counter() - began, [sequence.token_ids for sequence in sequences]


def _prompts(model: Model, bodies: Sequence[Body], batch_tokens: int) -> list[Prompt]:
    requests = [prepare(model, body["query"], [Passage(text) for text in body["passages"]]) for body in bodies]
    # In text mode too: the service's answers always name the passages' relevance.
    compressed = compress(model, requests, max_batch_tokens=batch_tokens)
    prompts = []
    for body, request, passages in zip(bodies, requests, compressed, strict=True):
        mode: Mode = body["mode"]
        choices = choose_modes(model, request, passages, Policy(mode))
        prompts.append(build_prompt(model, request, passages, [choice.mode for choice in choices]))
    return prompts
