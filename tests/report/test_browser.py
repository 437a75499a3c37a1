"""The page in a real browser: nothing fails, every figure is seen, a phone needs no sideways scrolling."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from resq.report.report import Written

# Beside one of one's own, CHROME=/path/to/chrome, and what fetch_browser.py puts into this folder.
FETCHED = Path(__file__).parents[2] / "build" / "browser" / "chrome"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SIZES = {"desktop": (1280, 900), "tablet": (768, 1024), "phone": (390, 844)}
# What a page looks like from inside; text wider than its figure would be cut off.
LOOK = """() => {
  const box = element => { const b = element.getBoundingClientRect(); return [b.width, b.height, b.left, b.right]; };
  const outside = [];
  for (const svg of document.querySelectorAll('figure svg')) {
    const frame = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll('text')) {
      const b = text.getBoundingClientRect();
      if (b.left < frame.left - 1 || b.right > frame.right + 1 || b.top < frame.top - 1 || b.bottom > frame.bottom + 1)
        outside.push(text.textContent);
    }
  }
  return {
    wide: document.documentElement.scrollWidth - window.innerWidth,
    figures: [...document.querySelectorAll('figure svg')].map(box),
    marks: [...document.querySelectorAll('figure svg')].map(svg => svg.querySelectorAll('path, use').length),
    captions: [...document.querySelectorAll('figcaption')].map(box),
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.querySelector('figure svg text')).fill,
    line: getComputedStyle(document.querySelector('[style*="--series-0"]')).stroke,
    smallest: Math.min(...[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height)),
    outside,
  };
}"""


def executable() -> str | None:
    found = [os.environ.get("CHROME"), str(FETCHED) if FETCHED.is_file() else None, *map(shutil.which, NAMES)]
    return next((path for path in found if path), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = executable()
    if path is None:
        pytest.skip("no browser; apt install chromium, or python tests/report/fetch_browser.py build/browser")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def page_file(written: Written) -> Path:
    return written.html


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_figure_is_seen(browser: Browser, page_file: Path, size: str, scheme: str) -> None:
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)  # pyright: ignore[reportArgumentType]
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("requestfailed", lambda request: said.append(request.url))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    seen = page.evaluate(LOOK)
    assert not said
    assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
    assert seen["wide"] <= 0
    assert len(seen["figures"]) > 15
    for (wide, tall, left, right), marks in zip(seen["figures"], seen["marks"], strict=True):
        assert wide > 250
        assert tall > 120
        assert left >= 0
        assert right <= width
        assert marks > 5
    assert not seen["outside"]
    assert seen["smallest"] >= 9  # CSS pixels
    assert seen["paper"] == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
    assert seen["ink"] == ("rgb(27, 31, 36)" if scheme == "light" else "rgb(230, 233, 237)")
    assert seen["line"] == ("rgb(11, 98, 164)" if scheme == "light" else "rgb(98, 178, 242)")
    page.close()


def test_wide_tables_scroll_inside_themselves_and_open_by_keyboard(browser: Browser, page_file: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(page_file.as_uri())
    region = page.locator(".scroll").first
    assert region.evaluate("element => element.scrollWidth > element.clientWidth")
    region.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('.scroll').scrollLeft > 0")
    summary = page.locator("summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("figure table").first.is_visible()
    page.evaluate("() => document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    page.close()
