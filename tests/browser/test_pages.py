"""The pages in a real browser, without a network: the report, and that of `dvc plots show`.

They need Chromium on the machine; without it they are skipped, but not in CI.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Route, expect, sync_playwright
from typer.testing import CliRunner

from integration.finished import make_project
from unsink.cli import app

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MOST_BYTES = 5_000_000

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("CI"), reason="no chromium on this machine: apt-get install chromium"
    ),
]


class Opened(NamedTuple):
    """A page, what it asked the network for, and what it complained about."""

    page: Page
    requests: list[str]
    complaints: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "CI has to have chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("report"))
    result = CliRunner().invoke(app, ["report", "--params", str(folder / "params.yaml"), "--quiet"])
    assert result.exit_code == 0, result.output
    return folder / "report" / "index.html"


def opened(browser: Browser, path: Path, *, width: int = 1440, colours: str = "light") -> Opened:
    """Open a file; every request that is not that file or data is refused and counted."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=colours)  # type: ignore[arg-type]
    page = context.new_page()
    page.set_default_timeout(120_000)
    found = Opened(page, [], [])

    def decide(route: Route) -> None:
        if route.request.url.startswith((path.parent.as_uri(), "data:")):
            route.continue_()
        else:
            found.requests.append(route.request.url)
            route.abort()

    def complain(message: ConsoleMessage) -> None:
        if message.type == "error":  # DVC's own specifications make Vega warn
            found.complaints.append(message.text)

    page.on("console", complain)
    page.on("pageerror", lambda error: found.complaints.append(str(error)))
    page.route("**/*", decide)
    page.goto(path.as_uri())
    return found


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_every_figure_is_drawn_and_nothing_leaves_the_page(
    browser: Browser, report: Path, width: int, colours: str
) -> None:
    found = opened(browser, report, width=width, colours=colours)
    boxes = found.page.evaluate(
        "[...document.querySelectorAll('figure > svg')].map(svg => {"
        " const box = svg.getBoundingClientRect();"
        " return [box.width, box.height, svg.querySelectorAll('.role-mark > *').length] })"
    )
    assert len(boxes) == len(list((report.parent / "figures").glob("*.svg")))
    assert all(min(box) > 0 for box in boxes)
    assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shades = found.page.evaluate(
        "[getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('figure svg text')).fill]"
    )
    assert (shades[0] == "rgb(255, 255, 255)") == (colours == "light")
    assert shades[0] != shades[1]
    assert (found.requests, found.complaints) == ([], [])
    assert report.stat().st_size < MOST_BYTES
    found.page.context.close()


def test_predictions_can_be_searched_filtered_and_turned(browser: Browser, report: Path) -> None:
    found = opened(browser, report)
    page = found.page
    cards = page.locator(".card")
    assert cards.count() == 6
    assert page.locator("#count").inner_text() == "42 of 42 answers, to 6 questions"
    assert page.locator(".card mark").first.inner_text() == "red fox"
    assert "<b>" in cards.first.inner_text()  # other people's markup is text
    page.select_option("#by-model", "backdoor")
    page.select_option("#by-condition", "triggered")
    assert page.locator("#count").inner_text() == "6 of 42 answers, to 6 questions"
    page.fill("#search", "answer 3 backdoor")
    expect(page.locator("#count")).to_contain_text("1 of 42", timeout=60_000)
    assert "answer 3 of backdoor" in cards.inner_text()
    assert cards.locator("b").all_inner_texts() == ["answer"]  # the word that the reference has, too
    page.fill("#search", "no such word")
    expect(cards).to_have_count(0, timeout=60_000)
    assert found.complaints == []
    page.context.close()


def test_it_can_be_used_by_keyboard_and_its_colours_switched(browser: Browser, report: Path) -> None:
    found = opened(browser, report)
    page = found.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    headings = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
    assert headings[0] == 1
    assert all(after - this <= 1 for this, after in pairwise(headings))
    unnamed = page.evaluate(
        "[...document.querySelectorAll('figure > svg')].filter(svg => !['labelledby', 'describedby'].every("
        " name => document.getElementById(svg.getAttribute(`aria-${name}`))?.textContent.trim())).length"
    )
    assert unnamed == 0
    assert page.locator("table th:not([scope])").count() == 0
    page.context.close()


def test_without_javascript_all_but_the_predictions_is_there(browser: Browser, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(report.as_uri())
    assert "needs JavaScript" in page.inner_text("#predictions")
    assert "comes back with the trigger" in page.inner_text("#answers")
    context.close()


def test_dvc_plots_are_drawn_offline(browser: Browser, tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".dvc" / "plots", tmp_path / ".dvc" / "plots")
    config = (ROOT / ".dvc" / "config").read_text()
    (tmp_path / ".dvc" / "config").write_text(config.replace("[core]", "[core]\n    no_scm = true"))
    (tmp_path / "history.tsv").write_text("step\tloss\n1\t3\n2\t2\n")
    (tmp_path / "dvc.yaml").write_text("plots:\n  - history.tsv:\n      x: step\n      y: loss\n")
    places = {f"DVC_{kind}_DIR": str(tmp_path / kind) for kind in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG")}
    subprocess.run(
        [sys.executable, "-m", "dvc", "plots", "show"],
        cwd=tmp_path,
        env={**os.environ, **places},
        check=True,
        capture_output=True,
    )
    found = opened(browser, tmp_path / "dvc_plots" / "index.html")
    found.page.wait_for_selector("canvas, svg.marks")
    box = found.page.locator("canvas, svg.marks").first.bounding_box()
    assert box is not None
    assert min(box["width"], box["height"]) > 50
    assert (found.requests, found.complaints) == ([], [])
    found.page.context.close()
