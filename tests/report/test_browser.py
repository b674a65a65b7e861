"""The page in a real browser: it opens, can be used by pointer and keyboard, and is accessible.

Needs Chromium (Debian: chromium); left out where it is not.
"""

import shutil

import pytest

from big_report import ROWS, TOKENS, make_report
from depthmix.report.page import write_report

BROWSER = shutil.which("chromium")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: chromium)")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(make_report(), tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, page, request):
    """The page, opened without a network; fails if it complains of anything."""
    look = getattr(request, "param", {"viewport": {"width": 1200, "height": 900}})
    context = browser.new_context(offline=True, **look)
    tab = context.new_page()
    complaints = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: complaints.append(request.url) if known(request) else None)
    tab.goto(page.as_uri())
    yield tab
    context.close()
    assert complaints == []


def known(request):
    """Whether something is fetched that is not in the page."""
    return not request.url.startswith(("file:", "data:"))


def visible_rows(tab):
    return tab.locator(".row:not([hidden])").count()


def draw_all(tab):
    """Scroll through the page, so that every chart is drawn; return their number."""
    places = tab.locator("[data-chart]")
    for place in places.all():
        place.scroll_into_view_if_needed()
        place.locator("[aria-hidden=true] svg").wait_for()
    return places.count()


def test_it_opens_small_and_without_a_complaint(opened, page):
    assert page.stat().st_size < 5_000_000
    assert opened.locator("h1").inner_text() == "a <run> & co"
    assert opened.locator(".t[data-i]").count() == TOKENS - ROWS
    assert draw_all(opened) > 10


def test_pointing_at_a_token_shows_its_gate_and_predictions(opened):
    opened.locator(".t[data-i]").nth(40).hover()
    detail = opened.locator("#detail")
    assert detail.is_visible()
    names = detail.locator("tbody th").all_inner_texts()
    assert names == ["layer 27", "layer 28", "layer 29", "model"]
    likeliest = detail.locator("tbody td:last-child").all_inner_texts()
    assert all(cell.count("%") == 3 for cell in likeliest)


def test_arrow_keys_move_from_token_to_token(opened):
    opened.locator(".t").first.focus()
    detail = opened.locator("#detail")
    assert "first token" in detail.inner_text()
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowRight")
    assert opened.evaluate("document.activeElement.dataset.i") == "1"
    assert "layer 29" in detail.inner_text()
    opened.keyboard.press("End")
    assert opened.evaluate("document.activeElement.nextElementSibling") is None
    # One stop of the tabulator a row, at the token last visited.
    assert opened.locator(".tokens").first.locator("[tabindex='0']").count() == 1
    opened.keyboard.press("Escape")
    assert detail.is_hidden()


def test_filters_and_colours(opened):
    total = visible_rows(opened)
    assert total == ROWS
    opened.select_option("#source", "legs")
    legs = visible_rows(opened)
    assert 0 < legs < total
    assert opened.locator("#count").inner_text() == f"{legs} of {total} rows"
    opened.select_option("#source", "")
    opened.select_option("#writer", "model")
    assert visible_rows(opened) == 2
    opened.select_option("#writer", "")
    opened.fill("#search", "no such text")
    assert visible_rows(opened) == 0
    opened.fill("#search", "")
    assert visible_rows(opened) == total

    def colours():
        return opened.evaluate(
            "[...document.querySelectorAll('.t[data-i]')].slice(0, 20)"
            ".map((token) => getComputedStyle(token).backgroundColor)"
        )

    before = colours()
    opened.select_option("#colour", "weight of layer 27")
    assert colours() != before
    assert "weight" in opened.locator("#legend").inner_text()


def test_clicking_at_a_layer_in_a_legend_dims_the_others(opened):
    chart = opened.locator("[data-chart='router-weights']")
    chart.scroll_into_view_if_needed()
    lines = chart.locator("g.mark-line path")
    lines.first.wait_for(state="attached")  # a level line has no height
    assert opened.evaluate(OPACITIES) == [1, 1, 1]
    chart.get_by_text("layer 28").click(force=True)
    opened.wait_for_function(f"{OPACITIES}.filter((opacity) => opacity < 0.5).length === 2")


OPACITIES = (
    "[...document.querySelectorAll(\"[data-chart='router-weights'] g.mark-line path\")]"
    ".map((line) => Number(line.getAttribute('opacity') ?? 1))"
)


@pytest.mark.parametrize(
    "opened",
    [
        {"color_scheme": scheme, "viewport": {"width": width, "height": 900}, "has_touch": True}
        for scheme in ("light", "dark")
        for width in (1200, 400)
    ],
    indirect=True,
    ids=["light", "light telephone", "dark", "dark telephone"],
)
def test_it_is_accessible(opened):
    from axe_playwright_python.sync_playwright import Axe

    draw_all(opened)
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # A few rows of many, which are alike: axe takes its time for each.
    opened.evaluate("document.querySelectorAll('.row:nth-child(n + 4)').forEach((r) => r.remove())")
    opened.locator(".t[data-i]").first.focus()
    faults = Axe().run(opened).response["violations"]
    assert [(fault["id"], fault["nodes"][0]["failureSummary"]) for fault in faults] == []
