"""Every block of the README and of docs/ is run, in a copy of the repository, or says why it is not.

One service stands for every `localhost:8000`. Long commands are made short as `shortening.py` says. The arguments of
all commands, also of those that are not run, are read by the commands' own parsers.
"""

import json
import re
import time
from pathlib import Path

import pytest

from tests.docs.blocks import Block, differences, read_blocks, read_examples
from tests.docs.conftest import ROOT, Workshop
from tests.docs.shortening import commands_of, read, split

PAGES = [ROOT / "README.md", ROOT / "docker" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"console", "json", "python", "sh"}
ADDRESS = re.compile(r"(?:localhost|127\.0\.0\.1):8000")
RUN = ("console", "python", "sh")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def copy(workshop: Workshop, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    workshop.make_copy(folder)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if any(not b.reason for b in read_blocks(page))], ids=name)
def test_blocks_run(page: Path, workshop: Workshop, service: str, copy: Path) -> None:
    for block in read_blocks(page):
        if block.language in RUN and block.reason is None:
            started = time.monotonic()
            run_block(block, workshop, service, copy, f"{page.name}:{block.line}")
            print(f"{page.name}:{block.line}: {time.monotonic() - started:.1f} s")  # noqa: T201  # for pytest -rP
        elif block.language == "json":
            json.loads(block.text)


def run_block(block: Block, workshop: Workshop, service: str, copy: Path, where: str) -> None:
    """Run one block; each command of a `console` block must print what the page shows, in shape."""
    text = ADDRESS.sub(service, block.text)
    variables = {"SCALEDOWN_URL": f"http://{service}"}
    if block.language == "python":
        (copy / "block.py").write_text(text, encoding="utf-8")
        text = "python block.py"
    if block.language != "console":
        done = workshop.run(text, copy, **variables)
        assert done.returncode == 0, f"{where}: {done.stdout}{done.stderr}"
        return
    for example in read_examples(text):
        done = workshop.run(example.command, copy, **variables)
        assert done.returncode == 0, f"{where}: {done.stdout}{done.stderr}"
        assert not differences(example.output, done.stdout), where


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_that_are_not_run_say_why(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = read_blocks(page)
    assert {block.language for block in blocks} <= LANGUAGES
    reasons = [block.reason for block in blocks if block.reason is not None]
    assert text.count("<!-- not run") == len(reasons), "a comment that belongs to no block, or gives no reason"
    assert all(len(reason.split()) > 2 for reason in reasons)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_arguments_are_those_of_the_commands(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for block in read_blocks(page):
        if block.language != "sh":
            continue
        for goal in re.findall(r"^make ([a-z-]+)", block.text, flags=re.MULTILINE):
            assert goal in targets
        for program, arguments in commands_of(block.text):
            module, rest = split(program, arguments)
            if module.partition(".")[0] in ("service", "training") and "--help" not in rest:
                read(module, rest)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    """Also for those who read a page where it lies: what `make docs` writes is only in the site."""
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_shapes_are_compared() -> None:
    shown = '{"answer": "1883", "usage": {"tokens": 5}, "passages": [{"id": null}]}'
    assert not differences(shown, '{"answer": "no", "usage": {"tokens": 7.5}, "passages": [{"id": "b"}]}')
    for other in ('{"answer": "1883"}', shown.replace("5", '"5"'), shown.replace('"id"', '"name"')):
        assert differences(shown, other)
    assert not differences("scaledown_requests 0.0", "scaledown_requests 3.0")
    assert differences("scaledown_requests 0.0", "scaledown_tokens 3.0")
    assert differences("one line", "two\nlines")
