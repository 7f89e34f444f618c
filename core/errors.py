"""Every error ScaleDown raises on purpose, and nothing about how it is shown.

    ScaledownError
    ├── InputError                 the caller's request cannot be served as it stands
    │   ├── InvalidInputError      a value is wrong: empty, of the wrong type or shape
    │   └── TooLargeError          a value is over a limit: too many, too long
    ├── ConfigError                a configuration is contradictory or has unknown keys
    ├── BaseModelError             a base model cannot be found, fetched or recognised
    ├── CheckpointError            a checkpoint is incomplete, altered or does not fit
    ├── OverloadedError            no room now; try again after `retry_after_s`
    ├── CancelledError             the caller went away or a deadline passed
    └── EngineError                the engine failed; the request itself was good

Messages name the field and the limit and hold no file system paths of the server and no secrets,
except for the three that are shown to an operator: ConfigError, BaseModelError, CheckpointError.
"""

from typing import Any


class ScaledownError(Exception):
    """Base of all errors of this project.

    `code` is the stable, machine-readable name that stands in the service's JSON errors.
    """

    code = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        """By its attributes: an error may cross to another process, and constructors take more than a message."""
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[ScaledownError], args: tuple[Any, ...], attributes: dict[str, Any]) -> ScaledownError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(attributes)
    return error


class InputError(ScaledownError):
    """The caller's input cannot be served; `field` says which part, in dotted form (`passages.3.text`)."""

    code = "invalid_input"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field


class InvalidInputError(InputError):
    """A value is empty, of the wrong type, shape or encoding."""


class TooLargeError(InputError):
    """A value is over a limit; `limit` is that limit, in the unit the message names."""

    code = "too_large"

    def __init__(self, field: str, message: str, limit: int) -> None:
        super().__init__(field, message)
        self.limit = limit


class ConfigError(ScaledownError):
    """A configuration file or override is contradictory, malformed or has unknown keys."""

    code = "config"


class BaseModelError(ScaledownError):
    """A base model cannot be found, fetched, verified or read."""

    code = "base_model"


class CheckpointError(ScaledownError):
    """A checkpoint folder is incomplete, altered, unsafe, or was made for another base model."""

    code = "checkpoint"


class OverloadedError(ScaledownError):
    """There is no room for the request now; `retry_after_s` is the estimated wait in seconds."""

    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CancelledError(ScaledownError):
    """Work was stopped because the caller went away, a deadline passed or the service is stopping."""

    code = "cancelled"


class EngineError(ScaledownError):
    """The engine failed while serving a request that was itself good."""

    code = "engine"
