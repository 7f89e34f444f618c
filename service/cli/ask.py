"""What `answer`, `compress` and `rerank` have in common: questions in, the service or a local model, results out."""

import contextlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from service.cli.questions import Question
from service.client import AnsweredPassage, Client, CompressedPassage, Connection, ResponseError

T = TypeVar("T")
AT_A_TIME = 8  # questions in the service at once: it batches them


@contextlib.contextmanager
def open_client(options: Namespace) -> Iterator[Client]:
    """A client of the service, or of a model that is loaded here. Raises ServiceError and ScaledownError."""
    if options.checkpoint is None:
        with Connection(options.url).client() as client:
            yield client
        return
    with Console(stderr=True).status(f"loading {options.checkpoint.name}"):
        # Late: this imports torch, which takes seconds.
        from service.cli.local import local_client

        stack = contextlib.ExitStack()
        client = stack.enter_context(local_client(options.checkpoint))
    with stack:
        yield client


def each(questions: Sequence[Question], call: Callable[[Question], T]) -> Iterator[tuple[Question, T]]:
    """The result of `call` for each question, in order, several asked at a time.

    The first error ends it, and says which question it is about.
    """
    if len(questions) == 1:
        yield questions[0], call(questions[0])
        return

    def asked(index: int, question: Question) -> T:
        try:
            return call(question)
        except ResponseError as error:
            error.args = (f"input.{index}: {error}",)
            raise

    pool = ThreadPoolExecutor(AT_A_TIME)
    try:
        results = pool.map(asked, range(len(questions)), questions)
        pairs = zip(questions, results, strict=True)
        console = Console(stderr=True)
        yield from track(pairs, "asking", len(questions), console=console, disable=not console.is_terminal)
    finally:
        pool.shutdown(cancel_futures=True)


def print_json(question: Question, result: Any) -> None:
    """A result as one line of JSON, by the names of the HTTP API, with the id of its row."""
    row = {} if question.id is None else {"id": question.id}
    json.dump(row | asdict(result), sys.stdout, ensure_ascii=False)
    print(flush=True)


def print_evidence(console: Console, question: Question, passage: AnsweredPassage | CompressedPassage) -> None:
    """Which words each embedding of a passage was read from; nothing where that was not asked for or is not known."""
    if passage.evidence is None:
        return
    source = question.passages[passage.index]
    fields = {"title": source.title, "text": source.text or ""}
    title = Text(name_of(question, passage.index))
    table = Table("embedding", "read from", title=title, title_justify="left", box=None, header_style="dim")
    for number, spans in enumerate(passage.evidence, 1):
        words = [f"{fields[span.field][span.start : span.end]} ({span.weight:.0%})" for span in spans]
        table.add_row(str(number), Text("; ".join(words)))
    console.print(table)


def name_of(question: Question, index: int) -> str:
    """What a passage is called in a table: its title, or else how its text begins."""
    passage = question.passages[index]
    text = passage.title or " ".join((passage.text or "").split())
    return text if len(text) <= 72 else text[:71] + "…"
