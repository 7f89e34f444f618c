"""From an error to a status and the one JSON shape of all errors. Knows HTTP, not what raised the error."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from core.errors import (
    CancelledError,
    CheckpointError,
    InputError,
    InvalidInputError,
    OverloadedError,
    ScaledownError,
    TooLargeError,
)
from service.logs import current_request_id
from service.unknown_fields import sent_for, shown


class DeadlineError(CancelledError):
    """The request's deadline passed before its answer was complete."""

    code = "deadline"


class StoppingError(CancelledError):
    """The service is shutting down and does not take or finish this request."""

    code = "stopping"


class ClientLeftError(CancelledError):
    """The client closed its connection before it had its answer."""

    code = "client_left"


class NotReadyError(ScaledownError):
    """The model is still being loaded or warmed, or the worker is dead."""

    code = "not_ready"


class PortError(ScaledownError):
    """The port is in use."""

    code = "port"


class GeneratorUnavailableError(ScaledownError):
    """The server that writes the answers is away, or cannot be used; `reason` is for the operator's log only."""

    code = "generator_unavailable"

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason or message


class UnsupportedError(ScaledownError):
    """The body is not JSON (`Content-Type`), or not in UTF-8."""

    code = "unsupported_media_type"


class UnknownModelError(InvalidInputError):
    """The request names a model that does not serve here."""

    code = "model_not_found"


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(description="stable, machine-readable name of the error", examples=["invalid_input"])
    message: str = Field(examples=["passages.0.text: is empty"])
    field: str | None = Field(description="part of the request that is at fault", examples=["passages.0.text"])
    limit: int | None = Field(description="the limit that was passed", examples=[None])
    request_id: str | None = Field(description="the X-Request-Id of this request", examples=["b9c1d4..."])


class ErrorResponse(BaseModel):
    """The body of every response that is not a success, and of the `error` event of a stream."""

    error: ErrorDetail


CLIENT_LEFT = 499  # nobody reads it: the number that proxies log for this
NOTHING_HERE = "there is nothing at this path: see /openapi.json"
OTHER_THAN_TEXT = "<object>"  # tag of what a union takes beside texts
STATUS_CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid_input",
    429: "overloaded",
    500: "internal",
    503: "unavailable",
}


DESCRIPTIONS = {
    401: "no key",
    403: "a key that is not valid",
    404: "there is nothing of this name",
    408: "the body came too slowly",
    409: "the checkpoint is refused, and nothing has changed",
    413: "over a limit, which `limit` gives",
    415: "not application/json in UTF-8, or not as it is (Content-Encoding)",
    422: "a value is wrong; `field` says which",
    429: "no room now; see Retry-After",
    500: "the service failed",
    503: "not ready, or shutting down",
    504: "the deadline passed",
}
RETRY_AFTER = {"description": "seconds, where the service knows", "schema": {"type": "integer"}}
WITH_BODY = (401, 403, 408, 413, 415, 422, 429, 500, 503)  # what any path may answer to a body


class JSONError(JSONResponse):
    """An error that is sent; it leaves `code` in the request's state, where `RequestContext` finds it to count it."""

    def __init__(
        self, content: dict[str, Any], status: int, headers: Mapping[str, str] | None = None, code: str | None = None
    ) -> None:
        super().__init__(content, status, headers)
        self._detail = content["error"]
        self._code: str = code or self._detail["code"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        note_error(scope, self._code, self._detail)
        await super().__call__(scope, receive, send)


def note_error(scope: Scope, code: str, detail: Mapping[str, Any] | None = None) -> None:
    """Have the request counted as one that ended in this error, and logged with the limit that it is over.

    Without a limit the field is not logged: an unknown one is named as the caller has it.
    """
    over = {name: detail[name] for name in ("field", "limit")} if detail and detail["limit"] is not None else {}
    scope.setdefault("state", {}).update(error_code=code, error_over=over)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of an operation, for the OpenAPI document."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": DESCRIPTIONS[status]} for status in sorted(statuses)
    }
    for status in found.keys() & {429, 503}:
        found[status]["headers"] = {"Retry-After": RETRY_AFTER}
    return found


def error_body(code: str, message: str, field: str | None = None, limit: int | None = None) -> dict[str, Any]:
    """The one JSON shape of an error."""
    detail = {"code": code, "message": message, "field": field, "limit": limit, "request_id": current_request_id()}
    return {"error": detail}


def error_content(error: Exception) -> dict[str, Any]:
    """The JSON of any exception; of one that is not ours, nothing but that it happened."""
    if not isinstance(error, ScaledownError) or status_of(error) == 500:
        return error_body("internal", "the service failed; the request id finds the reason in its log")
    field = error.field if isinstance(error, InputError) else None
    limit = error.limit if isinstance(error, TooLargeError) else None
    return error_body(error.code, error.message, field, limit)


def code_of(error: Exception) -> str:
    """The name an error is counted by; what a caller may not know of (`engine`) it tells the operator."""
    return error.code if isinstance(error, ScaledownError) else "internal"


def status_of(error: Exception, overload_status: int = 429) -> int:
    """The HTTP status of an error."""
    match error:
        case TooLargeError():
            return 413
        case UnknownModelError():
            return 404
        case InputError():
            return 422
        case UnsupportedError():
            return 415
        case OverloadedError():
            return overload_status
        case DeadlineError():
            return 504
        case ClientLeftError():
            return CLIENT_LEFT
        case CancelledError() | NotReadyError() | GeneratorUnavailableError():
            return 503
        case CheckpointError():  # only /admin meets it: a checkpoint was named that cannot be used
            return 409
        case _:
            return 500


def error_response(error: Exception, overload_status: int = 429) -> JSONError:
    """The whole response to an error, with Retry-After where trying again can help."""
    status = status_of(error, overload_status)
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, round(error.retry_after_s)))
    elif status == 503:
        headers["Retry-After"] = "5"
    return JSONError(error_content(error), status, headers, code_of(error))


def plain_response(status: int, message: str, headers: Mapping[str, str] | None = None, **where: Any) -> JSONError:
    """The response to what HTTP itself refuses: no such path, a wrong method, a missing key."""
    return JSONError(error_body(STATUS_CODES.get(status, "error"), message, **where), status, headers)


def validation_error(errors: Sequence[Mapping[str, Any]], body: Any) -> dict[str, Any]:
    """The JSON of pydantic's findings in `body`: the first one, in our words and without the caller's own values."""
    first = errors[0]
    context = first.get("ctx") or {}
    if first["type"] == "json_invalid":
        return error_body("invalid_json", f"the body is not JSON: {context.get('error', 'malformed')}", "body")
    place, inside = _place(first, body)
    if first["type"] in ("missing", "unknown_field"):
        place.append(context.get("name") or str(first["loc"][-1]))
    field = ".".join(place) or "body"
    message = f"{field}: {_in_our_words(first, context, inside)}"
    return error_body("invalid_input", message, field, context.get("max_length"))


def _place(problem: Mapping[str, Any], body: Any) -> tuple[list[str], Any]:
    """Where it is, by the names and indices of the body itself, and what is there.

    Pydantic also names the branches of its unions, which are passed over.
    """
    place, inside = [], body
    for part in problem["loc"][1:]:
        parts = inside if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
        if part in parts:
            inside = inside[part]
            place.append(shown(str(part)))
    return place, inside


def _in_our_words(problem: Mapping[str, Any], context: Mapping[str, Any], inside: Any) -> str:
    unit = "characters" if isinstance(problem.get("input"), str) else "items"
    or_text = "a text or " if problem["loc"][-1] == OTHER_THAN_TEXT else ""
    match problem["type"]:
        case "missing":
            sent = sent_for(str(problem["loc"][-1]), inside) if isinstance(inside, dict) else None
            return "is required" if sent is None else f"is required; {sent} is not read"
        case "too_short" | "string_too_short":
            return f"has too few {unit}: give at least {context['min_length']}"
        case "too_long" | "string_too_long":
            return f"is over the limit of {context['max_length']} {unit}"
        case "model_type" | "model_attributes_type":
            return f"must be {or_text}an object"
        case "list_type":
            return f"must be {or_text}a list"
        case "value_error":
            return str(context["error"])
        case _:
            return str(problem["msg"]).replace("Input should", "must", 1)
