"""What the commands' options accept: numbers in a range, devices, files and folders. Refused before any work is done.

Knows no command. A number that is out of range is wrong usage (exit status 2), a path that does not fit is something to
mend (1); either is one line that names the option.
"""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from core.errors import ConfigError
from core.manifest import MANIFEST

ROW_FILES = (".jsonl", ".jsonl.gz")
MAX_SEED = 2**63 - 1  # torch takes no larger one


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line: the usage of a command with twenty options hides it."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (usage: {self.prog} --help)\n")


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` to `most`."""
    limits = f"of at least {least}" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"must be a whole number {limits}, not {text!r}")
        return number

    return read


def share(text: str) -> float:
    """The type of an option that is a share, 0 or more and below 1."""
    number = _number(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to below 1, not {text!r}")
    return number


def amount(text: str) -> float:
    """The type of an option that is a finite number, 0 or more."""
    number = _number(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, not {text!r}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def device(text: str) -> str:
    """The type of an option that names a device of this machine, as torch does."""
    import torch  # here: it takes seconds, and not every command computes

    try:
        if torch.device(text).type == "meta":
            raise RuntimeError
        torch.empty(1, device=text)
    # torch raises RuntimeError, and AssertionError where it was built without CUDA.
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device of this machine; give cpu, or cuda where there is one"
        ) from None
    return text


def check_file(path: Path, option: str) -> None:
    """Raises ConfigError where there is no file to read at `path`."""
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder, not a file")
    if not path.exists():
        raise ConfigError(f"{option} {path}: no such file")


def check_checkpoint(folder: Path, option: str) -> None:
    """Raises ConfigError where `folder` is not a checkpoint at all; what is in it is checked when it is loaded."""
    if not (folder / MANIFEST).is_file():
        what = "holds no checkpoint" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{option} {folder}: {what} ({MANIFEST}); `python -m training export` makes one of a run")


def check_out_file(path: Path, option: str, suffixes: tuple[str, ...] = ROW_FILES) -> None:
    """Raises ConfigError where no file of rows can be written to `path`."""
    if path.is_dir():
        raise ConfigError(f"{option} {path}: is a folder, not a file")
    if not path.name.endswith(suffixes):
        raise ConfigError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")
    _check_parents(path, option)


def check_out_folder(path: Path, option: str, *, new: bool = False) -> None:
    """Raises ConfigError where no folder can be made at `path`, or where there is one and it has to be `new`."""
    if new and os.path.lexists(path):
        raise ConfigError(f"{option} {path}: exists already; give a new folder")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{option} {path}: is a file, not a folder")
    _check_parents(path, option)


def _check_parents(path: Path, option: str) -> None:
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{option} {path}: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK):
        raise ConfigError(f"{option} {path}: {nearest} cannot be written to")
