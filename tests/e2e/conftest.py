"""What the tests of the web page share: one service with a tiny model, one browser, a fresh page for each."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from selenium.webdriver import Chrome

from core.checkpoint import save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig, RelevanceConfig
from core.model import build_model
from core.readouts import PointerReadout
from tests.e2e.browser_page import KEY, Page, start_browser
from tests.e2e.test_process import running


@pytest.fixture(scope="session")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service that asks for a key, around a random pointer that has made up its mind."""
    config = Config(
        compressor=CompressorConfig(n_layers=1, chunk_tokens=64, rates=(16, 8), readout="pointer", pointer_window=2),
        generator=GeneratorConfig(base_model=str(tiny_llama)),
        relevance=RelevanceConfig(threshold=0.5),
    )
    model = build_model(config, seed=7)
    assert isinstance(model.compressor.readout, PointerReadout)
    with torch.no_grad():
        model.compressor.readout.query.weight.mul_(8)
    folder = tmp_path_factory.mktemp("page") / "pointer"
    save_checkpoint(model, folder)
    with running(folder, api_keys=KEY) as (_, client, _):
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield client


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    """One browser for all tests; a test that changes more of it than the page puts that back."""
    driver = start_browser()
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Chrome, server: httpx.Client) -> Page:
    """The page, freshly loaded, its log empty, nothing kept, with the key typed in."""
    page = Page(browser, str(server.base_url))
    page.script("localStorage.clear()")
    browser.refresh()
    page.wait(lambda: page["checkpoint"].text.startswith("checkpoint "))
    page.severe()
    page["key"].send_keys(KEY)
    return page
