"""`scaledown rerank`: passages, most relevant first."""

import argparse
from collections.abc import Sequence

from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from rich.text import Text

from service.cli.ask import each, name_of, open_client, print_json
from service.cli.flags import add_options, add_question, given_options
from service.cli.questions import Question, read_questions
from service.client import Ranking
from service.client.calls import RerankOptions


def choose_parser(arguments: Sequence[str], prog: str) -> tuple[argparse.ArgumentParser, Sequence[str]]:
    """The parser, and what it is to read."""
    parser = argparse.ArgumentParser(prog=prog, description="Put passages in order of their relevance to a question.")
    add_question(parser)
    add_options(parser, RerankOptions)
    return parser, arguments


def main(arguments: Sequence[str], prog: str) -> int:
    """Rerank; the exit status. Raises ServiceError and ScaledownError."""
    options = choose_parser(arguments, prog)[0].parse_intermixed_args(arguments)
    questions = read_questions(options.query, options.passages, options.input)
    given: RerankOptions = given_options(options, RerankOptions)
    with open_client(options) as client:
        for question, ranking in each(questions, lambda q: client.rerank(q.query, q.passages, **given)):
            if options.json:
                print_json(question, ranking)
            else:
                show(question, ranking)
    return 0


def show(question: Question, ranking: Ranking) -> None:
    """The order, for a person."""
    table = Table("", "relevance", "", "passage", box=None, header_style="dim", pad_edge=False)
    for place, passage in enumerate(ranking.results, 1):
        bar = Bar(1, 0, passage.relevance, width=12)
        table.add_row(str(place), f"{passage.relevance:.3f}", bar, Text(name_of(question, passage.index)))
    console = Console()
    console.print(Text(question.query, style="bold"))
    console.print(table)
