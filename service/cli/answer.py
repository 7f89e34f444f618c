"""`scaledown answer`: the answer on standard output as it comes, what it was made from on standard error."""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from service.cli.ask import each, name_of, open_client, print_evidence, print_json
from service.cli.flags import add_options, add_question, given_options
from service.cli.questions import Question, read_questions
from service.client import Answer, AnswerOptions, Client, Done, Token

READ_AS = {"text": "text", "compressed": "embeddings", "hybrid": "embeddings and text", "dropped": "not read"}


def choose_parser(arguments: Sequence[str], prog: str) -> tuple[argparse.ArgumentParser, Sequence[str]]:
    """The parser, and what it is to read."""
    parser = argparse.ArgumentParser(prog=prog, description="Answer a question from passages.")
    add_question(parser)
    add_options(parser, AnswerOptions)
    parser.add_argument("--quiet", action="store_true", help="the answer only")
    return parser, arguments


def main(arguments: Sequence[str], prog: str) -> int:
    """Answer; the exit status. Raises ServiceError and ScaledownError."""
    options = choose_parser(arguments, prog)[0].parse_intermixed_args(arguments)
    questions = read_questions(options.query, options.passages, options.input)
    given: AnswerOptions = given_options(options, AnswerOptions)
    with open_client(options) as client:
        if len(questions) == 1 and not options.json:
            answer = stream_answer(client, questions[0], given)
            if not options.quiet:
                show(questions[0], answer)
            return 0
        for question, answer in each(questions, lambda q: client.answer(q.query, q.passages, **given)):
            if options.json:
                print_json(question, answer)
            else:
                print(answer.answer if options.quiet else f"{question.query}\n  {answer.answer}", flush=True)
    return 0


def stream_answer(client: Client, question: Question, options: AnswerOptions) -> Answer:
    """Write the answer as it comes; return all of it."""
    with client.stream(question.query, question.passages, **options) as events:
        for event in events:
            if isinstance(event, Token):
                sys.stdout.write(event.text)
                sys.stdout.flush()
    print(flush=True)
    assert isinstance(event, Done)  # the client raises where a stream ends in any other way
    return event.answer


def show(question: Question, answer: Answer) -> None:
    """The passages by their relevance, and what was saved, for a person."""
    console = Console(stderr=True)
    table = Table("relevance", "read as", "passage", box=None, header_style="dim", pad_edge=False)
    for passage in sorted(answer.passages, key=lambda passage: -(passage.relevance or 0)):
        relevance = "" if passage.relevance is None else f"{passage.relevance:.3f}"
        table.add_row(relevance, READ_AS[passage.mode], Text(name_of(question, passage.index)))
    console.print(table)
    for passage in answer.passages:
        print_evidence(console, question, passage)
    usage = answer.usage
    console.print(
        f"{usage.prompt_tokens} tokens read instead of {usage.text_tokens}, {usage.completion_tokens} written, "
        f"{answer.timings_ms.get('total', 0):.0f} ms, {answer.checkpoint}",
        style="dim",
        highlight=False,
    )
    if all(passage.mode == "dropped" for passage in answer.passages):
        console.print("All passages were left out: the answer comes from none of them.", style="yellow")
    elif answer.answerable is not None and not answer.answerable.answerable:
        console.print("The passages do not seem to hold an answer.", style="yellow")
