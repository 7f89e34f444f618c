"""A double of `vllm serve --enable-prompt-embeds`: its HTTP, and our own engine behind it. Not vLLM.

Says what vLLM 0.32 says to the same requests, as far as the service relies on it. tests/service/test_real_vllm.py asks
the real one the same things.
"""

import asyncio
import base64
import contextlib
import copy
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from core.generator import Generator
from core.prompts import Prompt
from core.sampling import GenerationOptions
from tests.free_port import free_port
from tests.tiny_generators import stream


class VllmDouble:
    """Serves `generator` on one port, as often as it is started.

    requests    bodies of all completions
    headers     of the newest of them
    broken      what the next streams meet, in turn: a status, "reset" before or "cut" after the first token
    refused     statuses that the next completions in one piece meet, in turn
    cancelled   completions whose client left before their end
    token_s     seconds each token takes
    health      status that /health answers with
    health_s    seconds it takes
    probes      how often it was asked
    """

    def __init__(self, generator: Generator, max_model_len: int = 512) -> None:
        self.generator = generator
        self.max_model_len = max_model_len
        self.requests: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.broken: list[int | str] = []
        self.refused: list[int] = []
        self.cancelled = 0
        self.token_s = 0.0
        self.health = 200
        self.health_s = 0.0
        self.probes = 0
        self.port = free_port()
        self._app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
            ]
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @contextlib.contextmanager
    def running(self) -> Iterator["VllmDouble"]:
        """Listens until the block ends; then connections are refused, and its limit is the lent generator's no more."""
        own = self.generator.max_tokens
        config = uvicorn.Config(
            self._app, port=self.port, log_level="error", lifespan="off", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the double did not start"
            time.sleep(0.01)
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join(timeout=10)
            assert not thread.is_alive(), "the double did not stop"
            self.generator.max_tokens = own

    async def _health(self, _: Request) -> Response:
        self.probes += 1
        await asyncio.sleep(self.health_s)
        return Response(status_code=self.health)

    async def _models(self, _: Request) -> Response:
        entry = {"id": "generator", "object": "model", "max_model_len": self.max_model_len}
        return JSONResponse({"object": "list", "data": [entry]})

    async def _completions(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        self.headers = dict(request.headers)
        failures = self.broken if body["stream"] else self.refused
        broken = failures.pop(0) if failures else None
        if isinstance(broken, int):
            return JSONResponse({"error": {"message": "secret details", "code": broken}}, broken)
        if body["model"] != "generator":
            return JSONResponse({"error": {"message": "no such model", "code": 404}}, 404)
        prompt = prompt_of(body)
        if prompt.tokens + body["max_tokens"] > self.max_model_len:
            return JSONResponse({"error": {"message": "too long", "code": 400}}, 400)
        if body["stream"]:
            return StreamingResponse(self._events(prompt, body, broken), media_type="text/event-stream")
        return JSONResponse({"choices": [self._whole(prompt, body)]})

    async def _events(self, prompt: Prompt, body: dict[str, Any], broken: str | None) -> AsyncIterator[str]:
        if broken == "reset":
            raise ConnectionResetError
        complete = False
        try:
            generator = copy.copy(self.generator)
            if body.get("ignore_eos"):
                generator.eos_ids = frozenset()
            for event in stream(generator, prompt, options_of(body)):
                finish = event.finish_reason
                text = event.text + "\u2028\u2029\x85"  # as an answer may hold them; vLLM escapes none of them
                choice = {"index": 0, "text": text, "token_ids": [event.token_id], "finish_reason": finish}
                yield f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n"
                if broken == "cut":
                    raise ConnectionResetError
                await asyncio.sleep(self.token_s)
            complete = True
            yield "data: [DONE]\n\n"
        finally:
            self.cancelled += not complete

    def _whole(self, prompt: Prompt, body: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece with log-probabilities, tokens named as `return_tokens_as_token_ids` has it."""
        ids = [event.token_id for event in stream(self.generator, prompt, options_of(body))]
        answer = torch.tensor(ids)
        memory_mask = torch.cat([prompt.memory_mask, torch.zeros(len(ids), dtype=torch.bool)])
        spliced = self.generator.splice(torch.cat([prompt.ids, answer])[None], memory_mask[None], prompt.memory)
        with torch.inference_mode():
            logits = self.generator.model(inputs_embeds=spliced).logits[0, prompt.tokens - 1 : -1]
        tops = logits.float().log_softmax(-1).topk(body["logprobs"], dim=-1)
        top_logprobs = [
            {f"token_id:{token}": value for token, value in zip(tokens, values, strict=True)}
            for tokens, values in zip(tops.indices.tolist(), tops.values.tolist(), strict=True)
        ]
        return {"index": 0, "text": "", "token_ids": ids, "logprobs": {"top_logprobs": top_logprobs}}


def prompt_of(body: dict[str, Any]) -> Prompt:
    """The prompt in a completion's body, read with the very call that vLLM reads it with."""
    if "prompt" in body:
        ids = torch.tensor(body["prompt"])
        return Prompt(ids, torch.zeros(len(ids), dtype=torch.bool), torch.zeros(0, 0))
    data = base64.b64decode(body["prompt_embeds"], validate=True)
    embeddings = torch.load(io.BytesIO(data), weights_only=True)
    assert embeddings.ndim == 2
    length = len(embeddings)
    return Prompt(torch.zeros(length, dtype=torch.int64), torch.ones(length, dtype=torch.bool), embeddings)


def options_of(body: dict[str, Any]) -> GenerationOptions:
    """The options that vLLM would sample with."""
    assert body["repetition_penalty"] == 1.0
    assert body["min_p"] == body["presence_penalty"] == body["frequency_penalty"] == 0.0
    assert body["return_token_ids"] is True
    return GenerationOptions(body["max_tokens"], body["temperature"], body["top_p"], body["top_k"], body["seed"])
