"""The web page in a real browser, with real clicks and keys, against a real server process with a tiny model."""

import os
import shutil
import string
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from selenium.webdriver import Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from core.checkpoint import save_checkpoint
from core.config import CompressorConfig, Config, GeneratorConfig, RelevanceConfig
from core.model import build_model
from core.readouts import PointerReadout
from service.demo import PASSAGES, QUERY
from tests.e2e.test_process import running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
KEY = "page-0123456789abcdef"
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs Chromium: apt install chromium chromium-driver"
)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")  # containers have little of it
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses its sandbox to root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, Service(CHROMEDRIVER))
    yield driver
    driver.quit()


class Page:
    """The open page, by the ids and words a visitor would go by."""

    def __init__(self, browser: Chrome, url: str) -> None:
        self.browser = browser
        browser.get(url)
        self.wait(lambda: self["checkpoint"].text.startswith("checkpoint "))

    def __getitem__(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition: Any) -> None:
        WebDriverWait(self.browser, 60, poll_frequency=0.05).until(lambda _: condition())

    def type(self, name: str, text: str) -> None:
        field = self[name]
        field.clear()
        field.send_keys(text)

    def click(self, words: str) -> None:
        """Click the one visible button or choice that says `words`."""
        (target,) = [e for e in self.all("button, fieldset label") if e.is_displayed() and e.text == words]
        target.click()

    def said(self) -> str:
        """What a screen reader has just been told."""
        return self["status"].get_attribute("textContent") or ""

    def answered(self) -> None:
        self.wait(lambda: self["facts"].is_displayed() or self["problem"].is_displayed())
        assert not self["problem"].is_displayed(), self["problem"].text

    def script(self, code: str) -> Any:
        return self.browser.execute_script(code)

    def severe(self) -> list[str]:
        """What the browser complained about: policy violations, script errors, failed requests."""
        entries = self.browser.get_log("browser")  # type: ignore[no-untyped-call]  # selenium has not typed it
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


@pytest.fixture
def page(browser: Chrome, server: httpx.Client) -> Page:
    """The page, freshly loaded, its log empty, with the key typed in."""
    page = Page(browser, str(server.base_url))
    page.severe()
    page["key"].send_keys(KEY)
    return page


def ask(server: httpx.Client, **values: Any) -> dict[str, Any]:
    response = server.post("/answer", json={"query": QUERY, "passages": PASSAGES, "max_new_tokens": 24, **values})
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_the_example_is_answered_with_relevance_and_evidence(page: Page, server: httpx.Client) -> None:
    page.click("Load an example")
    assert page["count"].text == "5 passages"
    page["rate"].find_element(By.CSS_SELECTOR, "option[value='8']").click()
    page.type("tokens", "24")
    page.click("Answer")
    page.answered()
    expected = ask(server, rate=8, explain=True)
    assert page["answer"].text.split() == expected["answer"].split()
    assert page.said().startswith("The answer is complete.")
    assert f"{expected['usage']['prompt_tokens']:,} of {expected['usage']['text_tokens']:,}" in page["facts"].text
    assert ("seem to hold" in page["verdict"].text) == expected["answerable"]["answerable"]
    assert "untrained" in page["checkpoint"].text
    items = page.all("#passage-list > li")
    for item, sent, got in zip(items, PASSAGES, expected["passages"], strict=True):
        assert item.find_element(By.TAG_NAME, "h3").text == sent["title"]
        assert item.find_element(By.CSS_SELECTOR, ".relevance b").text == f"{got['relevance']:.2f}"
        fill = item.find_element(By.CSS_SELECTOR, ".relevance .fill")
        track = item.find_element(By.CSS_SELECTOR, ".relevance .bar")
        assert fill.size["width"] == pytest.approx(got["relevance"] * track.size["width"], abs=1.5)
        assert item.find_element(By.CLASS_NAME, "passage-text").text == sent["text"]
        assert item.find_element(By.TAG_NAME, "summary").text == f"{len(got['evidence'])} memory embeddings"
        check_marks(item, sent, got["evidence"])
    assert sum(len(item.find_elements(By.TAG_NAME, "mark")) for item in items) > 5
    assert not page.severe()


def check_marks(item: WebElement, sent: dict[str, str], evidence: list[list[dict[str, Any]]]) -> None:
    """Every marked word was pointed at, and what one embedding points at most sharply is marked."""
    spans = [span for embedding in evidence for span in embedding]
    for field, selector in (("title", "h3 mark"), ("text", ".passage-text mark")):
        pointed = [sent[field][s["start"] : s["end"]] for s in spans if s["field"] == field]
        marks = [mark.text for mark in item.find_elements(By.CSS_SELECTOR, selector)]
        for word in " ".join(marks).split():
            assert any(part in word or word in part for part in pointed), (word, pointed)
        sharp = [s for s in spans if s["field"] == field and s["weight"] > 0.6 and s["end"] - s["start"] < 8]
        for words in (sent[field][s["start"] : s["end"]].strip(string.punctuation) for s in sharp):
            assert any(words in mark for mark in marks), (words, marks)


def test_the_answer_grows_on_the_page_and_can_be_stopped(page: Page, browser: Chrome) -> None:
    page.click("Load an example")
    page.type("tokens", "512")
    page.script("""
        window.lengths = [];
        const answer = document.getElementById("answer");
        new MutationObserver(() => lengths.push(answer.textContent.length)).observe(answer, { childList: true });
    """)
    page.click("Answer")
    page.wait(lambda: len(set(page.script("return lengths"))) > 3)
    assert page["answer"].get_attribute("aria-busy") == "true"
    page.click("Stop")
    page.wait(lambda: page.said() == "Stopped.")
    assert page["answer"].get_attribute("aria-busy") == "false"
    assert not page["stop"].is_displayed()
    assert browser.switch_to.active_element == page["query"]
    length = len(page["answer"].text)
    time.sleep(0.3)
    assert len(page["answer"].text) == length > 0
    assert not page["problem"].is_displayed()


def test_the_three_modes_are_compared(page: Page, server: httpx.Client) -> None:
    page.click("Load an example")
    page.type("tokens", "8")
    page.click("Compare the three")
    page.wait(lambda: len(page.all("#comparison-rows .said")) == 3)
    for row, mode in zip(page.all("#comparison-rows tr"), ("text", "hybrid", "compressed"), strict=True):
        expected = ask(server, mode=mode, max_new_tokens=8)
        head, *cells = row.find_elements(By.CSS_SELECTOR, "th, td")
        assert mode in head.text
        assert cells[0].text.split() == expected["answer"].split()
        assert cells[1].find_element(By.TAG_NAME, "b").text == f"{expected['usage']['prompt_tokens']:,}"
        assert "8 written" in cells[2].text
    assert not page.severe()


def test_hybrid_says_which_passage_was_shown_as_text(page: Page, server: httpx.Client) -> None:
    page.click("Load an example")
    page.click("hybrid")
    page.type("tokens", "4")
    page.click("Answer")
    page.answered()
    shown = [item.text == "shown as text" for item in page.all("#passage-list .mode")]
    assert shown == [passage["mode"] == "text" for passage in ask(server, mode="hybrid")["passages"]]
    assert sum(shown) == 1
    (item,) = page.all("#passage-list > .text")
    assert not item.find_elements(By.CSS_SELECTOR, "mark, details")


def test_what_is_typed_stays_text(page: Page, server: httpx.Client) -> None:
    hostile = "<img src=x onerror=window.hacked=1> <b>bold</b> 𝒳👩‍👩‍👧 Marie &amp; Pierre discovered polonium in 1898."
    page.script(f"document.getElementById('passages').value = {('# <i>title</i>' + chr(10) + hostile)!r}")
    page.type("query", query := "<script>window.hacked=1</script>Who?")
    page.type("tokens", "4")
    page.click("Answer")
    page.answered()
    assert page.all(".passage-text")[0].text == hostile
    assert page.all("#passage-list h3")[0].text == "<i>title</i>"
    assert not page.all("#passage-list img, #passage-list b:not(.relevance b), #passage-list i, main script")
    assert page.script("return window.hacked") is None
    # The API counts code points, the page UTF-16 units: they differ behind 𝒳 and the family.
    sent = {"title": "<i>title</i>", "text": hostile}
    (expected,) = ask(server, query=query, passages=[sent], explain=True)["passages"]
    check_marks(page.all("#passage-list > li")[0], sent, expected["evidence"])
    assert not page.severe()


def test_problems_are_told_in_words(page: Page, browser: Chrome) -> None:
    page.type("query", "Who?")
    page.type("passages", "# Only a title")
    page.click("Answer")
    page.wait(lambda: page["problem"].text == "Passage 1 has a title but no text.")
    assert page["problem"].get_attribute("role") == "alert"
    page.type("passages", "Marie Curie.\n\n" + "long " * 9)
    page.type("query", "   ")
    page.click("Answer")
    page.wait(lambda: page["problem"].text == "The question is empty.")
    page.type("query", "Who?")
    browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        page.click("Answer")
        page.wait(lambda: page["problem"].text == "The service cannot be reached.")
    finally:
        online = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", online)
    page.click("Answer")
    page.answered()


def test_a_key_is_asked_for_and_kept_nowhere(page: Page, browser: Chrome) -> None:
    page["key"].clear()
    page.click("Load an example")
    page.type("tokens", "2")
    page.click("Answer")
    page.wait(lambda: "asks for an API key" in page["problem"].text)
    assert browser.switch_to.active_element == page["key"]
    browser.switch_to.active_element.send_keys("wrong-0123456789abcdef" + Keys.ENTER)
    page.wait(lambda: page["problem"].text == "This API key is not valid here.")
    page.type("key", KEY + Keys.ENTER)
    page.answered()
    stored = page.script("return [localStorage.length, sessionStorage.length, document.cookie]")
    assert stored == [0, 0, ""]
    browser.refresh()
    assert page["key"].get_attribute("value") == ""


def test_keys_alone_are_enough(page: Page, browser: Chrome) -> None:
    page.script("document.querySelector('.skip').focus()")
    reached = []
    for _ in range(9):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        element = browser.switch_to.active_element
        assert element.accessible_name
        width = page.script("return getComputedStyle(document.activeElement).outlineWidth")
        assert width == "2px" or element.get_attribute("type") == "radio"  # its label is outlined in its place
        reached.append(element.accessible_name)
    for name in ("Question", "Load an example", "Passages", "compressed", "Rate", "New tokens", "API key", "Answer"):
        assert name in reached
    page["query"].send_keys("Who?")
    page["passages"].send_keys("Marie Curie discovered polonium.", Keys.CONTROL, Keys.ENTER)
    page.answered()


def test_light_and_dark_wide_and_narrow(page: Page, browser: Chrome) -> None:
    page.click("Load an example")
    page.type("tokens", "2")
    page.click("Answer")
    page.answered()
    grounds = []
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        grounds.append(page.script("return getComputedStyle(document.body).backgroundColor"))
    assert len(set(grounds)) == 2
    for width in (320, 1280):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert page.script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
