"""The records of an evaluation and the JSONL file they are appended to. Knows nothing about models or averages.

The first line describes the run; every other line is one record. A batch is appended with one write and synced, so a
kill loses at most the batch in hand, and a line that the kill cut short is dropped when the file is opened again.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from core.errors import ConfigError
from core.policy import RequestMode


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """One column of the comparison.

    rate    None in text mode, which compresses nothing, and under a budget, which chooses from the default rate on
    budget  most tokens of a prompt, in `auto` mode; else None
    hops    2: passages were read again for the query and the best of them (`core.hops`)
    """

    mode: RequestMode
    rate: int | None
    passages: int
    budget: int | None = None
    hops: int = 1

    @property
    def name(self) -> str:
        """e.g. "compressed x16, 5 passages"."""
        return f"{self.label}, {self.passages} passage{'s' if self.passages != 1 else ''}"

    @property
    def label(self) -> str:
        """The name without the number of passages."""
        if self.budget is not None:
            label = f"{self.mode} within {self.budget}"
        else:
            label = self.mode if self.rate is None else f"{self.mode} x{self.rate}"
        return label + _hops(self.hops)


def compressor_name(rate: int, hops: int = 1) -> str:
    """The compressor as a ranker, e.g. "compressor x16, 2 hops"."""
    return f"compressor x{rate}{_hops(hops)}"


def _hops(hops: int) -> str:
    return "" if hops == 1 else f", {hops} hops"


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """One question answered in one setting.

    seconds         wall time of the batch by stage, divided by the questions in it
    prompt_tokens   positions the generator read before its first token
    survival        see `metrics.survival`; None where it does not apply
    """

    question: str
    setting: Setting
    answer: str
    em: float
    f1: float
    substring: float
    rouge_l: float
    survival: float | None
    prompt_tokens: int
    completion_tokens: int
    seconds: dict[str, float]
    kind: Literal["answer"] = "answer"


@dataclass(frozen=True, slots=True)
class RankingRecord:
    """Scores of one question's passages, in the row's order; `ranker` is a `compressor_name`, "bm25" or a model's."""

    question: str
    ranker: str
    passages: int
    gold: list[bool]
    scores: list[float]
    kind: Literal["ranking"] = "ranking"


@dataclass(frozen=True, slots=True)
class CostRecord:
    """Floating point operations of one answer by stage, and the peak of memory in bytes while it was made."""

    question: str
    setting: Setting
    flops: dict[str, int]
    peak_memory: int
    kind: Literal["cost"] = "cost"


@dataclass(frozen=True, slots=True)
class JudgementRecord:
    """A verdict of the model `judge` on one answer: 1 correct, 0.5 partly, 0 wrong; None where it cannot be read."""

    question: str
    setting: Setting
    score: float | None
    judge: str = "unnamed"  # in files of earlier versions
    kind: Literal["judgement"] = "judgement"


Record = AnswerRecord | RankingRecord | CostRecord | JudgementRecord
_KINDS: Mapping[str, TypeAdapter[Record]] = {
    kind: TypeAdapter(record)
    for kind, record in {
        "answer": AnswerRecord,
        "ranking": RankingRecord,
        "cost": CostRecord,
        "judgement": JudgementRecord,
    }.items()
}


@dataclass
class ResultsFile:
    """Append-only JSONL of records that belong to one `run` description (checkpoint, data, options)."""

    path: Path
    run: Mapping[str, Any]
    records: list[Record] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, run: Mapping[str, Any]) -> "ResultsFile":
        """Resume the file at `path`, or start it.

        Raises ConfigError where it holds another run's records, or a line before the last is broken.
        """
        run = json.loads(json.dumps(run))  # as it reads back: tuples become lists
        results = cls(path, run)
        lines = _complete_lines(path, repair=True)
        if not lines:
            return results  # its first line is written with the first record: what fails before leaves no file
        before = _parse_line(path, 1, lines[0])
        if differing := sorted(key for key in {*run, *before} - {"kind"} if run.get(key) != before.get(key)):
            raise ConfigError(f"{path}: holds results of another run ({', '.join(differing)} differ)")
        results.records = list(_parse_records(path, lines))
        return results

    def append(self, records: Iterable[Record]) -> None:
        """Add records to the file and to `records`."""
        new = list(records)
        if new:
            begun = self.path.exists() and self.path.stat().st_size > 0
            first = [] if begun else [{"kind": "run", **self.run}]
            self._write(json.dumps(values) for values in [*first, *map(dataclasses.asdict, new)])
            self.records.extend(new)

    def _write(self, lines: Iterable[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def read_results(path: Path) -> ResultsFile:
    """The records of a file that is not continued. Raises ConfigError where it is empty or broken."""
    lines = _complete_lines(path)
    if not lines:
        raise ConfigError(f"{path}: no results")
    run = _parse_line(path, 1, lines[0])
    run.pop("kind", None)
    return ResultsFile(path, run, list(_parse_records(path, lines)))


def _complete_lines(path: Path, *, repair: bool = False) -> list[str]:
    """The lines of the file but a last one without its line feed: a kill cut it short. `repair`: cut it off the file.

    Raises ConfigError where it is not text.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    try:
        lines = content[:complete].decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not the results.jsonl of an evaluation: it is not text") from None
    if repair and complete < len(content):
        os.truncate(path, complete)
    return lines


def _parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}, line {number}: not a JSON object")
    return values


def _parse_records(path: Path, lines: list[str]) -> Iterator[Record]:
    for number, line in enumerate(lines[1:], start=2):
        values = _parse_line(path, number, line)
        adapter = _KINDS.get(str(values.get("kind")))
        if adapter is None:
            raise ConfigError(f"{path}, line {number}: unknown kind {values.get('kind')!r}")
        try:
            yield adapter.validate_python(values)
        except ValidationError as error:
            raise ConfigError(f"{path}, line {number}: {error.errors()[0]['msg']}") from None
