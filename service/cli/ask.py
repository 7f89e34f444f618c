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

from service.cli.questions import Question
from service.client import Client, Connection

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
    """The result of `call` for each question, in order, several asked at a time. The first error ends it."""
    if len(questions) == 1:
        yield questions[0], call(questions[0])
        return
    pool = ThreadPoolExecutor(AT_A_TIME)
    try:
        results = pool.map(call, questions)
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


def name_of(question: Question, index: int) -> str:
    """What a passage is called in a table: its title, or else how its text begins."""
    passage = question.passages[index]
    text = passage.title or " ".join((passage.text or "").split())
    return text if len(text) <= 72 else text[:71] + "…"
