"""The site builds, strictly, shows the whole API, and loads nothing from elsewhere."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from service.__main__ import SECRETS
from service.settings import Settings
from tests.docs.conftest import ROOT, Workshop

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}


class Resources(HTMLParser):
    """What a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag loads."""
        self.found += [value for name, value in attrs if name == LOADED.get(tag) and value]


@pytest.fixture(scope="module")
def site(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    workshop.make_copy(folder / "copy")
    command = (
        f"python -m mkdocs build --strict --quiet --config-file {ROOT / 'mkdocs.yml'} --site-dir {folder / 'site'}"
    )
    done = workshop.run(command, folder / "copy", NO_MKDOCS_2_WARNING="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        resources = Resources()
        resources.feed(page.read_text(encoding="utf-8"))
        assert resources.found
        assert not [url for url in resources.found if re.match(r"(https?:)?//", url)], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style.name


def test_the_reference_is_of_the_application(site: Path) -> None:
    document = json.loads((site / "openapi.json").read_text(encoding="utf-8"))
    page = (site / "api.html").read_text(encoding="utf-8")
    assert {"/answer", "/rerank", "/compress", "/v1/chat/completions", "/v2/rerank"} <= set(document["paths"])
    for path in document["paths"]:
        assert f"<code>{path}</code>" in page
    for name, schema in document["components"]["schemas"].items():
        assert f'id="schema-{name.lower()}"' in page
        for field in schema.get("properties", ()):
            assert f"<code>{field}</code>" in page


def test_every_setting_is_shown(site: Path) -> None:
    page = (site / "settings.html").read_text(encoding="utf-8")
    for name in Settings.model_fields:
        assert f"<code>SCALEDOWN_{name.upper()}</code>" in page
    for name in SECRETS:
        assert f"--{name.replace('_', '-')}" not in page


def test_fields_are_described_and_bounded(site: Path) -> None:
    page = (site / "api.html").read_text(encoding="utf-8")
    answer = page[page.index('id="schema-answerrequest"') :]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", answer, re.DOTALL)]
    texts = dict(reversed([(cells[0], cells[-1]) for cells in rows if cells]))  # of equal names, the first one's
    for field in ("query", "mode", "hybrid_top", "max_prompt_tokens", "rate", "timeout", "max_new_tokens", "top_p"):
        assert texts[f"<code>{field}</code>"], field
    assert "integer (≥ 1)" in page
    assert "≥ 1.0" not in page
