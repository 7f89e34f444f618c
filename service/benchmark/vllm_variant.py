"""The same questions answered by a vLLM server that was started apart: as text, and from spliced embeddings.

Requests leave together and are batched by vLLM. Compression and splicing happen here, as in the service; what vLLM
itself computes and holds cannot be counted from outside.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from functools import partial

from core.config import Mode
from core.costs import Stages
from core.model import Model
from core.prompts import Prompt
from core.sampling import GenerationOptions
from service.benchmark.questions import Question
from service.benchmark.variants import Variant, Work, build_prompts, require_room
from service.generation.golden_answer import check_golden, golden_request
from service.generation.vllm_server import VllmServer
from service.generation.vllm_wire import completion_fields, prompt_fields
from service.metrics import Metrics
from service.settings import Settings

PATIENCE_S = 3600  # the last of a batch of long prompts waits for all others to be read


def vllm_variants(model: Model, url: str) -> Mapping[str, Variant]:
    """The variants by name. Raises CheckpointError where the server does not have the generator's weights.

    `model` gets the server's limit where that is shorter, so that every variant is asked for the same.
    """
    settings = Settings(generator_url=url, stall_seconds=PATIENCE_S)
    name, max_tokens = asyncio.run(_verified(model, settings))
    model.generator.max_tokens = min(model.generator.max_tokens, max_tokens or model.generator.max_tokens)
    settings = settings.model_copy(update={"generator_model": name})
    modes: tuple[Mode, ...] = ("text", "compressed", "hybrid")
    return {f"vllm {mode}": partial(run_vllm, settings=settings, mode=mode) for mode in modes}


def run_vllm(
    model: Model, questions: Sequence[Question], new_tokens: int, stages: Stages, *, settings: Settings, mode: Mode
) -> Work:
    """Prompts built here and answered there; `decode` begins once every question has its first token."""
    prompts = build_prompts(model, questions, stages, mode)
    require_room(model, max(prompt.tokens for prompt in prompts), new_tokens)
    stages.enter("prefill")
    written = asyncio.run(_answer_all(model, prompts, new_tokens, stages, settings))
    stages.end()
    return Work([prompt.tokens for prompt in prompts], written)


async def _verified(model: Model, settings: Settings) -> tuple[str, int | None]:
    """The name of the model served, and its longest sequence, once it is seen to be `model`'s generator."""
    async with contextlib.aclosing(VllmServer(settings, Metrics())) as server:
        await server.connect()
        request = golden_request(model)
        check_golden(request, await server.complete(request.fields))
        return server.model, server.max_tokens


async def _answer_all(
    model: Model, prompts: Sequence[Prompt], new_tokens: int, stages: Stages, settings: Settings
) -> list[list[int]]:
    fields = completion_fields(GenerationOptions(max_new_tokens=new_tokens), model.generator.eos_ids)
    waiting = len(prompts)

    async def answer(server: VllmServer, prompt: Prompt) -> list[int]:
        nonlocal waiting
        body = server.body(prompt_fields(model.generator, prompt) | fields | {"stream": True, "ignore_eos": True})
        tokens: list[int] = []
        async for new in server.stream(body):
            if not tokens:
                waiting -= 1
                if not waiting:
                    stages.enter("decode")
            tokens += new
        return tokens

    async with contextlib.aclosing(VllmServer(settings, Metrics())) as server:
        return list(await asyncio.gather(*(answer(server, prompt) for prompt in prompts)))
