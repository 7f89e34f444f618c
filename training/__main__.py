"""`python -m training COMMAND`: one command a step, each a module with `add_arguments` and `run`."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from core.errors import ScaledownError
from training.arguments import Parser

# Each is the module of its name. Imported when asked for: torch alone takes seconds.
COMMANDS = {
    "prepare": "raw questions and passages to rows in the data format, with negatives",
    "label": "a teacher's answers, logits and relevance scores for the rows",
    "init": "a fresh, untrained checkpoint of a base model",
    "pretrain": "teach a compressor on plain text first: repeat it, continue it",
    "train": "train the compressor and the generator's adapter",
    "benchmark": "training tokens a second of the loop beside a bare forward and backward",
    "evaluate": "text, hybrid and compressed side by side on the same questions",
    "calibrate": "a copy of a checkpoint whose relevance is a probability, with a threshold for no answer",
    "report": "plots and tables of evaluations and training runs",
    "export": "a run's best weights, or another checkpoint, to a checkpoint for the service",
}


def choose_parser(
    arguments: Sequence[str], prog: str = "python -m training"
) -> tuple[argparse.ArgumentParser, Sequence[str]]:
    """The parser of the command that `arguments` name, and what is left for it; else the one that lists them."""
    if arguments and arguments[0] in COMMANDS:
        name = arguments[0]
        options = Parser(prog=f"{prog} {name}", description=COMMANDS[name])
        importlib.import_module(f"training.{name}").add_arguments(options)
        return options, arguments[1:]
    width = max(map(len, COMMANDS))
    parser = Parser(
        prog=prog,
        usage="%(prog)s COMMAND [--help] ...",
        description="From raw data to a checkpoint that the service loads.",
        epilog="commands, in their order:\n"
        + "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser, arguments


def main(arguments: Sequence[str] | None = None, prog: str = "python -m training") -> int:
    """Run one command; the exit status: 0 done, 1 something to mend, which is printed, 2 wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser, rest = choose_parser(given, prog)
    if len(rest) == len(given):
        parser.parse_args(given[:1])  # --help, or an error: this ends the process
    command = importlib.import_module(f"training.{given[0]}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    try:
        # Intermixed, so that overrides may stand behind options.
        command.run(parser.parse_intermixed_args(rest))
    except ScaledownError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that cannot be made: to be mended outside of the program
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
