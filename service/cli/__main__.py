"""`scaledown COMMAND`, also `python -m service.cli`: which commands there are, and what their errors mean to a shell.

A command is a module with `choose_parser(arguments, prog)` and `main(arguments, prog)`, imported when it is asked for.
`train` is found by its entry point in the group `scaledown.commands`, so that nothing here imports `training`.
"""

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from core.errors import InputError, ScaledownError
from service.cli.completion import complete
from service.client.errors import (
    AuthenticationError,
    DeadlineError,
    InvalidRequestError,
    OverloadedError,
    ServiceError,
    UnreachableError,
)

Parsers = tuple[argparse.ArgumentParser, Sequence[str]]
COMMANDS = {
    "serve": ("service.cli.serve", "start the service"),
    "answer": ("service.cli.answer", "answer a question from passages"),
    "compress": ("service.cli.compress", "compress passages for a question into embeddings"),
    "rerank": ("service.cli.rerank", "put passages in order of their relevance to a question"),
    "train": ("", "from raw data to a checkpoint: prepare, label, train, evaluate, export, ..."),
    "checkpoints": ("service.cli.checkpoints", "list, load, activate, roll back, inspect and verify checkpoints"),
    "bench": ("service.cli.bench", "measure the engine, the service under load, and how costs grow"),
    "completion": ("service.cli.completion", "print what makes a shell complete these commands"),
}
EPILOG = """
A running service is asked, at --url or SCALEDOWN_URL (default: http://127.0.0.1:8000); with --checkpoint the model is
loaded into the command itself. Keys come from SCALEDOWN_API_KEY and SCALEDOWN_ADMIN_KEY only.

  scaledown answer "When does tin melt?" "Tin melts at 232 degrees." "Iron melts at 1538 degrees."
  scaledown rerank "When does tin melt?" --input passages.jsonl --json
  scaledown answer --input questions.jsonl --json > answers.jsonl
  eval "$(scaledown completion bash)"

exit status: 0 done, 1 failed, 2 wrong usage or input, 3 the service cannot be reached, 4 the key is missing or not
valid, 5 no room or time now: try again later, 130 stopped
"""
STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (UnreachableError, 3),
    (AuthenticationError, 4),
    (OverloadedError, 5),
    (DeadlineError, 5),
    (InvalidRequestError, 2),
    (InputError, 2),
)


def choose_parser(arguments: Sequence[str], prog: str = "scaledown") -> Parsers:
    """The parser of the command that `arguments` name, and what is left for it to read."""
    if arguments and arguments[0] in COMMANDS:
        parser, rest = load(arguments[0]).choose_parser(arguments[1:], f"{prog} {arguments[0]}")
        return parser, rest
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s COMMAND [--help] ...",
        description="Retrieval-augmented generation from compressed passages.",
        epilog=f"commands:\n{listed}\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("scaledown"))
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser, arguments


def load(name: str) -> Any:
    """The module of a command. Raises ScaledownError where it, or what it needs, is not installed."""
    module, _ = COMMANDS[name]
    try:
        return importlib.import_module(module or _registered(name))
    except ModuleNotFoundError as error:
        extra = "training" if name == "train" else "service"
        raise ScaledownError(f"{name} needs {error.name}: pip install '.[{extra}]' in the repository") from None


def _registered(name: str) -> str:
    """The module that is installed under that name. All metadata counts: an old build may lie beside the newest."""
    for distribution in importlib.metadata.distributions(name="scaledown"):
        for entry in distribution.entry_points.select(group="scaledown.commands", name=name):
            return entry.value
    raise ScaledownError(f"{name} is not registered: pip install scaledown, or that of this folder, again")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    if "_ARGCOMPLETE" in os.environ:
        complete(choose_parser)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] not in COMMANDS:
        choose_parser([])[0].parse_args(given)  # --help, --version, or an error: this ends the process
    return guarded(lambda: int(load(given[0]).main(given[1:], f"scaledown {given[0]}")))


def guarded(run: Callable[[], int]) -> int:
    """Run it; say in one line on standard error what went wrong."""
    try:
        status = run()
        sys.stdout.flush()
        return status
    except (ScaledownError, ServiceError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return next((status for kind, status in STATUSES if isinstance(error, kind)), 1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has had enough. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
