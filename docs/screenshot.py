"""Takes docs/page.png and docs/page-comparison.png: the page's own example on a running service, in headless Chromium.

python docs/screenshot.py http://localhost:8000 [auto|compressed|hybrid|text] [prompt budget]
"""

import base64
import os
import shutil
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

WIDTH, HEIGHT = 1280, 920
FOLDER = Path(__file__).parent
POINTS = 4  # readings of the metrics after the comparison, so that its end is in the lines


def main(url: str, mode: str = "compressed", budget: str = "") -> None:
    """Answer the example and compare the modes; save what a visitor sees, first in light colours, then in dark."""
    options = ChromeOptions()
    for flag in ("--headless=new", "--hide-scrollbars", "--disable-lcd-text", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(flag)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses its sandbox to root
    browser = Chrome(options, Service(shutil.which("chromedriver")))
    wait = WebDriverWait(browser, 600)
    metrics = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    try:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(url)
        example = browser.find_element(By.ID, "example")
        wait.until(lambda _: example.is_enabled())
        example.click()
        browser.find_element(By.CSS_SELECTOR, f"input[value={mode}]").click()
        browser.find_element(By.ID, "budget").send_keys(budget)
        browser.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
        wait.until(lambda _: browser.find_element(By.ID, "facts").is_displayed())
        browser.execute_script("scrollTo(0, 0)")
        save(browser, "page.png", 0, HEIGHT)
        browser.find_element(By.ID, "compare").click()
        wait.until(lambda _: len(browser.find_elements(By.CSS_SELECTOR, "#comparison-rows .said")) == 3)
        browser.find_element(By.ID, "price").send_keys("1")
        before = readings(browser)
        wait.until(lambda _: readings(browser) >= before + POINTS)
        media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        top = browser.find_element(By.ID, "comparison").rect["y"] - 40
        bottom = browser.find_element(By.ID, "history-note").rect
        save(browser, "page-comparison.png", top, bottom["y"] + bottom["height"] + 40 - top)
    finally:
        browser.quit()


def readings(browser: Chrome) -> int:
    """How many readings of the metrics the page shows."""
    lines = browser.find_elements(By.CSS_SELECTOR, "#charts .line")
    return (lines[0].get_attribute("d") or "").count(" ") if lines else 0


def save(browser: Chrome, name: str, top: float, height: float) -> None:
    """Save the page from `top` on, as a picture in this folder."""
    clip = {"x": 0, "y": top, "width": WIDTH, "height": height, "scale": 1}
    command = {"captureBeyondViewport": True, "clip": clip}
    data = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", command)["data"])
    Image.open(BytesIO(data)).quantize(256).save(FOLDER / name, optimize=True)  # a palette: a third of the size


if __name__ == "__main__":
    main(*sys.argv[1:])
