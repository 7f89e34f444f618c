"""What goes wrong between a client and the service, as exceptions.

ServiceError
├── UnreachableError         no response: refused, broken or timed out
├── ProtocolError            a response that is not the service's
└── ResponseError            the service said no; code, field, request_id and status say what and where
    ├── InvalidRequestError      the request cannot be served as it stands (400, 404, 405, 409, 413, 415, 422)
    ├── AuthenticationError      no key, or not a valid one (401, 403)
    ├── OverloadedError          no room, not ready or no generator: later or elsewhere (429, 502, 503)
    ├── DeadlineError            the request's deadline passed (408, 504)
    └── FailedError              the service failed (any other)

What a proxy says in the service's place is one of these, too, with the code `proxy` (429, 502, 503: OverloadedError;
504: DeadlineError).
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any


class ServiceError(Exception):
    """Base of everything this client raises on purpose. Can be pickled, as a pool of processes does."""

    def __reduce__(self) -> tuple[Any, ...]:
        # What Exception does calls the class with `args`, the message: not what these are made with.
        return _restored, (type(self), self.args, self.__dict__)


class UnreachableError(ServiceError):
    """There was no response. `sent` is false where the request cannot have reached the service."""

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class ProtocolError(ServiceError):
    """What came back is not what the service answers: something else listens there, or a stream broke off."""


class ResponseError(ServiceError):
    """An error the service reported.

    status          HTTP status; that of an error inside a stream is 200
    code            stable, machine-readable name
    field, limit    part of the request that is at fault, and the limit it passed
    request_id      finds the request in the service's log
    retry_after_s   seconds after which the service wants to be asked again
    """

    def __init__(self, status: int, detail: Mapping[str, Any], retry_after_s: float | None = None) -> None:
        self.status = status
        self.code = str(detail.get("code", "unknown"))
        self.message = str(detail.get("message", "the service gave no reason"))
        self.field: str | None = detail.get("field")
        self.limit: int | None = detail.get("limit")
        self.request_id: str | None = detail.get("request_id")
        self.retry_after_s = retry_after_s
        super().__init__(f"{self.message} [{self.code}, status {status}, request {self.request_id}]")


class InvalidRequestError(ResponseError):
    """The request cannot be served as it stands."""


class AuthenticationError(ResponseError):
    """No key, or one that is not valid there."""


class OverloadedError(ResponseError):
    """No room now, the service is not ready or has no generator: try again later or elsewhere."""


class DeadlineError(ResponseError):
    """The request's deadline passed before it was served."""


class FailedError(ResponseError):
    """The service failed; the request itself may be good."""


BY_STATUS: dict[int, type[ResponseError]] = {
    **dict.fromkeys((400, 404, 405, 409, 413, 415, 422), InvalidRequestError),
    **dict.fromkeys((401, 403), AuthenticationError),
    **dict.fromkeys((429, 502, 503), OverloadedError),
    **dict.fromkeys((408, 504), DeadlineError),
}
# In a stream the status is gone before the error comes: its code says what it would have been.
BY_CODE: dict[str, type[ResponseError]] = {
    **dict.fromkeys(("invalid_input", "too_large"), InvalidRequestError),
    **dict.fromkeys(("overloaded", "not_ready", "stopping", "generator_unavailable"), OverloadedError),
    "deadline": DeadlineError,
}


# The statuses of proxies and balancers that cannot reach a service, or will not now: their bodies are their own.
PROXY = (429, 502, 503, 504)


def response_error(status: int, headers: Mapping[str, str], content: bytes) -> ServiceError:
    """The exception for a response that is no success. Header names in lower case."""
    kind, wait = BY_STATUS.get(status, FailedError), retry_after(headers.get("retry-after"))
    try:
        return kind(status, json.loads(content)["error"], wait)
    except (ValueError, KeyError, TypeError, AttributeError):
        message = f"status {status} without the service's error in its body"
    if status in PROXY:
        return kind(status, {"code": "proxy", "message": f"{message}: from a proxy before it"}, wait)
    return ProtocolError(f"{message}: is this its address?")


def stream_error(detail: Mapping[str, Any]) -> ResponseError:
    """The exception for the `error` event of a stream."""
    return BY_CODE.get(str(detail.get("code")), FailedError)(200, detail)


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for (a number or an HTTP date); None where it says nothing."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        then = parsedate_to_datetime(value)
    except ValueError:
        return None
    # An HTTP date is always in GMT; one parsed from "-0000" carries no zone.
    return max(0.0, (then.replace(tzinfo=then.tzinfo or UTC) - (now or datetime.now(UTC))).total_seconds())


def _restored(kind: type[ServiceError], args: tuple[Any, ...], state: dict[str, Any]) -> ServiceError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error
