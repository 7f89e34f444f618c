"""`scaledown compress`: passages as embeddings, and with --explain the words these were read from."""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from service.cli.ask import each, name_of, open_client, print_evidence, print_json
from service.cli.flags import add_options, add_question, given_options
from service.cli.questions import Question, read_questions
from service.client import Compression
from service.client.calls import CompressOptions


def choose_parser(arguments: Sequence[str], prog: str) -> tuple[argparse.ArgumentParser, Sequence[str]]:
    """The parser, and what it is to read."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Compress passages for a question. The embeddings themselves are in the output of --json.",
    )
    add_question(parser)
    add_options(parser, CompressOptions)
    return parser, arguments


def main(arguments: Sequence[str], prog: str) -> int:
    """Compress; the exit status. Raises ServiceError and ScaledownError."""
    options = choose_parser(arguments, prog)[0].parse_intermixed_args(arguments)
    questions = read_questions(options.query, options.passages, options.input)
    given: CompressOptions = given_options(options, CompressOptions)
    with open_client(options) as client:
        for question, made in each(questions, lambda q: client.compress(q.query, q.passages, **given)):
            if options.json:
                print_json(question, made)
            else:
                show(question, made)
    return 0


def show(question: Question, made: Compression) -> None:
    """Sizes, relevance and evidence, for a person."""
    console = Console()
    table = Table("tokens", "embeddings", "relevance", "passage", box=None, header_style="dim", pad_edge=False)
    for passage in made.passages:
        name = Text(name_of(question, passage.index))
        table.add_row(str(passage.tokens), str(passage.memory_tokens), f"{passage.relevance:.3f}", name)
    console.print(table)
    for passage in made.passages:
        print_evidence(console, question, passage)
    usage = made.usage
    console.print(
        f"{usage.memory_tokens} embeddings for {usage.text_tokens} tokens ({usage.rate:g} to one), {made.checkpoint}",
        style="dim",
        highlight=False,
    )
