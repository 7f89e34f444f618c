"""The web page's history of metrics: read from /metrics while the page is seen, and never in the way of the rest."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from selenium.webdriver import Chrome
from selenium.webdriver.remote.webelement import WebElement

from tests.e2e.browser_page import KEY, Page, needs_chromium

pytestmark = needs_chromium
TWO_READINGS = """
    const done = arguments[arguments.length - 1];
    import("/page/prometheus.js").then((prometheus) => done(judge(prometheus)), (error) => done(String(error)));
"""


def image(page: Page, title: str) -> WebElement:
    (found,) = [each for each in page.all("#charts svg") if each.accessible_name.startswith(f"{title}: ")]
    return found


def in_browser(browser: Chrome, judge: str) -> Any:
    """What `judge`, a JavaScript function of the page's parser, returns."""
    return browser.execute_async_script(f"const judge = ({judge});" + TWO_READINGS)


@pytest.fixture
def fetching(browser: Chrome) -> Iterator[Any]:
    """Call it with JavaScript that answers in the place of /metrics, from the next page on."""
    scripts = []

    def answer_metrics(response: str) -> None:
        source = f"""
            const real = window.fetch;
            window.fetch = (path, ...rest) => path === "metrics" ? Promise.resolve({response}) : real(path, ...rest);
        """
        command = "Page.addScriptToEvaluateOnNewDocument"
        scripts.append(browser.execute_cdp_cmd(command, {"source": source})["identifier"])

    yield answer_metrics
    for identifier in scripts:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": identifier})


def test_lines_grow_while_questions_are_asked(page: Page, server: httpx.Client) -> None:
    page.wait(lambda: page.all("#charts .chart"))
    assert image(page, "Requests/s").accessible_name == "Requests/s: nothing yet"
    page.click("Load an example")
    page.type("tokens", "2")
    page.click("Answer")
    page.answered()
    page.wait(lambda: "highest" in image(page, "Time to first token, p50").accessible_name)
    page.wait(lambda: "highest 0," not in image(page, "Requests/s").accessible_name + ",")
    saved = image(page, "Prompt tokens saved").accessible_name
    assert "highest 0\u00a0%" not in saved
    assert saved.endswith("%")
    page.wait(lambda: "L" in (page.all("#charts .line")[0].get_attribute("d") or ""))
    assert "read from /metrics every 5 seconds" in page["history-note"].text
    assert [caption.text.split("\n")[0] for caption in page.all("#charts figcaption")] == [
        "Requests/s",
        "Errors/s",
        "Prompt tokens saved",
        "Time to first token, p50",
        "Requests in flight",
        "Reserved tokens",
    ]
    assert not page.severe()


def test_nothing_is_read_while_the_page_is_hidden(page: Page, browser: Chrome, server: httpx.Client) -> None:
    def readings() -> float:
        for family in text_string_to_metric_families(server.get("/metrics").text):
            for sample in family.samples:
                if sample.name == "scaledown_requests_total" and sample.labels["route"] == "/metrics":
                    return sample.value
        return 0

    page.wait(lambda: page.all("#charts .chart"))
    page.script("document.onvisibilitychange = () => window.seen = document.visibilityState")
    own = browser.current_window_handle
    browser.switch_to.new_window("tab")
    try:
        browser.execute_cdp_cmd("Page.bringToFront", {})
        time.sleep(1)
        before = readings()
        time.sleep(12)  # two readings would have come
        assert readings() - before == 1  # this one's own
    finally:
        browser.close()
        browser.switch_to.window(own)
    assert page.script("return window.seen") is not None  # it had been hidden
    page.wait(lambda: not page.script("return document.hidden"))
    page.wait(lambda: "highest" in image(page, "Requests/s").accessible_name)  # and it goes on


@pytest.mark.parametrize(
    ("response", "words"),
    [
        ("new Response('no', {status: 403})", "The service does not show its metrics here (status 403)."),
        ("new Response('<!doctype html><p>Log in')", "The service does not show its metrics here (status 200)."),
    ],
)
def test_metrics_that_are_refused_break_nothing(
    browser: Chrome, server: httpx.Client, fetching: Any, response: str, words: str
) -> None:
    fetching(response)
    page = Page(browser, str(server.base_url))
    page.severe()
    page.wait(lambda: page["history-note"].text == words)
    page["key"].send_keys(KEY)
    page.click("Load an example")
    page.type("tokens", "2")
    page.click("Answer")
    page.answered()
    assert page["history-note"].text == words
    assert not page.severe()


def test_the_history_is_bounded(browser: Chrome, server: httpx.Client, fetching: Any) -> None:
    """Timers run a hundred times as fast, and /metrics counts one request more each time it is read."""
    fetching('new Response(`scaledown_requests_total{route="/answer",status="200"} ${window.reads = -~window.reads}`)')
    hurry = "const slow = window.setTimeout; window.setTimeout = (what, ms) => slow(what, ms / 100);"
    identifier = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": hurry})["identifier"]
    try:
        page = Page(browser, str(server.base_url))
        page.wait(lambda: page.script("return window.reads") > 130)
        path = page.all("#charts .line")[0].get_attribute("d") or ""
        assert path.count("L") == 119
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": identifier})


def test_the_format_is_read_as_prometheus_writes_it(page: Page, browser: Chrome, server: httpx.Client) -> None:
    text = server.get("/metrics").text
    browser.execute_script("window.text = arguments[0]", text)
    values = in_browser(
        browser, "({parse}) => [...parse(text).values()].map(({name, labels, value}) => [name, labels, String(value)])"
    )
    expected = [
        (sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    assert len(values) == len(expected) > 100
    for (name, labels, value), (its_name, its_labels, its_value) in zip(values, expected, strict=True):
        assert (name, labels) == (its_name, its_labels)
        assert float(value.replace("Infinity", "inf")) == its_value


def test_labels_may_hold_any_sign(page: Page, browser: Chrome) -> None:
    browser.execute_script(r"""window.text = '# HELP a b\na{x="1} \\"q\\" \\\\n",y="\\n"} 2\nwrong\nb NaN\nc +Inf\n'""")
    values = in_browser(
        browser, "({parse}) => [...parse(text).values()].map(({labels, value}) => [labels, String(value)])"
    )
    assert values == [[{"x": '1} "q" \\n', "y": "\n"}, "2"], [{}, "Infinity"]]


def test_counters_may_begin_anew_and_a_quantile_lies_within_its_bucket(page: Page, browser: Chrome) -> None:
    browser.execute_script("""
        const buckets = (...counts) => counts.map((n, i) => `h_bucket{le="${["1", "3", "+Inf"][i]}"} ${n}`).join("\\n");
        window.before = 'n{a="1"} 10\\nn{a="2"} 5\\n' + buckets(2, 2, 2);
        window.now = 'n{a="1"} 14\\nn{a="2"} 1\\nn{a="3"} 7\\n' + buckets(3, 6, 6);
    """)
    read = "const [b, n] = [before, now].map(parse);"
    growth = in_browser(browser, f"({{parse, increase}}) => {{ {read} return increase(b, n, 'n'); }}")
    assert growth == 4 + 1 + 7  # the second began anew, the third is new
    quantile = f"({{parse, quantile}}) => {{ {read} return [quantile(b, n, 'h', 0.5), quantile(n, n, 'h', 0.5)]; }}"
    # One value up to 1 and three up to 3: the second of four is a third of the way through the second bucket.
    assert in_browser(browser, quantile) == [pytest.approx(1 + 2 / 3), None]
