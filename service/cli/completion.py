"""`scaledown completion SHELL`, and the answer to a shell that asks how a line could go on."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import argcomplete
from argcomplete.lexers import split_line
from argcomplete.shell_integration import shellcode

Choose = Callable[[Sequence[str]], tuple[argparse.ArgumentParser, Sequence[str]]]


def complete(choose: Choose) -> None:
    """Write the completions of the shell's line and end the process. Only the command on the line is imported."""
    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    _, _, _, words, _ = split_line(line, point)
    parser, rest = choose(words[1:])
    # argcomplete leaves out so many words before it parses: the program's and the subcommands'.
    os.environ["_ARGCOMPLETE"] = str(len(words) - len(rest))
    argcomplete.autocomplete(parser)


def choose_parser(arguments: Sequence[str], prog: str) -> tuple[argparse.ArgumentParser, Sequence[str]]:
    """The parser, and what it is to read."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Print what makes a shell complete `scaledown`: its commands, options and values.",
        epilog='bash, zsh: eval "$(scaledown completion bash)" at the end of ~/.bashrc; '
        "fish: scaledown completion fish | source",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
    return parser, arguments


def main(arguments: Sequence[str], prog: str) -> int:
    """Print the script; the exit status."""
    options = choose_parser(arguments, prog)[0].parse_args(arguments)
    sys.stdout.write(shellcode(["scaledown"], shell=options.shell))
    return 0
