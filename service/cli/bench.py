"""`scaledown bench`: `python -m service.benchmark`, which knows its flags, by another name."""

import argparse
from collections.abc import Sequence

from service.benchmark.__main__ import build_parser
from service.benchmark.__main__ import main as measure


def choose_parser(arguments: Sequence[str], prog: str) -> tuple[argparse.ArgumentParser, Sequence[str]]:
    """The parser, and what it is to read."""
    return build_parser(prog), arguments


def main(arguments: Sequence[str], prog: str) -> int:
    """Measure; the exit status."""
    return measure(arguments, prog)
