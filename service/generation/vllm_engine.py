"""Answers written by a vLLM server: prompts are spliced here, tokens come back over HTTP.

The worker's thread makes the request's body; everything else happens on the event loop, so that tokens never wait for
a compression batch. Text is made from tokens by the rules of `core.text_stream`, whoever wrote the tokens.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from functools import partial

from core.errors import CheckpointError, EngineError, OverloadedError
from core.model import Model
from core.prompts import Prompt
from core.text_stream import TextStream
from service.errors import GeneratorUnavailableError
from service.failures import shown
from service.generation.golden_answer import GoldenRequest, check_golden, golden_request
from service.generation.vllm_server import UNREACHABLE, VllmServer
from service.generation.vllm_wire import completion_fields, prompt_fields
from service.jobs import AnswerPlan, Delta, Failed, Finished, Job, Outbox

log = logging.getLogger(__name__)
NOT_REACHED = "the generator has not been reached yet"
NOT_OURS = "the generator does not serve this checkpoint"
NEVER = -1


class VllmEngine:
    """A `GeneratorEngine` over HTTP for one checkpoint version."""

    jobs = 0  # the worker's thread is not needed to write answers

    def __init__(self, model: Model, server: VllmServer, outbox: Outbox) -> None:
        self._trouble = NOT_REACHED
        self._verified_after = NEVER  # outages of the server, when it was last seen to have our weights
        self._failures_known = 0  # of the server, at that time
        self._logged = ""  # why it is away, as the log has it; nothing while it is there
        self._model = model
        self._own_tokens = model.generator.max_tokens  # positions that the model was made for
        self._golden_request: GoldenRequest | None = None
        self._server = server
        self._outbox = outbox
        self._tasks: dict[Job, asyncio.Task[None]] = {}  # the event loop's

    @property
    def trouble(self) -> str | None:
        """Why no answer can be written: the server is away, was not checked since, or serves other weights."""
        return None if self._verified_after == self._server.outages else self._trouble

    def add(self, job: Job, plan: AnswerPlan, prompt: Prompt) -> None:
        """Splice and send a prompt."""
        try:
            body = self._server.body(
                prompt_fields(self._model.generator, prompt)
                | completion_fields(plan.options, self._model.generator.eos_ids)
                | {"stream": True}
            )
        except Exception as error:
            job.end(Failed(shown(error, job)))
            return
        self._outbox.call(partial(self._begin, job, plan, body))

    def cancel(self, job: Job) -> None:
        """Close the job's stream, if it has one: vLLM stops writing then."""
        self._outbox.call(partial(self._stop, job))

    def advance(self) -> None:
        """Nothing is written in this thread."""

    async def verify(self) -> None:
        """See that the server is there and, at first or after something failed, that it has the checkpoint's weights.

        Where it was not away, answers go on meanwhile, and are stopped only if the golden one fails too.
        Raises GeneratorUnavailableError, and CheckpointError for other weights.
        """
        try:
            await self._server.probe()
            if self.trouble is not None or self._failures_known != self._server.failures:
                await self._verify_weights()
        except (GeneratorUnavailableError, OverloadedError) as error:
            if self.trouble is not None:
                self._trouble = error.message
                self._log_away(error)
            raise GeneratorUnavailableError(error.message) from None
        except (CheckpointError, EngineError) as error:
            if self._trouble != NOT_OURS:
                log.error("the generator is refused", extra={"url": self._server.url, "reason": error.message})
            self._trouble, self._logged = NOT_OURS, ""
            raise CheckpointError(error.message) from None

    def _log_away(self, error: GeneratorUnavailableError | OverloadedError) -> None:
        """Once for each state, not once for each look."""
        if self._logged != error.message:
            reason = error.reason if isinstance(error, GeneratorUnavailableError) else error.message
            extra = {"checkpoint": self._model.name, "url": self._server.url, "reason": reason}
            log.warning("no answers can be written: the generator is away", extra=extra)
        self._logged = error.message

    async def _verify_weights(self) -> None:
        outages, failures = self._server.outages, self._server.failures
        try:
            await self._ask_golden()
        except (GeneratorUnavailableError, CheckpointError, EngineError):
            if self.trouble is None:
                self._server.away()  # for other versions, too
            raise
        if self.trouble is not None:
            extra = {"checkpoint": self._model.name, "url": self._server.url}
            log.info("the generator is there and has this checkpoint's weights", extra=extra)
            self._logged = ""
        self._verified_after, self._failures_known, self._trouble = outages, failures, UNREACHABLE

    async def _ask_golden(self) -> None:
        await self._server.connect()
        if self._server.max_tokens is not None:  # it may serve shorter sequences than the model was made for
            self._model.generator.max_tokens = min(self._own_tokens, self._server.max_tokens)
        if self._golden_request is None:
            loop = asyncio.get_running_loop()
            self._golden_request = await loop.run_in_executor(None, golden_request, self._model)
        check_golden(self._golden_request, await self._server.complete(self._golden_request.fields))

    def _begin(self, job: Job, plan: AnswerPlan, body: bytes) -> None:
        if not job.done:
            self._tasks[job] = task = asyncio.get_running_loop().create_task(self._run(job, plan, body))
            task.add_done_callback(lambda _: self._tasks.pop(job, None))

    def _stop(self, job: Job) -> None:
        if job in self._tasks:
            self._tasks[job].cancel()

    async def _run(self, job: Job, plan: AnswerPlan, body: bytes) -> None:
        try:
            await self._write(job, plan, self._server.stream(body))
        except Exception as error:
            job.end(Failed(shown(error, job)))

    async def _write(self, job: Job, plan: AnswerPlan, stream: AsyncGenerator[list[int]]) -> None:
        """Carry the answer to its caller as it comes. Leaving early closes the stream, which stops vLLM."""
        text, written = TextStream(self._model.generator.tokenizer, plan.options.stop), ""
        async with contextlib.aclosing(stream) as chunks:
            async for token in (token async for chunk in chunks for token in chunk):
                job.mark("first_token")
                job.completion_tokens += 1
                ended = token in self._model.generator.eos_ids
                piece = "" if ended else text.push(token)
                last = ended or text.stopped or job.completion_tokens >= plan.options.max_new_tokens
                piece += text.finish() if last else ""
                written += piece
                if piece and plan.stream:
                    job.emit(Delta(piece))
                if last:
                    job.mark("decode")
                    reason = "stop" if ended or text.stopped else "length"
                    job.end(Finished(written, reason, job.completion_tokens))
                if text.stopped:
                    return
        if not job.done:
            raise self._server.failed("the generator broke off its answer")
