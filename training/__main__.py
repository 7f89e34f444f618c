"""`python -m training COMMAND`: one command a step, each a module with `add_arguments` and `run`."""

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from core.errors import ScaledownError

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0 done, 1 something to mend, which is printed, 2 wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="python -m training",
        usage="%(prog)s COMMAND [--help] ...",
        description="From raw data to a checkpoint that the service loads.",
        epilog="commands, in their order:\n"
        + "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    name = parser.parse_args(given[:1]).command
    command = importlib.import_module(f"training.{name}")
    options = argparse.ArgumentParser(prog=f"python -m training {name}", description=COMMANDS[name])
    command.add_arguments(options)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    try:
        # Intermixed, so that overrides may stand behind options.
        command.run(options.parse_intermixed_args(given[1:]))
    except ScaledownError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
