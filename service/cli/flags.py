"""Flags of the options that the client's calls take, and of how the service is reached: each declared once."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from service.client.connection import DEFAULT_URL, URL
from service.client.results import Mode

EXPLAIN = {"action": "store_true", "help": "also say which words each embedding was read from"}
FLAGS: Mapping[str, Mapping[str, Any]] = {
    "mode": {
        "choices": get_args(Mode),
        "help": "how passages reach the generator; hybrid: the best as text too; auto: each in the form that costs"
        " less, by costs measured at the start; usually only very short ones stay text",
    },
    "hybrid_top": {"type": int, "help": "with --mode hybrid: passages shown as text too"},
    "max_prompt_tokens": {"type": int, "help": "longest prompt; what does not fit is compressed or left out"},
    "min_relevance": {"type": float, "help": "leave out passages that are less relevant, 0 to 1"},
    "hops": {
        "type": int,
        "choices": (1, 2),
        "help": "2: for questions that need two passages: all but the best are read again, for the query and that one",
    },
    "rate": {"type": int, "help": "compression rate: one of the checkpoint's"},
    "max_new_tokens": {"type": int, "help": "longest answer"},
    "temperature": {"type": float, "help": "0: always the likeliest token"},
    "top_p": {"type": float, "help": "sample from the likeliest tokens that make up this share"},
    "top_k": {"type": int, "help": "sample from so many tokens; 0: no limit"},
    "seed": {"type": int, "help": "makes sampling repeatable"},
    "stop": {"action": "append", "help": "the answer ends before this text; may be repeated"},
    "explain": EXPLAIN,
    "timeout": {"type": float, "help": "deadline in the service, in seconds; its answer is waited for 10 s longer"},
    "dtype": {"choices": ("float32", "float16"), "help": "number format of the embeddings"},
    "store": {"action": "store_true", "help": "also keep the embeddings in the service, by an id"},
    "top_n": {"type": int, "help": "only the best so many"},
}


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """A flag for every option in the TypedDict `kind`. One that is not given has the service's default."""
    for name in kind.__annotations__:
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **FLAGS[name])


def given_options(options: argparse.Namespace, kind: type) -> Any:
    """What was given of the options in `kind`."""
    return {name: value for name, value in vars(options).items() if name in kind.__annotations__}


def add_url(parser: Any) -> None:
    """Which service is asked."""
    parser.add_argument("--url", help=f"the service (default: {URL}, else {DEFAULT_URL})")


def add_question(parser: argparse.ArgumentParser) -> None:
    """What is asked, and of which service."""
    parser.add_argument("query", nargs="?", help="the question")
    parser.add_argument("passages", nargs="*", metavar="passage", help="its passages, as texts")
    parser.add_argument(
        "--input", type=Path, metavar="FILE", help="JSON, JSON lines or text; - or none: standard input, if piped"
    )
    where = parser.add_mutually_exclusive_group()
    add_url(where)
    where.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="load this checkpoint here and ask no service")
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """How results are written."""
    parser.add_argument("--json", action="store_true", help="results as JSON, one line each")
