"""`python -m service`: the command that starts the service. Every setting is also a flag."""

import argparse
import asyncio
import logging
import signal
import sys
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from core.errors import ScaledownError
from service.logs import configure_logging
from service.settings import PREFIX, Settings, check_environment

log = logging.getLogger(__name__)
SECRETS = ("api_keys", "admin_key")  # not flags: the list of processes shows those to every user of the machine
EPILOG = f"""
Every flag is also an environment variable: --max-passages is {PREFIX}MAX_PASSAGES. A flag wins.
Keys come from the environment only: {PREFIX}API_KEYS (comma-separated) and {PREFIX}ADMIN_KEY, each plain or as
sha256:<hex of the key's SHA-256>.

  python -m service                                         the shipped checkpoint, else an untrained model
  python -m service --checkpoint checkpoints/mine           your own
  curl -s localhost:8000/answer -H 'Content-Type: application/json' -d '{{"query": "When does iron melt?",
    "passages": ["Iron melts at 1538 degrees Celsius."]}}'

SIGTERM finishes what runs, within --drain-seconds, and exits with 0. SIGHUP looks again at what --checkpoint (a link,
say) points at, and changes to it without losing a request.
"""


class Server(uvicorn.Server):
    """uvicorn's server with our shutdown: running requests get a limit, the rest a clear error, the exit code is 0."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, drain_seconds: float) -> None:
        super().__init__(config)
        self._app = app
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Note the loop for signals, then start as usual."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._loop.add_signal_handler(signal.SIGHUP, self._follow_link)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop admitting at once; a second Ctrl-C stops without waiting. The signal is not raised again at the end."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        if not self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._drain)
        self.should_exit = True

    def _follow_link(self) -> None:
        self._following = asyncio.create_task(self._app.state.checkpoints.follow_link())

    def _drain(self) -> None:
        engine = getattr(self._app.state, "engine", None)
        if engine is not None:
            log.info("draining", extra={"requests": engine.gate.requests})
            self._draining = asyncio.create_task(engine.drain(self._drain_seconds))


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
            default = "" if field.default is None else f" (default: {field.default})"
            parser.add_argument(
                f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, metavar="VALUE", help=text + default
            )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Serve until told to stop; the exit status."""
    given = vars(build_parser().parse_args(arguments))
    try:
        check_environment()
        settings = Settings(**given)
    except ValidationError as error:
        for problem in error.errors():
            print(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}", file=sys.stderr)
        return 2
    except ScaledownError as error:
        print(error.message, file=sys.stderr)
        return 2
    configure_logging(settings.log_level)
    # Late: these import torch, and --help should not take seconds.
    from transformers.utils.logging import disable_progress_bar

    from service.app import create_app

    disable_progress_bar()  # every line of the log is JSON
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        # Ours comes first: it answers what it cannot finish. This one is for connections that never end.
        timeout_graceful_shutdown=int(settings.drain_seconds) + 5,
        h11_max_incomplete_event_size=64 * 1024,
    )
    Server(config, app, settings.drain_seconds).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
