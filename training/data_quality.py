"""What is done about bad rows: counted and reported with their line numbers, then skipped or refused.

Knows no fields: whatever parses a row says what is wrong with it by raising RowError.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from core.errors import ScaledownError

ProblemKind = Literal["broken line", "missing field", "wrong type", "empty", "duplicate id", "over-long passage"]
SHOWN_PER_KIND = 5


class HasId(Protocol):
    """What a record becomes."""

    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=HasId)


class DataError(ScaledownError):
    """A data file cannot be used as it stands; the message names the file, the line and the field."""

    code = "data"


class RowError(ValueError):
    """One row is bad; `kind` is counted, the message says which field."""

    def __init__(self, kind: ProblemKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class ReadPolicy:
    """What is done about bad rows: `skip` counts them, `refuse` raises at the first one.

    max_passage_chars    a passage over this many characters makes its row bad; None: none is too long
    need_answer          a row without a gold answer or a teacher's answer is bad
    """

    on_problem: Literal["skip", "refuse"] = "skip"
    max_passage_chars: int | None = None
    need_answer: bool = True


@dataclass
class ReadReport:
    """How many lines were read and kept, and the line numbers of the rest by kind of problem."""

    source: str
    read: int = 0
    kept: int = 0
    lines: dict[ProblemKind, list[int]] = field(default_factory=dict)
    examples: dict[ProblemKind, str] = field(default_factory=dict)

    def add(self, line: int, error: RowError) -> None:
        self.lines.setdefault(error.kind, []).append(line)
        self.examples.setdefault(error.kind, str(error))

    @property
    def counts(self) -> Counter[str]:
        return Counter({kind: len(lines) for kind, lines in self.lines.items()})

    def __str__(self) -> str:
        text = f"{self.source}: {self.kept} of {self.read} rows kept"
        for kind, lines in sorted(self.lines.items()):
            shown = ", ".join(map(str, lines[:SHOWN_PER_KIND])) + (", ..." if len(lines) > SHOWN_PER_KIND else "")
            text += f"\n  {len(lines)} x {kind} (line {shown}): {self.examples[kind]}"
        return text


def parse_records(
    records: Iterable[tuple[int, Any]], parse: Callable[[Any], T], policy: ReadPolicy, report: ReadReport
) -> Iterator[T]:
    """Parse `(line number, raw record)` pairs; bad ones and repeated ids go to `report` or raise, as `policy` says.

    `parse` raises RowError for a bad record. Raises DataError where refused.
    """
    first_line: dict[str, int] = {}
    for line, record in records:
        report.read += 1
        try:
            parsed = parse(record)
            if first_line.setdefault(parsed.id, line) != line:
                raise RowError("duplicate id", f"id {parsed.id!r} already stands in line {first_line[parsed.id]}")
        except RowError as error:
            if policy.on_problem == "refuse":
                raise DataError(f"{report.source}, line {line}: {error.kind}: {error}") from None
            report.add(line, error)
            continue
        report.kept += 1
        yield parsed
