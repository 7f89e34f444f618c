"""Every call as a pure value: what is sent, and how its response is read. Knows no sockets.

`Client` and `AsyncClient` share all of this and differ only in how they wait.
"""

import json
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Generic, Literal, TypedDict, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from service.client.errors import (
    OverloadedError,
    ProtocolError,
    ServiceError,
    UnreachableError,
    response_error,
    stream_error,
)
from service.client.results import (
    Answer,
    Checkpoints,
    Compression,
    Done,
    Mode,
    Passage,
    PassagesRead,
    Ranking,
    Readiness,
    StreamEvent,
    Token,
)

T = TypeVar("T")
Passages = Sequence[str | Passage]
CheckpointAction = Literal["load", "activate", "rollback"]
FIRST_WAIT_S = 0.5


class AnswerOptions(TypedDict, total=False):
    """What `answer` and `stream` take beyond query and passages; left out or None: the service's default."""

    mode: Mode | None
    hybrid_top: int | None
    max_prompt_tokens: int | None
    min_relevance: float | None
    rate: int | None
    hops: Literal[1, 2] | None  # 2: for questions that need two passages
    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: list[str] | None
    explain: bool | None
    timeout: float | None  # the request's deadline in the service, in seconds


class CompressOptions(TypedDict, total=False):
    """What `compress` takes beyond query and passages."""

    rate: int | None
    hops: Literal[1, 2] | None
    dtype: Literal["float32", "float16"] | None
    store: bool | None
    explain: bool | None
    timeout: float | None


class RerankOptions(TypedDict, total=False):
    """What `rerank` takes beyond query and passages."""

    top_n: int | None
    hops: Literal[1, 2] | None
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Retry:
    """When to ask again after 429, 502, 503 or a refused connection. All calls are safe to repeat.

    attempts     how often to ask in all
    max_wait_s   longest wait; a service that asks for a longer one is not asked again
    """

    attempts: int = 3
    max_wait_s: float = 30.0

    def wait(self, tried: int, error: ServiceError) -> float | None:
        """Seconds to wait after `tried` attempts, the last of which ended in `error`; None: give up."""
        again = isinstance(error, OverloadedError) or (isinstance(error, UnreachableError) and not error.sent)
        if not again or tried >= self.attempts:
            return None
        asked = error.retry_after_s if isinstance(error, OverloadedError) else None
        if asked is not None:
            # Coming back sooner than asked would only add to the load.
            return asked if asked <= self.max_wait_s else None
        return float(min(self.max_wait_s, FIRST_WAIT_S * 2 ** (tried - 1) * random.uniform(0.75, 1.25)))


DEFAULT_RETRY = Retry()


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request and the reader of its response.

    accepted    statuses that are answers, not errors
    patient     however long the service takes, within limits of its own
    """

    method: Literal["GET", "POST"]
    path: str
    read: Callable[[bytes], T]
    body: Mapping[str, Any] | None = None
    admin: bool = False
    accepted: tuple[int, ...] = (200,)
    patient: bool = False

    def result(self, status: int, headers: Mapping[str, str], content: bytes) -> T:
        """The typed result of a response. Raises ResponseError and ProtocolError."""
        if status not in self.accepted:
            raise response_error(status, headers, content)
        return self.read(content)


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one service."""

    api: str | None = None
    admin: str | None = None

    def headers(self, call: Call[Any]) -> dict[str, str]:
        """Authorization of a call, if there is a key for it."""
        key = self.admin if call.admin else self.api
        return {"Authorization": f"Bearer {key}"} if key is not None else {}


def answer_call(query: str, passages: Passages, options: AnswerOptions) -> Call[Answer]:
    """Answer a query from passages."""
    if "stream" in options:  # an option elsewhere; its response would be none of an Answer
        raise TypeError("stream: call `stream` for an answer in pieces")
    return Call("POST", "/answer", _reader(Answer), _body(query, passages, options))


def stream_call(query: str, passages: Passages, options: AnswerOptions) -> Call[Answer]:
    """The same as a stream: read its body with an `EventReader`."""
    return Call("POST", "/answer", _reader(Answer), {**_body(query, passages, options), "stream": True})


def compress_call(query: str, passages: Passages, options: CompressOptions) -> Call[Compression]:
    """Compress passages for a query."""
    return Call("POST", "/compress", _reader(Compression), _body(query, passages, options))


def rerank_call(query: str, passages: Passages, options: RerankOptions) -> Call[Ranking]:
    """Put passages in order of their relevance to a query."""
    return Call("POST", "/rerank", _reader(Ranking), _body(query, passages, options))


def ready_call() -> Call[Readiness]:
    """Whether the service takes requests. Not being ready is an answer, no error."""
    return Call("GET", "/readyz", _read_readiness, accepted=(200, 503))


def checkpoints_call() -> Call[Checkpoints]:
    """The versions there are."""
    return Call("GET", "/admin/checkpoints", _reader(Checkpoints), admin=True)


def change_call(action: CheckpointAction, name: str | None = None) -> Call[Checkpoints]:
    """Load a checkpoint, serve it, or go back to the one before. A large one takes minutes."""
    body = {"action": action} if name is None else {"action": action, "name": name}
    return Call("POST", "/admin/checkpoints", _reader(Checkpoints), body, admin=True, patient=True)


class EventReader:
    """Takes the bytes of a stream however they are cut, gives its events."""

    def __init__(self) -> None:
        self._rest = b""
        self._done = False

    def feed(self, data: bytes) -> Iterator[StreamEvent]:
        """Events that `data` completes. Raises ResponseError for the service's `error` event, and ProtocolError."""
        # Split as bytes: in text, U+2028 and others inside of the JSON would count as line ends.
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        for block in blocks:
            lines = [line.partition(b": ") for line in block.split(b"\n") if not line.startswith(b":")]
            found = {name: value for name, _, value in lines}
            if found:
                event = _event(found.get(b"event", b""), found.get(b"data", b""))
                self._done = isinstance(event, Done)
                yield event

    def close(self) -> None:
        """Call at the end of the body. Raises ProtocolError where the answer was not complete."""
        if not self._done:
            raise ProtocolError("the stream ended before the answer was complete")


def _event(name: bytes, data: bytes) -> StreamEvent:
    match name:
        case b"passages":
            return _reader(PassagesRead)(data)
        case b"token":
            return _reader(Token)(data)
        case b"done":
            return Done(_reader(Answer)(data))
        case b"error":
            try:
                error = stream_error(json.loads(data)["error"])
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ProtocolError("an error event without its reason") from None
            raise error
        case _:
            raise ProtocolError(f"an event that the service does not send: {name.decode('utf-8', 'replace')[:40]!r}")


def _body(query: str, passages: Passages, options: Mapping[str, Any]) -> dict[str, Any]:
    """What is no passage, or no list of them, is sent as it is, and the service says where it is wrong.

    One text is no list of them: each of its characters would be a passage.
    """
    listed = passages if isinstance(passages, str | Mapping) else [_passage(passage) for passage in passages]
    given = {name: value for name, value in options.items() if value is not None}
    return {**given, "query": query, "passages": listed}


def _passage(passage: str | Passage) -> Any:
    if not isinstance(passage, Passage):
        return passage
    return {name: value for name, value in asdict(passage).items() if value is not None and (value or name != "title")}


@cache  # building one takes longer than reading a response with it
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(type[Any], kind))


def _reader(kind: type[T]) -> Callable[[bytes], T]:
    def read(content: bytes) -> T:
        try:
            found: T = _adapter(cast(Hashable, kind)).validate_json(content)
            return found
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "body"
            raise ProtocolError(f"the response is no {kind.__name__}: {where}: {first['msg']}") from None

    return read


def _read_readiness(content: bytes) -> Readiness:
    try:
        found = dict(json.loads(content))
        return Readiness(found["status"] == "ready", found["status"], found.get("checkpoint"), found.get("trained"))
    except (ValueError, KeyError, TypeError):
        raise ProtocolError("the response is no Readiness") from None
