"""The web page, open in Chromium, as a visitor works it: by ids and words, clicks and keys."""

import os
import shutil
from typing import Any

import httpx
import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from service.demo_question import PASSAGES, QUERY

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
KEY = "page-0123456789abcdef"
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="needs Chromium: apt install chromium chromium-driver"
)


def start_browser() -> Chrome:
    """A headless Chromium that keeps its log."""
    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.add_argument("--headless=new")
    options.add_argument("--disable-dev-shm-usage")  # containers have little of it
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses its sandbox to root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options, Service(CHROMEDRIVER))


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
        # The page may draw itself anew between the finding of an element and the reading of it.
        patient = WebDriverWait(self.browser, 60, 0.05, ignored_exceptions=[StaleElementReferenceException])
        patient.until(lambda _: condition())

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

    def problem(self) -> str:
        """What the page says went wrong, without where; empty where nothing did."""
        return self["problem-words"].text

    def answered(self) -> None:
        self.wait(lambda: self["facts"].is_displayed() or self["problem"].is_displayed())
        assert not self["problem"].is_displayed(), self["problem"].text

    def compared(self) -> None:
        self.wait(lambda: len(self.all("#comparison-rows .said")) == 3 or self["problem"].is_displayed())
        assert not self["problem"].is_displayed(), self["problem"].text

    def states(self) -> list[str]:
        """For each passage, how it was shown and why."""
        return [state.text for state in self.all("#passage-list .state")]

    def cells(self, head: str) -> list[WebElement]:
        """A row of the comparison: its cells in `text`, `hybrid` and `compressed`."""
        (row,) = [each for each in self.all("#comparison-rows tr") if each.text.startswith(head)]
        return row.find_elements(By.TAG_NAME, "td")

    def script(self, code: str) -> Any:
        return self.browser.execute_script(code)

    def severe(self) -> list[str]:
        """What the browser complained about: policy violations, script errors, failed requests."""
        entries = self.browser.get_log("browser")  # type: ignore[no-untyped-call]  # selenium has not typed it
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


def ask(server: httpx.Client, **values: Any) -> dict[str, Any]:
    """What the service answers to the example, without the page."""
    response = server.post("/answer", json={"query": QUERY, "passages": PASSAGES, "max_new_tokens": 24, **values})
    assert response.status_code == 200, response.text
    return dict(response.json())
