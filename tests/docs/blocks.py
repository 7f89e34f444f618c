"""The fenced blocks of a Markdown page, and whether what a command printed has the shape that a page shows.

A block that is not run has a comment right before it that says why: `<!-- not run: needs a GPU -->`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->")
CONTINUED = "\0"  # stands for a line break within a command
SNAKE_CASE = re.compile(r"[a-z]+(?:_[a-z]+)+")


@dataclass(frozen=True)
class Block:
    """A block; `reason` says why it is not run, `line` is that of its first line in the page."""

    language: str
    text: str
    line: int
    reason: str | None


@dataclass(frozen=True)
class Example:
    """A command of a `console` block and what stands below it."""

    command: str
    output: str


def read_blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order. A fence that is not closed is an error."""
    blocks, before = [], ""
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if line.startswith("```"):
            found = NOT_RUN.fullmatch(before)
            body = list(_until_closed(lines, page, number))
            blocks.append(Block(line.removeprefix("```"), "\n".join(body) + "\n", number + 1, found and found[1]))
        before = line.strip()
    return blocks


def _until_closed(lines: Iterator[tuple[int, str]], page: Path, start: int) -> Iterator[str]:
    for _, line in lines:
        if line == "```":
            return
        yield line
    raise AssertionError(f"{page.name}:{start}: this block is not closed")


def read_examples(text: str) -> list[Example]:
    """The commands of a `console` block, each behind `$ `, its further lines behind `> `, with their output."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    assert not parts[0].strip(), "a console block begins with a command"
    pairs = [part.replace("\n> ", CONTINUED).partition("\n") for part in parts[1:]]
    return [Example(command.replace(CONTINUED, "\n"), output.strip()) for command, _, output in pairs]


def differences(shown: str, printed: str) -> list[str]:
    """How the shape of an output is not the one that is shown: the fields of JSON; of a text, its lines and names."""
    try:
        expected = json.loads(shown)
    except ValueError:
        return _text_differences(shown, printed)
    return list(_json_differences(expected, json.loads(printed), "output"))


def _text_differences(shown: str, printed: str) -> list[str]:
    found = []
    if len(shown.splitlines()) != len(printed.strip().splitlines()):
        found.append(f"other lines than shown: {printed.strip()}")
    if names := set(SNAKE_CASE.findall(shown)) ^ set(SNAKE_CASE.findall(printed)):
        found.append(f"shown or printed only: {', '.join(sorted(names))}")
    return found


def _json_differences(shown: Any, printed: Any, where: str) -> Iterator[str]:
    if shown is None or printed is None:
        return  # what may be null
    if _kind(shown) != _kind(printed):
        yield f"{where}: {_kind(shown)} is shown, {_kind(printed)} printed"
    elif isinstance(shown, dict):
        if names := set(shown) ^ set(printed):
            yield f"{where}: shown or printed only: {', '.join(sorted(names))}"
        for name in set(shown) & set(printed):
            yield from _json_differences(shown[name], printed[name], f"{where}.{name}")
    elif isinstance(shown, list):
        for index, pair in enumerate(zip(shown, printed, strict=False)):
            yield from _json_differences(*pair, f"{where}.{index}")


def _kind(value: Any) -> str:
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
