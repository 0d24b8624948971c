"""The page as a browser shows it, on a desk and on a phone."""

import pathlib
import shutil

import pytest
from report_folders import fill_folder

from advmeta import report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to start")
SIZES = {"desk": (1200, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The page of a run, and one that compares it with another."""
    first, second, both = (tmp_path_factory.mktemp("runs") / name for name in ("a", "b", "both"))
    for folder in (first, second):
        folder.mkdir()
        fill_folder(folder)
    (second / "config.json").write_text('{"seed": 1, "tasks": [{"epsilon": 0.2}]}')
    return {"one": report.write(first), "both": report.compare([first, second], both)}


@pytest.fixture(params=[(name, size) for name in ("one", "both") for size in SIZES])
def opened(request, browser, pages):
    """A page in a tab, what its console said, and what it asked for."""
    name, size = request.param
    width, height = SIZES[size]
    tab = browser.new_page(viewport={"width": width, "height": height})
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(pages[name].as_uri())
    yield tab, said, asked
    tab.close()


def test_the_console_is_silent_and_nothing_else_is_asked_for(opened):
    tab, said, asked = opened
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [tab.url]


def test_the_page_is_not_wider_than_the_window(opened):
    tab, *_ = opened
    width = tab.viewport_size["width"]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # What is wider scrolls in a box of its own, and no figure needs that.
    boxes = tab.locator(".panels svg").evaluate_all(
        "all => all.map(e => [e.getBoundingClientRect().left, e.getBoundingClientRect().right])"
    )
    assert boxes and all(0 <= left < right <= width for left, right in boxes)


def test_the_figures_are_there_and_large_enough_to_read(opened):
    tab, *_ = opened
    sizes = tab.locator(".panels svg").evaluate_all(
        "all => all.map(e => [e.getBoundingClientRect().width, e.getBoundingClientRect().height])"
    )
    assert len(sizes) >= 6
    assert all(width >= 250 and height >= 90 for width, height in sizes)
    marks = tab.locator(".panels svg").evaluate_all(
        "all => all.map(e => e.querySelectorAll('image').length * 10"
        " + e.querySelectorAll('path, use').length)"
    )
    assert all(count > 5 for count in marks)
    # Axes' names and numbers are text, at least seven pixels tall on a phone.
    heights = tab.locator(".panels svg text").evaluate_all(
        "all => all.filter(e => e.textContent.trim()).map(e => e.getBoundingClientRect().height)"
    )
    assert min(heights) >= 7
    assert "mathdefault" not in tab.inner_text("body")


def test_folds_open_and_the_table_s_first_column_stays(opened):
    tab, *_ = opened
    table = tab.locator(".transfer").locator("xpath=..")
    head = tab.locator(".transfer tbody th").first
    before = head.bounding_box()["x"]
    table.evaluate("e => { e.scrollLeft = 200 }")
    assert abs(head.bounding_box()["x"] - before) < 1
    fold = tab.locator("details").first
    if fold.count():
        fold.locator("summary").click()
        assert fold.locator("table").is_visible()
