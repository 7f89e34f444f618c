"""Where raw examples and passages come from: local JSONL, JSON, CSV, TSV and Parquet files, or public sets by name.

Knows the layout of files, not what becomes of the examples.
"""

import csv
import gzip
import json
from collections.abc import Iterable
from dataclasses import field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from core.config import STRICT
from core.errors import ConfigError
from training.data_format import RowPassage, number_lines, parse_json_line, parse_passage
from training.data_quality import DataError, ReadPolicy, ReadReport, RowError, parse_records
from training.examples import Example, parse_example
from training.public_sets import PUBLIC_SETS

Limit = Annotated[int, Field(ge=1)] | None
LIST_FIELDS = ("answers", "positives", "negatives", "passages")
FIELDS = ("id", "query", "teacher_answer", "title", "text", *LIST_FIELDS)
# What else says the same as a field: where `columns` maps the field, the file's own columns of these names say nothing.
ALTERNATIVES = {
    "query": ("question",),
    "text": ("positives", "passages"),
    "positives": ("text",),
    "passages": ("text",),
}
LONGEST_CELL = 2**31 - 1  # what csv takes everywhere: how long a passage may be is the read policy's to say
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceConfig:
    """One set of examples.

    path                     a file (.jsonl, .json, .csv, .tsv, .parquet; all but Parquet also with .gz) or the name
                             of a public set
    name                     put before its ids; empty: from the path
    columns                  our field -> the file's column, for id, query, answers, positives, negatives, passages,
                             teacher_answer, and for files with one passage a line title and text
    split                    of a public set
    limit, per_passage       at most so many examples in all, and of one positive passage
    answer_in_passage        keep only examples with an answer that stands in a positive
    max_answer_words         keep only examples whose first answer has at most so many words
    """

    path: str
    name: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    split: str = "train"
    limit: Limit = None
    per_passage: Limit = None
    answer_in_passage: bool = False
    max_answer_words: Limit = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.columns) - set(FIELDS)):
            raise ValueError(f"columns: {', '.join(unknown)} is none of {', '.join(FIELDS)}")

    @property
    def label(self) -> str:
        """What its ids begin with."""
        return self.name or (self.path if self.path in PUBLIC_SETS else _stem(Path(self.path)))


def read_examples(source: SourceConfig, policy: ReadPolicy) -> tuple[list[Example], ReadReport]:
    """All good examples of a source and the report on the rest; one without an id gets its line or record number.

    Raises DataError, and ConfigError for a column that no record has.
    """
    if source.path in PUBLIC_SETS:
        return read_records(source, load_public_set(source.path, source.split), policy)
    report = ReadReport(source.label)
    found: dict[Any, None] = {}  # the columns of all records, in order
    replaced = {other for ours in source.columns for other in ALTERNATIVES.get(ours, ())}

    def parse(numbered: tuple[int, Any]) -> Example:
        number, record = numbered
        values = _as_object(record)
        found.update(dict.fromkeys(values))
        own = {name: value for name, value in values.items() if name not in replaced}
        mapped = {ours: values.get(theirs) for ours, theirs in source.columns.items()}
        try:
            return parse_example(_flat_fields({"id": str(number), **own, **mapped}), policy)
        except RowError as error:
            raise RowError(error.kind, f"{error}{_remedy(str(error), source, found)}") from None

    numbers = ((number, (number, record)) for number, record in _numbered(Path(source.path)))
    try:
        examples = list(parse_records(numbers, parse, policy, report))
    except DataError as error:
        raise DataError(error.message + _misnamed(source, found)) from None
    if misnamed := _misnamed(source, found):
        raise ConfigError(source.path + misnamed)
    return examples, report


def _misnamed(source: SourceConfig, found: Iterable[Any]) -> str:
    """What `columns` names and no record has, beside what is there; empty where all are found."""
    present = [name for name in found if isinstance(name, str)]  # surplus cells of a CSV stand under None
    absent = [f"columns.{ours}={theirs}" for ours, theirs in source.columns.items() if theirs not in present]
    return f": {', '.join(absent)}: no such column; there are {', '.join(present)}" if present and absent else ""


def _remedy(problem: str, source: SourceConfig, found: Iterable[Any]) -> str:
    """How to name the column of a field that no record has; empty for any other problem."""
    name, _, what = problem.partition(" ")
    present = [column for column in found if isinstance(column, str)]
    known = {*present, *source.columns}
    if what != "is missing" or name not in FIELDS or known & {name, *ALTERNATIVES.get(name, ())}:
        return ""
    near = get_close_matches(name, [column for column in present if column not in FIELDS], n=1)
    return f" and may have another name: columns.{name}={near[0] if near else 'COLUMN'}; there are {', '.join(present)}"


def read_records(
    source: SourceConfig, records: Iterable[dict[str, Any]], policy: ReadPolicy
) -> tuple[list[Example], ReadReport]:
    """As `read_examples`, from the records of a public set, counted from 1."""
    report = ReadReport(source.label)
    adapt = PUBLIC_SETS[source.path].adapt

    def parse(numbered: tuple[int, dict[str, Any]]) -> Example:
        number, record = numbered
        return parse_example({"id": str(number), **_adapted(adapt, record)}, policy)

    numbers = ((number, (number, record)) for number, record in enumerate(records, start=1))
    return list(parse_records(numbers, parse, policy, report)), report


def load_public_set(name: str, split: str) -> Iterable[dict[str, Any]]:
    """Stream a public set from the hub, in its own order. Raises DataError where it cannot be had."""
    import datasets  # here, because it is slow to import and only needed for public sets

    public = PUBLIC_SETS[name]
    try:
        records: Iterable[dict[str, Any]] = datasets.load_dataset(
            public.hub_id, public.configuration, split=split, streaming=True
        )
    except Exception as error:  # the hub's client raises many kinds; all of them mean that it cannot be had
        raise DataError(f"{name} ({split}): cannot be loaded from the hub: {type(error).__name__}: {error}") from None
    return records


def read_collection(path: Path, policy: ReadPolicy) -> tuple[list[RowPassage], ReadReport]:
    """The passages of a file with `text` and perhaps `title`; a passage's own `id` is kept. Raises DataError."""
    report = ReadReport(path.name)
    passages = []
    for line, record in _numbered(path):
        report.read += 1
        try:
            passages.append(parse_passage(_as_object(record), "passage", policy.max_passage_chars))
            report.kept += 1
        except RowError as error:
            if policy.on_problem == "refuse":
                raise DataError(f"{path.name}, line {line}: {error.kind}: {error}") from None
            report.add(line, error)
    return passages, report


def _adapted(adapt: Any, record: dict[str, Any]) -> dict[str, Any]:
    """A record through its set's adapter; a column that is not there makes the record bad. Raises RowError."""
    try:
        values: dict[str, Any] = adapt(record)
    except KeyError as error:
        raise RowError("missing field", f"column {error} is missing") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise RowError("wrong type", f"columns are not as documented: {error}") from None
    return values


def _as_object(record: Any) -> dict[str, Any]:
    values = parse_json_line(record) if isinstance(record, bytes) else record
    if not isinstance(values, dict):
        raise RowError("broken line", "not an object")
    return values


def _flat_fields(values: dict[str, Any]) -> dict[str, Any]:
    """What flat tables say in one cell, as lists: JSON lists are parsed, a plain value is a list of one.

    A `text` column (with `title`, if any) is the one positive passage.
    """
    values = dict(values)
    for name in LIST_FIELDS:
        value = values.get(name)
        if isinstance(value, str):
            values[name] = _cell_list(value)
    if values.get("text") is not None and values.get("positives") is None and values.get("passages") is None:
        values["positives"] = [{"text": values["text"], "title": values.get("title")}]
    return values


def _cell_list(cell: str) -> list[Any] | None:
    if not cell.strip():
        return None
    if cell.lstrip().startswith("["):
        try:
            parsed = json.loads(cell)
        except ValueError:
            return [cell]
        return parsed if isinstance(parsed, list) else [cell]
    return [cell]


def _numbered(path: Path) -> Iterable[tuple[int, Any]]:
    """`(line or record number, raw record)` of a local file, a line of JSONL as its bytes."""
    suffix = _suffix(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file, and none of the public sets {', '.join(PUBLIC_SETS)}")
    if suffix == ".jsonl":
        return number_lines(path)
    try:
        return _read_table(path, suffix)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path.name}: cannot be read: {error}") from None


def _read_table(path: Path, suffix: str) -> list[tuple[int, Any]]:
    """A whole JSON, CSV, TSV or Parquet file as `(number, record)`; CSV counts lines, the others records.

    A byte order mark, with which Excel begins a file, is passed over.
    """
    if suffix == ".parquet":
        import pyarrow.parquet  # type: ignore[import-untyped]  # ships no types; here, because only Parquet needs it

        return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), start=1))
    with (
        gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig")
    ) as file:
        if suffix == ".json":
            records = json.load(file)
            if not isinstance(records, list):
                raise ValueError("the file is not a JSON list")
            return list(enumerate(records, start=1))
        csv.field_size_limit(LONGEST_CELL)
        reader = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
        return [(reader.line_num, record) for record in reader]


def _suffix(path: Path) -> str:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in SUFFIXES:
        raise ConfigError(f"{path}: not a public set ({', '.join(PUBLIC_SETS)}) nor a file ({', '.join(SUFFIXES)})")
    return suffix


def _stem(path: Path) -> str:
    return Path(path.stem).stem if path.suffix == ".gz" else path.stem
