"""Calls to the replicas, made again where a replica died. Lives on the ingress's event loop. Knows no HTTP."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from core.compressed import CompressedChunk
from core.errors import CheckpointError, EngineError, ScaledownError
from core.prompts import Prompt
from core.rows import ChunkRow
from service.errors import GeneratorUnavailableError
from service.jobs import AnswerPlan, Delta, Finished

log = logging.getLogger(__name__)
T = TypeVar("T")
# A request that ends every replica it is given to must not end them all.
ATTEMPTS = 4
PAUSE_S = 0.1  # before the second attempt; doubles
NOT_UP = "no replica is up"


@dataclass(frozen=True, slots=True)
class Written:
    """The end of an answer. `decode_s`: seconds from its first token to its last."""

    finished: Finished
    decode_s: float


class Fleet:
    """Handles of the two deployments. `generators` is None where a vLLM server writes the answers."""

    def __init__(self, compressors: Any, generators: Any | None) -> None:
        self._compressors = compressors
        self._generators = generators

    async def compress(self, version: str, rows: Sequence[ChunkRow], request_id: str | None) -> list[CompressedChunk]:
        """What becomes of `rows`, in their order. Raises ScaledownError."""
        handle = self._compressors.options(multiplexed_model_id=version)

        async def call() -> list[CompressedChunk]:
            response = handle.compress.remote(version, rows, request_id)
            try:
                chunks: list[CompressedChunk] = await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            return chunks

        return await _on_a_replica_that_lives(call)

    async def write(
        self, version: str, prompt: Prompt, plan: AnswerPlan, request_id: str | None
    ) -> AsyncGenerator[Delta | Written]:
        """An answer: its pieces if `plan` asks for them, then its end.

        Raises ScaledownError; GeneratorUnavailableError where the replica died after the first piece.
        """
        assert self._generators is not None  # who asks a vLLM server has no use for this
        handle = self._generators.options(multiplexed_model_id=version, stream=True)
        stream: Any = None

        async def begin() -> Delta | Written:
            nonlocal stream
            stream = handle.write.remote(version, prompt, plan, request_id)
            first: Delta | Written = await anext(stream)
            return first

        try:
            event = await _on_a_replica_that_lives(begin)
            yield event
            while not isinstance(event, Written):
                event = await anext(stream)
                yield event
        except RayActorError:
            raise GeneratorUnavailableError("the replica that wrote this answer has ended: ask again") from None
        except RayTaskError as error:
            raise own_error(error) from None
        except (asyncio.CancelledError, GeneratorExit):
            if stream is not None:
                stream.cancel()
            raise

    async def prepare(self, version: str) -> None:
        """Have every replica that is up load `version`, unless it has it. New requests may begin on it then.

        Raises GeneratorUnavailableError where a deployment has no replica, CheckpointError where one refuses.
        """
        handles = [handle for handle in (self._compressors, self._generators) if handle is not None]
        await asyncio.gather(*(_prepare(handle, version) for handle in handles))


async def _prepare(handle: Any, version: str) -> None:
    try:
        outcomes = await handle.broadcast("prepare", version).results_async(return_exceptions=True)
    except (DeploymentUnavailableError, RayError):
        raise GeneratorUnavailableError(NOT_UP) from None
    # Those that died meanwhile have nothing to say; what is started in their place loads the version itself.
    outcomes = [outcome for outcome in outcomes if not isinstance(outcome, RayActorError)]
    if not outcomes:
        raise GeneratorUnavailableError(NOT_UP)
    for outcome in outcomes:
        if isinstance(outcome, RayTaskError):
            error = own_error(outcome)
            raise error if isinstance(error, CheckpointError) else CheckpointError(f"{version}: {error.message}")
        if isinstance(outcome, BaseException):
            raise CheckpointError(f"{version}: could not be loaded ({type(outcome).__name__})")


async def _on_a_replica_that_lives(call: Callable[[], Awaitable[T]]) -> T:
    """Make a call that may be repeated. Raises ScaledownError."""
    for attempt in range(ATTEMPTS):
        try:
            return await call()
        except RayActorError:
            log.warning("a replica died under a request, which is sent to another", extra={"attempt": attempt + 1})
            await asyncio.sleep(PAUSE_S * 2**attempt)
        except RayTaskError as error:
            raise own_error(error) from None
        except DeploymentUnavailableError:
            raise GeneratorUnavailableError(NOT_UP) from None
    log.error("a request is given up: every replica that had it died")
    raise EngineError("the engine failed")


def own_error(error: RayTaskError) -> ScaledownError:
    """What a replica raised, without what Ray adds to it; anything that is not ours goes to the log only."""
    if isinstance(error.cause, ScaledownError):
        return error.cause
    log.error("a replica failed", exc_info=error)
    return EngineError("the engine failed")
