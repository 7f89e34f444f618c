"""How long commands of the docs are made short enough for a test. What is not named here runs as it stands.

- `python -m service`, `scaledown serve`: settings are read, and nothing is started, because one service runs already.
- `service.benchmark`, `scaledown bench`: arguments are read by the command's own parser.
- `training train`: one step on tiny models in place of the configuration's. `start=checkpoints/demo`, which does not
  fit them, is left out: the notebook's test begins from it.
- `scaledown checkpoints verify`: the files only, because other commands load the same checkpoint.
- `training label`, `evaluate`: a tiny teacher, few questions, short answers.

A block that is marked as not run has the arguments of its commands read all the same.
"""

import os
import shlex
from collections.abc import Callable, Sequence

from service.__main__ import read_settings
from service.benchmark.__main__ import build_parser as benchmark_parser
from service.cli.__main__ import choose_parser as choose_command
from service.neuron_smoke import build_parser as neuron_parser
from service.sizing.__main__ import parser as sizing_parser
from training.__main__ import choose_parser as choose_training

SERVE = "DOCS_SERVE"
LABEL = ("--max-new-tokens", "2", "--device", "cpu")
EVALUATE = ("--limit", "6", "--rates", "16", "--max-new-tokens", "2", "--resamples", "10", "--cost-questions", "1")
TRAIN = (
    "loop.max_steps=1",
    "loop.batch_size=2",
    "loop.precision=fp32",
    "data.dev_questions=2",
    "data.answer_tokens=4",
)
PROGRAMS = ("python", "scaledown")


def shortened(name: str, arguments: Sequence[str]) -> list[str] | None:
    """The arguments to run a program with; None where reading them was all that is done."""
    module, rest = split(name, arguments)
    if (module == "service" and SERVE not in os.environ) or module in ("service.benchmark", "service.soak"):
        read(module, rest)
        return None
    if module == "training" and rest:
        return [*arguments, *_training_flags(rest)]
    if module == "service.cli" and rest[:2] == ["checkpoints", "verify"]:
        return [*arguments, "--files-only"]
    return list(arguments)


def _training_flags(rest: Sequence[str]) -> list[str]:
    generator, encoder = os.environ["TINY_GENERATOR"], os.environ["TINY_ENCODER"]
    match rest[0]:
        case "train" if "--help" not in rest:
            bases = [f"model.generator.base_model={generator}", f"model.compressor.base_model={encoder}"]
            return [*TRAIN, *bases, *(["start=''"] if "start=checkpoints/demo" in rest else [])]
        case "label" if "--help" not in rest:
            return [*LABEL, "--teacher", generator]
        case "evaluate" if "--help" not in rest:
            return list(EVALUATE)
    return []


def split(name: str, arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The module that a command runs, and its arguments; `scaledown`'s other names are put back to the modules'."""
    if name != "scaledown":
        return (arguments[1], list(arguments[2:])) if arguments[:1] == ["-m"] else ("", list(arguments))
    renamed = {"serve": "service", "train": "training", "bench": "service.benchmark"}
    command = arguments[0] if arguments else ""
    return (renamed[command], list(arguments[1:])) if command in renamed else ("service.cli", list(arguments))


def read(module: str, arguments: Sequence[str]) -> None:
    """Read a command's arguments with its own parser, which raises SystemExit where they are wrong."""
    readers: dict[str, Callable[[Sequence[str]], object]] = {
        "service": read_settings,
        "service.benchmark": benchmark_parser().parse_args,
        "service.cli": _read_command,
        "service.neuron_smoke": neuron_parser().parse_args,
        "service.sizing": sizing_parser().parse_args,
        "training": _read_training,
    }
    readers[module](arguments)


def _read_command(arguments: Sequence[str]) -> None:
    parser, rest = choose_command(arguments)
    parser.parse_args(rest)


def _read_training(arguments: Sequence[str]) -> None:
    parser, rest = choose_training(arguments)
    parser.parse_intermixed_args(rest)


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """Our commands in a shell block: the program's name, and its arguments; variables may stand before it."""
    joined = text.replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        for part in _parts(shlex.split(line, comments=True)):
            names = [word.rpartition("/")[2] for word in part]
            # Before the program: variables, and programs that run another (`docker compose run ... python`).
            start = next((index for index, name in enumerate(names) if name in PROGRAMS), None)
            if start is not None:
                found.append((names[start], part[start + 1 :]))
    return found


def _parts(words: Sequence[str]) -> list[list[str]]:
    """A line's words, cut where one command ends and another begins."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "||", "|", ";", "&", ">"):
            parts.append([])
        else:
            parts[-1].append(word)
    return parts
