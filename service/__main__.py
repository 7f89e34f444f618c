"""`python -m service`: the command that starts the service. Every setting is also a flag."""

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from pydantic import SecretStr, ValidationError

from core.errors import ScaledownError
from service.exit_status import FAULT, SETTINGS, refuse_start
from service.listening import allow_connections, bind
from service.logs import configure_logging, take_over
from service.settings import PREFIX, Settings, check_environment, check_keys, explain, open_to_others
from service.tracing import configured

if TYPE_CHECKING:
    from service.checkpoints import CheckpointControl


log = logging.getLogger(__name__)


def _is_secret(kind: Any) -> bool:
    return kind is SecretStr or any(map(_is_secret, get_args(kind)))


# No flags: the list of processes shows those to every user of the machine.
SECRETS = frozenset(name for name, field in Settings.model_fields.items() if _is_secret(field.annotation))
EPILOG = f"""
Every flag is also an environment variable: --max-passages is {PREFIX}MAX_PASSAGES. A flag wins.
Secrets come from the environment only: {PREFIX}API_KEYS (comma-separated) and {PREFIX}ADMIN_KEY, each plain or as
sha256:<hex of the key's SHA-256>, {PREFIX}GENERATOR_KEY and {PREFIX}DOCUMENT_CACHE_REDIS.

  python -m service                                         the shipped checkpoint, else an untrained model
  python -m service --checkpoint checkpoints/mine           your own
  curl -s localhost:8000/answer -H 'Content-Type: application/json' -d '{{"query": "When does iron melt?",
    "passages": ["Iron melts at 1538 degrees Celsius."]}}'

SIGTERM finishes what runs, within --drain-seconds, and exits with 0. SIGHUP looks again at what --checkpoint (a link,
say) points at, and changes to it without losing a request: all workers do, or none.
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line: one flag for each setting, its help from the setting's description."""
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="Serve answers from compressed passages over HTTP: POST /answer, /rerank, /compress.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, field in Settings.model_fields.items():
        if name not in SECRETS:
            text = (field.description or "").replace("%", "%%")
            default = "" if field.default in (None, ()) else f" (default: {field.default})"
            parser.add_argument(
                f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, metavar="VALUE", help=text + default
            )
    return parser


def read_settings(arguments: Sequence[str]) -> Settings:
    """The settings of a command line and the environment. Raises ValidationError and ConfigError."""
    flags = vars(build_parser().parse_args(arguments))
    check_environment()
    settings = Settings(**{name: value for name, value in flags.items() if value != ""})  # empty: as if not given
    check_keys(settings)
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; the exit status."""
    flags = sys.argv[1:] if arguments is None else arguments
    try:
        settings = read_settings(flags)
        configured(settings)
    except (ValidationError, ScaledownError) as error:
        print(explain(error), file=sys.stderr)
        return SETTINGS
    configure_logging(settings.log_level)
    if open_to_others(settings):
        log.warning(f"no key is asked for: set {PREFIX}API_KEYS unless all who reach this address may call")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is something to follow a link with, it would kill
    allow_connections()
    try:
        sockets = bind(settings.host, settings.port)
    except ScaledownError as error:
        return refuse_start(error)
    if settings.workers > 1:
        from service.supervisor import supervise

        return supervise(settings, flags, sockets)
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)  # one process keeps its metrics in memory
    return serve(settings, sockets)


def serve(settings: Settings, sockets: list[socket.socket], checkpoints: "CheckpointControl | None" = None) -> int:
    """Serve in this process until told to stop; the exit status. Workers share who decides on `checkpoints`."""
    # Late: --help should not take seconds. Every line of the log is JSON, also torch's, which what follows may cause.
    import torch  # noqa: F401  # sets up its log when it is imported

    take_over("torch")
    from transformers.utils.logging import disable_progress_bar

    from service.app import create_app
    from service.server import Server

    disable_progress_bar()
    try:
        Server(create_app(settings, checkpoints=checkpoints), settings).run(sockets)
    except ScaledownError as error:
        return refuse_start(error)
    except Exception:
        log.critical("the service ends by a fault of its own", exc_info=True)
        return FAULT
    return 0


if __name__ == "__main__":
    sys.exit(main())
