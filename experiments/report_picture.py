"""Draw the picture at the head of the README: a part of a report's page, in a real browser.

    depthmix train --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \\
        --dataset "reasoning_gym:chain_sum?size=64&seed=1" --validation_split 0.25 \\
        --num_train_epochs 2 --per_device_train_batch_size 8 --output_dir out
    depthmix report out "reasoning_gym:chain_sum?size=12&seed=5" \\
        "reasoning_gym:leg_counting?size=12&seed=5"
    python experiments/report_picture.py out/report/report.html docs/pictures/report.png --token 2

Needs Chromium.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1000, 470
ROWS = 4


def main() -> None:
    """Open the page at its rows, point at a token, and take the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("page", type=Path, help="report.html")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--token", type=int, default=0, help="which learned token to point at")
    options = parser.parse_args()
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(options.page.resolve().as_uri())
        page.evaluate(
            f"document.querySelectorAll('.row:nth-child(n + {ROWS + 1}), #run, .hint, .filters')"
            ".forEach((part) => part.remove())"
        )
        page.locator(".t[data-i]:not(.p)").nth(options.token).hover()
        page.evaluate("document.getElementById('rows').scrollIntoView()")
        page.screenshot(path=options.picture)
        browser.close()


if __name__ == "__main__":
    main()
