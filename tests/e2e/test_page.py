"""The web page in a real browser, with real clicks and keys, against a real server process with a tiny model."""

import string
import time
from typing import Any

import httpx
import pytest
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from service.demo_question import PASSAGES
from tests.e2e.browser_page import KEY, Page, ask, needs_chromium

pytestmark = needs_chromium


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
            if any(character.isalnum() for character in words):  # the page marks words: not a face on its own
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


def test_hybrid_says_which_passage_was_shown_as_text(page: Page, server: httpx.Client) -> None:
    page.click("Load an example")
    page.click("hybrid")
    assert "most relevant as text" in page["mode-hint"].text
    page.type("tokens", "4")
    page.click("Answer")
    page.answered()
    expected = ask(server, mode="hybrid")["passages"]
    as_text = [state.startswith("Embeddings and text") for state in page.states()]
    assert as_text == [passage["mode"] == "hybrid" for passage in expected]
    assert sum(as_text) == 1
    for state, passage in zip(page.states(), expected, strict=True):
        assert f"({passage['tokens']} tokens)" in state
        assert state.endswith(
            "it is among the most relevant." if passage["mode"] == "hybrid" else "the mode asks for it."
        )
    assert page["plan"].text.startswith("4 compressed (rate 16), 1 as both. The mode decided.")
    (item,) = page.all("#passage-list > .hybrid")
    assert item.find_elements(By.CSS_SELECTOR, "mark, details")


def test_what_does_not_fit_the_budget_is_seen_to_be_dropped(page: Page, server: httpx.Client) -> None:
    budget = ask(server, mode="compressed")["usage"]["prompt_tokens"] - 1
    expected = ask(server, mode="compressed", max_prompt_tokens=budget)
    assert [passage["mode"] for passage in expected["passages"]].count("dropped") == 1
    page.click("Load an example")
    page.type("budget", str(budget))
    page.type("tokens", "4")
    page.click("Answer")
    page.answered()
    for item, sent, passage in zip(page.all("#passage-list > li"), PASSAGES, expected["passages"], strict=True):
        state = item.find_element(By.CLASS_NAME, "state").text
        if passage["mode"] == "dropped":
            assert state == "Dropped because it does not fit the prompt budget."
            assert not item.find_elements(By.CSS_SELECTOR, "mark, details")
        else:
            assert state == f"Compressed ({passage['tokens']} tokens) because the mode asks for it."
        assert item.find_element(By.CLASS_NAME, "passage-text").text == sent["text"]
    assert "4 compressed (rate 16), 1 dropped." in page["plan"].text
    assert f"{expected['usage']['prompt_tokens']:,} of " in page["facts"].text
    assert not page.severe()


def test_an_answer_from_no_passage_is_told_from_one_that_the_passages_hold(page: Page, server: httpx.Client) -> None:
    none = ask(server, min_relevance=1.0)
    assert none["plan"]["mode"] is None
    page.click("Load an example")
    page.type("budget", str(none["usage"]["prompt_tokens"]))
    page.type("tokens", "4")
    page.click("Answer")
    page.answered()
    assert page["verdict"].text == "All passages were dropped: this answer comes from none of them."
    assert page["verdict"].get_attribute("class") == "verdict doubtful"


def test_auto_says_why_and_what_was_not_scored(page: Page, server: httpx.Client) -> None:
    page.click("auto")
    page.type("query", "Who?")
    page.type("passages", "Iron.")
    page.type("tokens", "2")
    page.click("Answer")
    page.answered()
    expected = ask(server, query="Who?", passages=["Iron."], mode="auto")
    (passage,) = expected["passages"]
    assert (passage["mode"], passage["relevance"], expected["answerable"]) == ("text", None, None)
    assert page.all("#passage-list .relevance")[0].text == "relevance not scored"
    assert page.states()[0].endswith("because compressing it would not pay.")
    assert "not every passage was scored" in page["verdict"].text
    assert "Measured costs per token decided." in page["plan"].text
    budget = ask(server, mode="compressed")["usage"]["prompt_tokens"] + 150
    expected = ask(server, mode="auto", max_prompt_tokens=budget)
    page.click("Load an example")
    page.type("budget", str(budget))
    page.click("Answer")
    page.wait(lambda: len(page.states()) == 5)
    page.answered()
    assert "Relevance decided" in page["plan"].text
    modes = {
        "text": "Shown as text",
        "compressed": "Compressed",
        "hybrid": "Embeddings and text",
        "dropped": "Dropped",
    }
    for state, passage in zip(page.states(), expected["passages"], strict=True):
        assert state.startswith(modes[passage["mode"]])
    assert not page.severe()


def test_the_three_modes_are_compared(page: Page, server: httpx.Client) -> None:
    page.click("Load an example")
    page.type("tokens", "8")
    page.type("budget", "100")
    page.click("Compare the three")
    page.compared()
    assert [head.text for head in page.all("#comparison thead th")] == ["text", "hybrid", "compressed"]
    prompts = []
    for i, mode in enumerate(("text", "hybrid", "compressed")):
        expected = ask(server, mode=mode, max_new_tokens=8)  # the budget would make three other questions of it
        assert page.cells("Answer")[i].text.split() == expected["answer"].split()
        tokens = page.cells("Prompt tokens")[i].find_element(By.TAG_NAME, "b").text
        assert tokens == f"{expected['usage']['prompt_tokens']:,}"
        assert "8 written" in page.cells("Time")[i].text
        assert page.cells("Cost")[i].text == "no price given"
        prompts.append(expected["usage"]["prompt_tokens"])
    page.type("price", "2.5")
    costs = [cell.text for cell in page.cells("Cost")]
    assert [float(cost) for cost in costs] == pytest.approx([tokens * 2.5 / 1000 for tokens in prompts], rel=0.005)
    assert not page.severe()


def test_the_price_is_kept_and_only_the_price(page: Page, browser: Chrome) -> None:
    page.click("Load an example")
    page.type("tokens", "2")
    page.click("Compare the three")
    page.compared()
    page.type("price", "0.15")
    browser.refresh()
    page.wait(lambda: page["example"].is_enabled())
    assert page["price"].get_attribute("value") == "0.15"
    assert page.script("return Object.values(localStorage)") == ["0.15"]
    page["key"].send_keys(KEY)
    page.click("Load an example")
    page.type("tokens", "2")
    page.click("Compare the three")
    page.compared()
    assert float(page.cells("Cost")[0].text) > float(page.cells("Cost")[2].text) > 0
    page["price"].send_keys(Keys.CONTROL, "a", Keys.DELETE)
    assert page.cells("Cost")[0].text == "no price given"
    assert page.script("return localStorage.length") == 0


def test_what_is_typed_stays_text(page: Page, server: httpx.Client) -> None:
    hostile = "<img src=x onerror=window.hacked=1> <b>bold</b> 𝒳👩‍👩‍👧 Marie &amp; Pierre discovered polonium in 1898."
    page.script(f"document.getElementById('passages').value = {('# <i>title</i>' + chr(10) + hostile)!r}")
    page.type("query", query := "<script>window.hacked=1</script>Who?")
    page.type("tokens", "4")
    page.click("Answer")
    page.answered()
    assert page.all(".passage-text")[0].text == hostile
    assert page.all("#passage-list h3")[0].text == "<i>title</i>"
    assert not page.all("#passage-list img, #passage-list b:not(.relevance b, .state b), #passage-list i, main script")
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
    page.wait(lambda: page.problem() == "Passage 1 has a title but no text.")
    assert page["problem"].get_attribute("role") == "alert"
    page.type("passages", "Marie Curie.\n\n" + "long " * 9)
    page.type("query", "   ")
    page.click("Answer")
    page.wait(lambda: page.problem() == "The question is empty.")
    assert page["problem-where"].text.startswith("field query · request ")
    page.type("query", "Who?")
    page.type("budget", "2")
    page.click("Answer")
    page.wait(lambda: page.problem().startswith("The prompt budget is 2, but the prompt takes "))
    assert page["problem-where"].text.startswith("field max_prompt_tokens · request ")
    assert page["budget"].get_attribute("aria-invalid") == "true"
    assert page["query"].get_attribute("aria-invalid") is None
    assert browser.switch_to.active_element == page["budget"]
    page["budget"].clear()
    browser.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    try:
        page.click("Answer")
        page.wait(lambda: page.problem() == "The service cannot be reached.")
    finally:
        online = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", online)
    page.click("Answer")
    page.answered()
    assert not page.all("[aria-invalid]")


def test_a_key_is_asked_for_and_kept_nowhere(page: Page, browser: Chrome) -> None:
    page["key"].clear()
    page.click("Load an example")
    page.type("tokens", "2")
    page.click("Answer")
    page.wait(lambda: "asks for an API key" in page.problem())
    assert browser.switch_to.active_element == page["key"]
    browser.switch_to.active_element.send_keys("wrong-0123456789abcdef" + Keys.ENTER)
    page.wait(lambda: page.problem() == "This API key is not valid here.")
    page.type("key", KEY + Keys.ENTER)
    page.answered()
    stored = page.script("return [localStorage.length, sessionStorage.length, document.cookie]")
    assert stored == [0, 0, ""]
    browser.refresh()
    assert page["key"].get_attribute("value") == ""
