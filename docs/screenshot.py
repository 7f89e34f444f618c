"""Takes docs/page.png: the page's own example, answered by a running service, in headless Chromium.

python docs/screenshot.py http://localhost:8000 [compressed|hybrid|text]
"""

import shutil
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

WIDTH, HEIGHT = 1280, 860
OUT = Path(__file__).parent / "page.png"


def main(url: str, mode: str) -> None:
    """Load the example, answer it, and save what a visitor sees."""
    options = ChromeOptions()
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--hide-scrollbars",
        "--disable-lcd-text",
        f"--window-size={WIDTH},{HEIGHT}",
    ):
        options.add_argument(flag)
    browser = Chrome(options, Service(shutil.which("chromedriver")))
    try:
        browser.get(url)
        example = browser.find_element(By.ID, "example")
        WebDriverWait(browser, 30).until(lambda _: example.is_enabled())
        example.click()
        browser.find_element(By.CSS_SELECTOR, f"input[value={mode}]").click()
        browser.find_element(By.CSS_SELECTOR, "button[type=submit]").click()
        WebDriverWait(browser, 300).until(lambda _: browser.find_element(By.ID, "facts").is_displayed())
        metrics = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.execute_script("scrollTo(0, 0)")
        shot = Image.open(BytesIO(browser.get_screenshot_as_png()))
        shot.quantize(128).save(OUT, optimize=True)  # a palette: a third of the size
    finally:
        browser.quit()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "compressed")
