"""JSON log lines that carry the request id and never a passage, a query or a key. Knows no HTTP."""

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any

_request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_trace_id: ContextVar[str | None] = ContextVar("trace_id", default=None)
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message"}


def current_request_id() -> str | None:
    """The id of the request that is being served by this task."""
    return _request_id.get()


def set_request_id(request_id: str) -> None:
    """Name the request that this task serves, for log lines and errors."""
    _request_id.set(request_id)


def set_trace_id(trace_id: str) -> None:
    """Name the trace that the request of this task belongs to, for log lines."""
    _trace_id.set(trace_id)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, worker, request, trace, and whatever `extra=` carries."""

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._worker,
        }
        if current_request_id():
            line["request_id"] = current_request_id()
        if _trace_id.get():
            line["trace_id"] = _trace_id.get()
        line |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging(level: str, worker: int | None = None) -> None:
    """Send every log line of this process to standard error as JSON. The command calls it, never an import.

    `worker` is this process's number where there are several.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(worker))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for noisy in ("uvicorn.access", "httpx"):  # every request is logged once, by our own middleware
        logging.getLogger(noisy).setLevel(logging.WARNING)


def take_over(library: str) -> None:
    """Send the lines of a library that writes to standard error by itself the way of all others, once imported."""
    logger = logging.getLogger(library)
    logger.handlers.clear()
    logger.propagate = True
