"""With what status the service's process ends, for whatever started it: docs/operate.md lists them. Knows no HTTP."""

import logging

from core.errors import ConfigError, ScaledownError

log = logging.getLogger(__name__)
FAULT = 1  # a defect of ours, with a traceback in the log
SETTINGS = 2  # a setting is wrong: started again it would end so again
REFUSED = 3  # a checkpoint, a base model or the port cannot be used, which may pass


def refuse_start(error: ScaledownError) -> int:
    """Say in one line why the service cannot start; the status to exit with."""
    log.critical("the service cannot start", extra={"reason": error.message})
    return SETTINGS if isinstance(error, ConfigError) else REFUSED


def shell_status(status: int) -> int:
    """What a shell makes of a process's end: one that signal 9 killed, as where memory runs out, ended with 137."""
    return 128 - status if status < 0 else status
