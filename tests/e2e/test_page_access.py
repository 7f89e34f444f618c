"""The web page by keys alone, in the accessibility tree, in light and dark, on narrow screens."""

from collections.abc import Iterator
from typing import Any

import pytest
from selenium.webdriver import Chrome, Keys

from service.demo_question import PASSAGES
from tests.e2e.browser_page import Page, needs_chromium

pytestmark = needs_chromium

# Of every visible element that holds text itself: the text, and the contrast of its colour with what it stands on.
CONTRASTS = """
    const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const luminance = (colour) => {
        const [r, g, b] = channels(colour).slice(0, 3).map((value) => {
            const share = value / 255;
            return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        for (let each = element; each; each = each.parentElement) {
            const colour = getComputedStyle(each).backgroundColor;
            if ((channels(colour)[3] ?? 1) === 1) return colour;
        }
        return "rgb(255, 255, 255)";
    };
    const found = [];
    for (const element of document.body.querySelectorAll("*")) {
        const own = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE);
        const typed = element.matches("input, textarea") ? element.value : "";
        const text = own.map((node) => node.data).join("").trim() || typed;
        if (!text || !element.checkVisibility() || element.matches("script, option, .visually-hidden, .skip")) continue;
        if (element.type === "radio") continue;  // transparent: its label is what is seen
        const [light, dark] = [getComputedStyle(element).color, ground(element)].map(luminance).sort((a, b) => b - a);
        found.push([text, (light + 0.05) / (dark + 0.05)]);
    }
    return found;
"""


@pytest.fixture
def emulated(browser: Chrome) -> Iterator[Chrome]:
    """The browser, for a test that changes its colours and size: both are put back."""
    yield browser
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def filled(page: Page) -> None:
    """Bring everything to the page that it can show: an answer, a dropped passage, a comparison, a problem."""
    page.click("Load an example")
    page.type("tokens", "2")
    page.click("Compare the three")
    page.compared()
    page.type("price", "1")
    page.type("budget", "150")
    page.click("Answer")
    page.answered()
    assert "Dropped" in page["passage-list"].text
    page.type("passages", "# Only a title")
    page.click("Answer")
    page.wait(lambda: page["problem"].is_displayed())
    assert page["passage-list"].is_displayed()
    page.wait(lambda: page.all("#charts .chart"))


def test_keys_alone_are_enough(page: Page, browser: Chrome) -> None:
    page.script("document.querySelector('.skip').focus()")

    def tab_to(name: str) -> None:
        for _ in range(30):
            browser.switch_to.active_element.send_keys(Keys.TAB)
            element = browser.switch_to.active_element
            assert element.accessible_name, element.get_attribute("outerHTML")
            width = page.script("return getComputedStyle(document.activeElement).outlineWidth")
            assert width == "2px" or element.get_attribute("type") == "radio"  # its label is outlined in its place
            if element.accessible_name.endswith(name):
                return
        raise AssertionError(f"no {name}")

    def press(*keys: str) -> None:
        browser.switch_to.active_element.send_keys(*keys)

    tab_to("Question")
    tab_to("Load an example")
    press(Keys.ENTER)
    assert page["query"].get_attribute("value")
    assert browser.switch_to.active_element == page["query"]
    tab_to("compressed")
    press(Keys.ARROW_RIGHT, Keys.NULL)
    press(Keys.ARROW_RIGHT, Keys.NULL)
    assert browser.switch_to.active_element.accessible_name == "text"
    press(Keys.ARROW_LEFT, Keys.NULL)
    tab_to("Rate")
    press(Keys.ARROW_DOWN)
    assert page["rate"].get_attribute("value") == "8"
    tab_to("Prompt budget")
    press("500")
    tab_to("New tokens")
    press(Keys.CONTROL, "a", Keys.NULL, "4")
    tab_to("API key")
    tab_to("Answer")
    press(Keys.SPACE)
    page.answered()
    assert sum(state.startswith("Embeddings and text") for state in page.states()) == 1
    tab_to(" memory embeddings")
    press(Keys.ENTER)
    (opened,) = page.all("details[open]")
    assert " 1.00" in opened.text
    page.script("document.querySelector('.skip').focus()")
    tab_to("Compare the three")
    press(Keys.ENTER)
    page.compared()
    tab_to("Price of a million prompt tokens")
    press("3")
    assert float(page.cells("Cost")[0].text) > 0
    page["passages"].send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait(lambda: page.said().startswith("The answer is complete."))


def test_the_accessibility_tree_names_what_there_is(page: Page, browser: Chrome) -> None:
    filled(page)
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    seen = [node for node in nodes if not node["ignored"]]

    def value(node: dict[str, Any], key: str) -> str:
        return str(node.get(key, {}).get("value", ""))

    def names(role: str) -> list[str]:
        return sorted(value(node, "name") for node in seen if value(node, "role") == role)

    sections = {"ScaleDown", "Answer", "Passages", "The same question, three ways", "This service, lately"}
    assert sections | {passage["title"] for passage in PASSAGES} == set(names("heading"))
    assert {"Question", "Passages", "API key"} <= set(names("textbox"))
    assert names("radio") == ["auto", "compressed", "hybrid", "text"]
    assert names("combobox") == ["Rate"]
    assert names("spinbutton") == ["New tokens", "Price of a million prompt tokens", "Prompt budget"]
    assert names("button") == ["Answer", "Compare the three", "Load an example"]
    assert names("form") == ["Question and passages"]
    assert names("table") == ["The same question, three ways"]
    assert names("columnheader") == ["compressed", "hybrid", "text"]
    assert names("rowheader") == ["Answer", "Cost of 1,000 such prompts", "Prompt tokens", "Time"]
    assert len([name for name in names("image") if name.startswith(("Requests/s: ", "Reserved tokens: "))]) == 2
    for landmark in ("main", "banner", "status", "alert"):
        assert len(names(landmark)) == 1, landmark
    for node in seen:
        focusable = any(p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", ()))
        if focusable and value(node, "role") not in ("RootWebArea", "generic"):
            assert value(node, "name"), node
    (budget,) = [
        node for node in seen if value(node, "name") == "Prompt budget" and value(node, "role") == "spinbutton"
    ]
    assert "do not fit are dropped" in value(budget, "description")
    invalid = [
        value(node, "name")
        for node in seen
        if any(p["name"] == "invalid" and p["value"].get("value") == "true" for p in node.get("properties", ()))
    ]
    assert invalid == ["Passages"]


def test_every_text_has_contrast_in_light_and_dark(page: Page, emulated: Chrome) -> None:
    filled(page)
    grounds = []
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        emulated.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        grounds.append(page.script("return getComputedStyle(document.body).backgroundColor"))
        contrasts = page.script(CONTRASTS)
        assert len(contrasts) > 80
        assert not [(text, ratio) for text, ratio in contrasts if ratio < 4.5], scheme
    assert len(set(grounds)) == 2


def test_nothing_is_wider_than_a_narrow_screen(page: Page, emulated: Chrome) -> None:
    filled(page)
    for width in (320, 360, 768, 1280):
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        emulated.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        assert page.script("return document.documentElement.scrollWidth") <= width
        ends = [e.rect["x"] + e.rect["width"] for e in page.all("button, input, select, textarea, th, td, figure")]
        assert max(ends) <= width
        page.script("document.getElementById('history-note').scrollIntoView()")
        assert page.script("return document.getElementById('form').getBoundingClientRect().bottom") <= page.script(
            "return document.getElementById('comparison').getBoundingClientRect().top"
        )  # the form stays in sight beside the passages, and lies over nothing below them
