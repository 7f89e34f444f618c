"""`scaledown serve`: `python -m service`, which knows its flags, by another name."""

import argparse
from collections.abc import Sequence

from service.__main__ import build_parser
from service.__main__ import main as serve


def choose_parser(arguments: Sequence[str], prog: str) -> tuple[argparse.ArgumentParser, Sequence[str]]:
    """The parser, and what it is to read."""
    parser = build_parser()
    parser.prog = prog
    return parser, arguments


def main(arguments: Sequence[str], prog: str) -> int:
    """Serve until told to stop; the exit status."""
    choose_parser(arguments, prog)[0].parse_args(arguments)  # so that help and errors have the name that was typed
    return serve(list(arguments))
