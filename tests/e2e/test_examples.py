"""Every file of examples/ against a live service with the shipped checkpoint: one server for all of them."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.app import create_app
from service.loading import load_model
from service.settings import SHIPPED
from tests.service.conftest import make_settings, serve_app

EXAMPLES = sorted(path.stem for path in (Path(__file__).parents[2] / "examples").glob("*.py"))
BRIDGE = "The stone bridge over the Aare was opened to traffic in 1883, after three years."
BREAD = "Bread is made of flour, water, salt and yeast, and is baked until its crust is brown."


@pytest.fixture(scope="module")
def demo(smollm2: Path) -> Iterator[httpx.Client]:
    """A service with the shipped checkpoint."""
    # Costs are given, because measuring them takes a while.
    settings = make_settings(checkpoint=SHIPPED, compressor_token_us=10, prefill_token_us=100)
    with serve_app(create_app(settings, load_model(settings))) as client:
        yield client


def test_there_is_an_example_for_every_adapter() -> None:
    assert EXAMPLES == ["haystack_rag", "langchain_rag", "llamaindex_rag"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(
    name: str, demo: httpx.Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCALEDOWN_URL", str(demo.base_url))
    importlib.import_module(f"examples.{name}").main()
    answer, saved, *passages = capsys.readouterr().out.splitlines()
    assert answer.strip()
    found = re.fullmatch(r"(\d+) tokens saved", saved)
    assert found is not None
    assert int(found[1]) > 0
    relevance = {line.split()[-1]: float(line.split()[0]) for line in passages}
    assert len(passages) == 2
    assert relevance["aare"] == max(relevance.values())
    asked = {"query": "When was the bridge over the Aare opened?", "passages": [BRIDGE, BREAD], "max_new_tokens": 32}
    direct = demo.post("/answer", json=asked).json()
    assert direct["answerable"]["answerable"] is True
    assert answer == direct["answer"]
