"""Typed clients of the service, sync and async. Needs httpx and pydantic, not torch.

with Client("http://127.0.0.1:8000") as client:
    answer = client.answer("Which metal melts first?", ["Iron melts at 1538 °C.", "Tin melts at 232 °C."])
    print(answer.answer, answer.usage.tokens_saved)
"""

from service.client.asynchronous import AsyncClient
from service.client.blocking import Client
from service.client.calls import AnswerOptions, Passages, Retry
from service.client.connection import Connection
from service.client.errors import (
    AuthenticationError,
    DeadlineError,
    FailedError,
    InvalidRequestError,
    OverloadedError,
    ProtocolError,
    ResponseError,
    ServiceError,
    UnreachableError,
)
from service.client.results import (
    Answer,
    AnsweredPassage,
    Checkpoints,
    CompressedPassage,
    Compression,
    Done,
    Embeddings,
    Passage,
    PassagesRead,
    RankedPassage,
    Ranking,
    Readiness,
    RerankUsage,
    StreamEvent,
    Token,
    Usage,
)

__all__ = [
    "Answer",
    "AnswerOptions",
    "AnsweredPassage",
    "AsyncClient",
    "AuthenticationError",
    "Checkpoints",
    "Client",
    "CompressedPassage",
    "Compression",
    "Connection",
    "DeadlineError",
    "Done",
    "Embeddings",
    "FailedError",
    "InvalidRequestError",
    "OverloadedError",
    "Passage",
    "Passages",
    "PassagesRead",
    "ProtocolError",
    "RankedPassage",
    "Ranking",
    "Readiness",
    "RerankUsage",
    "ResponseError",
    "Retry",
    "ServiceError",
    "StreamEvent",
    "Token",
    "UnreachableError",
    "Usage",
]
