"""A report of 10,000 tokens of made-up figures, and how long its page takes to open.

    PYTHONPATH=src:tests python tests/big_report.py    # needs Chromium; prints sizes and times

The first chart is there when its SVG is in the document. Time by the clock counts whatever else the
machine does; processor time is that of the page's own thread up to then (threadTicks of the
DevTools protocol): parsing, scripts, style, layout and painting.
"""

import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np

from command_fixtures import build_tokenizer
from depthmix.analysis.observations import Observations, ObservedRow
from depthmix.analysis.routing import differences, groupings
from depthmix.analysis.token_classes import Pieces
from depthmix.analysis.training_log import TrainingLog
from depthmix.analysis.verdict import findings
from depthmix.report.page import write_report
from depthmix.report.report import Report

TOKENS = 10_000
LAYERS = (27, 28, 29)
_ROW = 50
ROWS = TOKENS // _ROW
_RUNS = 9


def make_report():
    """A report of 10,000 tokens of made-up figures."""
    tokenizer = build_tokenizer()
    generator = np.random.default_rng(0)
    text = "What is 3 + 4? The answer is 7. " * 8
    ids = (tokenizer(text)["input_ids"] * _ROW)[:_ROW]
    rows = [
        ObservedRow(ids, [t > 30 for t in range(_ROW)], "sums" if r % 3 else "legs", r >= ROWS - 2)
        for r in range(ROWS)
    ]
    n = ROWS * (_ROW - 1)
    row, position = np.divmod(np.arange(n), _ROW - 1)
    position += 1
    gate = generator.dirichlet([1, 1, 8], size=n)
    top = generator.integers(3, 200, size=(n, 4, 3))
    token = np.array(ids)[position]
    top[generator.random((n, 4)) < 0.5, 0] = token[0]
    probability = np.sort(generator.dirichlet([2, 1, 1], size=(n, 4)), axis=2)[:, :, ::-1]
    loss = generator.exponential(size=(n, 4))
    learned = position > 30
    seen = Observations(LAYERS, LAYERS, row, position, token, learned, gate, loss, top, probability)
    weights = {f"router_weight/layer_{layer}": 0.3 for layer in LAYERS}
    history = [{"step": s, "loss": 2 / s, "grad_norm": 1.0, **weights} for s in range(1, 9)]
    log = TrainingLog.of([*history, {"step": 8, "eval_loss": 0.4}])
    held = seen.where(seen.row < ROWS - 2)
    groups = groupings(held, rows, tokenizer)
    table = differences(held.gate, held.row, groups, permutations=99)
    return Report(
        name="a <run> & co",
        record={"command": "depthmix train", "options": {"k": 3}},
        log=log,
        rows=rows,
        seen=held,
        shown=seen,
        pieces=Pieces(tokenizer),
        findings=findings(held, log),
        groups=groups,
        table=table,
        left_out=["nothing </script> of note"],
    )


# Run before the page's own scripts: when the first chart is in the document.
_WATCH = """
new MutationObserver((_, watch) => {
  if (!document.querySelector("[data-chart] svg")) return;
  window.firstChart = performance.now();
  watch.disconnect();
}).observe(document, { childList: true, subtree: true });
"""


def opening(browser, page):
    """Return the seconds to the first chart: by the clock, and of the processor."""
    context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900})
    tab = context.new_page()
    tab.add_init_script(_WATCH)
    devtools = context.new_cdp_session(tab)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    tab.goto(page.as_uri(), wait_until="commit")
    clock = tab.wait_for_function("window.firstChart").json_value() / 1_000
    metrics = {m["name"]: m["value"] for m in devtools.send("Performance.getMetrics")["metrics"]}
    context.close()
    return clock, metrics["TaskDuration"]


def main():
    """Write the page, open it a few times, and print what it took."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = write_report(make_report(), Path(folder))
        print(f"{TOKENS:,} tokens: {page.stat().st_size / 1e6:.2f} MB")
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        clocks, processor = zip(*(opening(browser, page) for _ in range(_RUNS)), strict=True)
        browser.close()
    for name, seconds in (("clock", clocks), ("processor", processor)):
        middle = statistics.median(seconds)
        print(f"first chart, {name}: {middle:.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


if __name__ == "__main__":
    main()
