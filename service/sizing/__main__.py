"""`python -m service.sizing`: plan replicas for a traffic, or check the simulation behind it against real runs."""

import argparse
import sys
from pathlib import Path

from core.errors import ScaledownError
from service.sizing.calculator import PRICES
from service.sizing.commands import check_command, plan_command
from service.sizing.costs import MODES


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 1 where a check fails, 2 where something given is wrong."""
    options = parser().parse_args(arguments)
    try:
        if options.command == "plan":
            print(plan_command(options))
            return 0
        text, held = check_command(options)
    except ScaledownError as error:
        print(error.message, file=sys.stderr)
        return 2
    print(text)
    return 0 if held else 1


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    result = argparse.ArgumentParser(prog="python -m service.sizing", description=__doc__)
    commands = result.add_subparsers(dest="command", required=True)
    measured = argparse.ArgumentParser(add_help=False)
    measured.add_argument(
        "--measured", type=Path, help="JSON of `python -m service.benchmark engine`; default: a built-in one"
    )
    plan = commands.add_parser("plan", parents=[measured], help="replicas, memory and cost, compressed beside text")
    plan.add_argument("--rate", type=_positive, default=10.0, help="requests a second")
    plan.add_argument("--mode", choices=MODES, default="compressed")
    plan.add_argument("--passages", type=_count, default=10)
    plan.add_argument("--passage-tokens", type=_count, default=128)
    plan.add_argument("--query-tokens", type=_count, default=16)
    plan.add_argument("--new-tokens", type=_count, default=32, help="length of an answer")
    plan.add_argument("--latency", type=_positive, help="seconds that 95 %% of the answers may take")
    plan.add_argument("--busy", type=_share, default=0.7, help="share of its time that a replica may work, on average")
    plan.add_argument(
        "--instance",
        choices=sorted(PRICES),
        default="m7i.large",
        help="whose published price to take; one with an accelerator needs --measured of a run on it",
    )
    plan.add_argument("--price", type=_positive, help="US dollars an hour of one replica's machine, instead")
    check = commands.add_parser("check", parents=[measured], help="the simulation beside real runs")
    check.add_argument(
        "--load",
        type=Path,
        help="JSON of `python -m service.benchmark load` on the same machine; mixed numbers of passages are simulated "
        "as their mean",
    )
    check.add_argument("--within", type=_positive, default=0.25, help="largest relative error allowed")
    return result


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be over 0")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError("must be at most 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 1_000_000:
        raise argparse.ArgumentTypeError("must be from 1 to 1000000")
    return value


if __name__ == "__main__":
    sys.exit(main())
