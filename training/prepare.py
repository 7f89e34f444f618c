"""`prepare`: from raw question-answering data to rows of the data format, with negatives, without leaks.

Read -> check -> deduplicate -> drop what is held out -> cap -> find missing positives -> split -> mine -> write.
The same configuration gives the same bytes. Does not know how files or public sets are laid out.
"""

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from core.config import STRICT, parse_config
from core.errors import ConfigError
from training.arguments import MAX_SEED, check_file, check_out_file, share, whole
from training.assemble import AssemblyConfig, assemble_rows, find_positives
from training.config import parse_yaml, read_yaml
from training.data_format import Row, RowPassage, write_rows
from training.data_quality import DataError, ReadPolicy, ReadReport
from training.dense import make_retriever
from training.examples import Example, keep_found_answers
from training.negatives import Collection, Retriever, without_passages
from training.row_statistics import describe, warn_without_positives
from training.sources import SourceConfig, read_collection, read_examples
from training.splits import bar_passages, cap, deduplicate, drop_held_out, positive_words, split_examples

log = logging.getLogger(__name__)

EXAMPLES = """\
examples:
  # the questions that are in the repository, negatives by BM25 from their passages; a fifth held out as dev
  python -m training prepare --source examples/facts.jsonl --passages 5 --dev-share 0.2 \\
      --out data/train.jsonl --dev-out data/dev.jsonl
  # a table, its columns named, and 50,000 questions of a public set; negatives from a collection, too
  python -m training prepare --source tickets.csv,columns.query=subject,columns.answers=reply,columns.text=article \\
      --source squad,limit=50000 --collection wiki.jsonl.gz --passages 5 --out train.jsonl.gz
  # nothing in train that a test set shares a passage or a question with
  python -m training prepare --config prepare.yaml --held-out test.jsonl --out train.jsonl.gz
"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareConfig:
    """All that decides the rows.

    sources         sets of examples
    collections     files of passages that negatives are mined from, besides the sources' own passages
    held_out        files of examples or rows that nothing may share a positive or a question with
    retriever       `bm25`, `dense:<model>` (mean pooling, cosine) or `splade:<model>`; a hub id or a folder
    assembly        how the passages of a row are chosen
    dev_share       share of groups of examples that become the dev set; a group shares questions or positives
    seed            of caps, split, random negatives and order
    on_problem      bad rows are counted and skipped, or the first one refuses the file
    max_passage_chars  a source's row with a longer passage is bad; what is prepared has no such limit
    """

    sources: tuple[SourceConfig, ...]
    collections: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    retriever: str = "bm25"
    assembly: AssemblyConfig = field(default_factory=AssemblyConfig)
    dev_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0
    on_problem: Literal["skip", "refuse"] = "skip"
    max_passage_chars: Annotated[int, Field(ge=1)] = 20_000

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: give at least one")
        labels = [source.label for source in self.sources]
        if len(set(labels)) != len(labels):
            raise ValueError(f"sources: two have the same name among {', '.join(labels)}; set `name`")

    @property
    def policy(self) -> ReadPolicy:
        """What is done about bad rows."""
        return ReadPolicy(self.on_problem, self.max_passage_chars)


@plain_dataclass(frozen=True, slots=True)
class Prepared:
    """The rows of both sides and what was left out on the way, by reason."""

    train: list[Row]
    dev: list[Row]
    dropped: Counter[str]


def prepare(config: PrepareConfig) -> Prepared:
    """Rows of `config`'s sources. Raises DataError and ConfigError."""
    dropped: Counter[str] = Counter()
    lenient = ReadPolicy(config.on_problem, need_answer=False)  # a question is held out whatever else is known of it
    held_out = [example for path in config.held_out for example in _read(SourceConfig(path=path), lenient)]
    examples: list[Example] = []
    for source in config.sources:
        examples += _select(_read(source, config.policy), source, held_out, config.seed, dropped)
    count = len(examples)
    examples = deduplicate(examples)
    dropped["same question and positives"] += count - len(examples)
    if not examples:
        return Prepared([], [], dropped)
    own = [passage for example in examples for passage in (*example.positives, *example.negatives)]
    collection = Collection([*own, *_read_collections(config)])
    retriever = make_retriever(config.retriever, collection.texts)
    if config.assembly.without_positives == "distant":
        free = without_passages(collection, retriever, positive_words(held_out))
        examples = find_positives(examples, *free)
    train, dev = split_examples(examples, config.dev_share, config.seed)
    return Prepared(
        _rows(train, [*held_out, *dev], collection, retriever, config, dropped),
        _rows(dev, [*held_out, *train], collection, retriever, config, dropped),
        dropped,
    )


def _read(source: SourceConfig, policy: ReadPolicy) -> list[Example]:
    """A source's good examples, ids prefixed with its name. Raises DataError where it has none."""
    examples, report = read_examples(source, policy)
    log.info("%s", report)
    if not examples:
        raise DataError(f"{source.path}: {_nothing_in(report)}")
    return [replace(example, id=f"{source.label}/{example.id}") for example in examples]


def _nothing_in(report: ReadReport) -> str:
    return f"none of its {report.read} rows can be used; see above for why" if report.read else "is empty"


def _select(
    examples: list[Example], source: SourceConfig, held_out: Sequence[Example], seed: int, dropped: Counter[str]
) -> list[Example]:
    """What the source's own rules keep."""
    steps: list[tuple[str, list[Example]]] = [("", examples)]
    if source.answer_in_passage:
        found = [kept for example in examples if (kept := keep_found_answers(example))]
        steps.append(("answer in no positive", found))
    if (longest := source.max_answer_words) is not None:
        short = [example for example in steps[-1][1] if _first_answer_words(example) <= longest]
        steps.append(("answer too long", short))
    steps.append(("shares a passage or question with what is held out", drop_held_out(steps[-1][1], held_out)))
    steps.append(("same question and positives", deduplicate(steps[-1][1])))
    capped = cap(steps[-1][1], per_passage=source.per_passage, limit=source.limit, seed=seed)
    steps.append(("over a limit of the source", capped))
    for (_, before), (reason, after) in pairwise(steps):
        dropped[reason] += len(before) - len(after)
    log.info("%s: %d examples selected of %d", source.label, len(capped), len(examples))
    return capped


def _first_answer_words(example: Example) -> int:
    return len((example.answers[0] if example.answers else example.teacher_answer or "").split())


def _read_collections(config: PrepareConfig) -> list[RowPassage]:
    pool: list[RowPassage] = []
    for path in config.collections:
        passages, report = read_collection(Path(path), config.policy)
        log.info("%s", report)
        if not passages:
            raise DataError(f"{path}: {_nothing_in(report)}")
        pool += passages
    return pool


def _rows(
    examples: list[Example],
    others: Sequence[Example],
    collection: Collection,
    retriever: Retriever,
    config: PrepareConfig,
    dropped: Counter[str],
) -> list[Row]:
    """One side's rows, shuffled. No positive of `others`, the other side and what is held out, is in them."""
    barred = positive_words(others)
    examples = [bar_passages(example, barred) for example in examples]
    assembly = replace(config.assembly, seed=config.seed)
    rows = list(assemble_rows(examples, *without_passages(collection, retriever, barred), assembly, dropped))
    order = np.random.default_rng(config.seed).permutation(len(rows))
    return [rows[index] for index in order]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--config", type=Path, help="YAML with the fields of PrepareConfig; the flags below go before it"
    )
    parser.add_argument(
        "--source",
        action="append",
        metavar="PATH[,KEY=VALUE]...",
        help="a file or a public set's name; may be repeated",
    )
    parser.add_argument("--collection", action="append", metavar="FILE", help="passages to mine negatives from")
    parser.add_argument("--held-out", action="append", metavar="FILE", help="share no passage or question with these")
    parser.add_argument("--retriever", help="bm25 (default), dense:<model> or splade:<model>")
    parser.add_argument("--passages", type=whole(1), help="passages a row (default 10)")
    parser.add_argument("--random-negatives", type=whole(0), help="of them random ones (default 1)")
    parser.add_argument("--given-only", action="store_true", help="no mining: only the passages an example came with")
    parser.add_argument("--dev-share", type=share, help="share of groups of questions for --dev-out (default 0)")
    parser.add_argument("--seed", type=whole(0, MAX_SEED), help="default 0")
    parser.add_argument("--refuse", action="store_true", help="stop at the first bad row instead of skipping it")
    parser.add_argument("--max-passage-chars", type=whole(1), help="a longer passage makes its row bad (default 20000)")
    parser.add_argument("--out", type=Path, required=True, help="rows to train on (.jsonl or .jsonl.gz)")
    parser.add_argument("--dev-out", type=Path, help="rows of the dev share")


def parse_source(text: str) -> dict[str, Any]:
    """`PATH,key=value,columns.query=question` as the values of a SourceConfig; YAML rules for the values.

    Raises ConfigError.
    """
    path, *pairs = text.split(",")
    values: dict[str, Any] = {"path": path}
    columns: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--source {text}: {pair!r} is not KEY=VALUE")
        if key.startswith("columns."):
            columns[key.removeprefix("columns.")] = value
        else:
            values[key] = parse_yaml(value, f"--source {text}: {key}")
    values |= {"columns": columns} if columns else {}
    parse_config(SourceConfig, values, f"--source {text}")  # a mistake is said with the option that it is in
    return values


def config_from(args: argparse.Namespace) -> PrepareConfig:
    """The YAML file, if any, with the command line's values in it. Raises ConfigError."""
    values = read_yaml(args.config) if args.config else {}
    if not args.source and "sources" not in values:
        raise ConfigError("--source: give at least one, or --config with sources")
    given = {
        "sources": [parse_source(text) for text in args.source] if args.source else None,
        "collections": args.collection,
        "held_out": args.held_out,
        "retriever": args.retriever,
        "dev_share": args.dev_share,
        "seed": args.seed,
        "on_problem": "refuse" if args.refuse else None,
        "max_passage_chars": args.max_passage_chars,
    }
    assembly = {
        "passages": args.passages,
        "random_negatives": args.random_negatives,
        "mine": False if args.given_only else None,
    }
    values |= {key: value for key, value in given.items() if value is not None}
    if chosen := {key: value for key, value in assembly.items() if value is not None}:
        given_assembly = values.get("assembly", {})
        if not isinstance(given_assembly, dict):
            raise ConfigError(f"{args.config}: assembly: must be a group of keys")
        values["assembly"] = {**given_assembly, **chosen}
    return parse_config(PrepareConfig, values, str(args.config or "command line"))


def run(args: argparse.Namespace) -> None:
    """Prepare and write. Raises ScaledownError for what the user can mend."""
    config = config_from(args)
    if (config.dev_share > 0) != (args.dev_out is not None):
        raise ConfigError("--dev-out and a --dev-share over 0 go together")
    _check_paths(config, args)
    prepared = prepare(config)
    for reason, count in prepared.dropped.most_common():
        if count:
            log.info("left out: %d x %s", count, reason)
    if not prepared.train:
        raise DataError("--out: no rows are left to train on; see above for what was left out")
    if args.dev_out is not None and not prepared.dev:
        raise DataError(f"--dev-share {config.dev_share:g}: no rows are left for --dev-out; give a larger share")
    for path, rows in ((args.out, prepared.train), (args.dev_out, prepared.dev)):
        if path is not None:
            write_rows(path, rows)
            log.info("%s: %s", path, describe(rows))
    warn_without_positives([source.label for source in config.sources], [*prepared.train, *prepared.dev])


def _check_paths(config: PrepareConfig, args: argparse.Namespace) -> None:
    """Raises ConfigError where a file of passages is none, or a file to write cannot be one, or is one that is read."""
    for path in config.collections:
        check_file(Path(path), "--collection")
    read = {Path(path).absolute() for path in (*config.collections, *config.held_out)}
    read |= {Path(source.path).absolute() for source in config.sources}
    for option, path in (("--out", args.out), ("--dev-out", args.dev_out)):
        if path is None:
            continue
        check_out_file(path, option)
        if path.absolute() in read:
            raise ConfigError(f"{option} {path}: is read, too; give another name")
        read.add(path.absolute())
