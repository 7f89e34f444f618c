"""Our Dockerfiles read as instructions, and which files `.dockerignore` lets into a build."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCKER = ROOT / "docker"
Step = tuple[str, str]  # an instruction and its arguments, continued lines joined


def steps(file: str) -> list[Step]:
    """All instructions of a Dockerfile, comments left out."""
    lines = [line for line in (DOCKER / file).read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(line.split()[0], line.split(maxsplit=1)[1].strip()) for line in text.splitlines() if line.strip()]


def defaults(file: str) -> dict[str, str]:
    """What build arguments are where none is given."""
    given = (arguments.partition("=") for name, arguments in steps(file) if name == "ARG")
    return {name: value for name, equals, value in given if equals}


def expand(text: str, values: dict[str, str]) -> str:
    """`${NAME}` replaced; a KeyError where there is no such name."""
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)


def stages(file: str) -> dict[str, list[Step]]:
    """Instructions of each stage by its name; the first one of each is its FROM."""
    found: dict[str, list[Step]] = {}
    for instruction, arguments in steps(file):
        if instruction == "FROM":
            found[arguments.split(" AS ")[1]] = current = []
        if found:
            current.append((instruction, arguments))
    return found


def base_of(file: str, stage: str) -> str:
    """The stage, or the outside image, that a stage is built on."""
    return expand(stages(file)[stage][0][1].split(" AS ")[0], defaults(file))


def inherited(file: str, stage: str) -> list[Step]:
    """Instructions of a stage and of those it is built on, in order."""
    base, named = base_of(file, stage), stages(file)
    return (inherited(file, base) if base in named else []) + named[stage]


def build_context() -> set[Path]:
    """Files, relative to the root, that reach a build. `.dockerignore` keeps out what it does not name with a `!`."""
    first, *patterns = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert first == "*"
    context: set[Path] = set()
    for pattern in patterns:
        if pattern.startswith("!"):
            found = ROOT.glob(pattern.removeprefix("!"))
            inside = (path.rglob("*") if path.is_dir() else [path] for path in found)
            context |= {file.relative_to(ROOT) for files in inside for file in files if file.is_file()}
        else:
            name = pattern.removeprefix("**/")
            assert "/" not in name
            context -= {file for file in context if name in file.parts}
    return context
