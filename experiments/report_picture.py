"""Draw a picture of a part of a report's page, in a real browser.

    depthmix train --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \\
        --dataset "reasoning_gym:chain_sum?size=64&seed=1" --validation_split 0.25 \\
        --num_train_epochs 2 --per_device_train_batch_size 8 --output_dir out
    depthmix report out "reasoning_gym:chain_sum?size=12&seed=5" \\
        "reasoning_gym:leg_counting?size=12&seed=5"
    python experiments/report_picture.py out/report/report.html docs/pictures/report.png --token 2

That is the picture at the head of the README; docs/gallery.md has the commands of the others. Needs
Chromium.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROWS = 4


def main() -> None:
    """Open the page, and take the picture."""
    options = parse()
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(
            viewport={"width": options.width, "height": options.height},
            color_scheme="dark" if options.dark else "light",
        )
        page.goto(options.page.resolve().as_uri())
        if options.part == "rows":
            point_at(page, options.token)
            page.screenshot(path=options.picture)
        else:
            take(page, options.part, options.picture)
        browser.close()


def point_at(page: Page, token: int) -> None:
    """Leave a few rows alone on the page, at its top, and point at a learned token of them."""
    page.evaluate(
        f"document.querySelectorAll('.row:nth-child(n + {ROWS + 1}), #run, .hint, .filters')"
        ".forEach((part) => part.remove())"
    )
    page.evaluate("document.getElementById('rows').scrollIntoView()")
    page.locator(".t[data-i]:not(.p)").nth(token).hover()


def take(page: Page, part: str, picture: Path) -> None:
    """Take the picture of an element, once its chart is drawn."""
    element = page.locator(f"#{part}")
    element.scroll_into_view_if_needed()
    for chart in element.locator("[data-chart]").all():
        chart.locator("[aria-hidden=true] svg").wait_for()
    element.screenshot(path=picture)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    add = parser.add_argument
    add("page", type=Path, help="report.html")
    add("picture", type=Path, help="PNG to write")
    add("--part", default="rows", help="id of an element of the page (default: rows)")
    add("--token", type=int, default=0, help="which learned token to point at, in rows")
    add("--dark", action="store_true", help="in dark colours")
    add("--width", type=int, default=1000, help="of the window (default: 1000)")
    add("--height", type=int, default=470, help="of the window (default: 470)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
