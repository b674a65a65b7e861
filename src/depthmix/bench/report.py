"""What a benchmark run leaves behind: tables on the terminal, JSON, a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.errors import ConfigError
from depthmix.files import write_text
from depthmix.tables import print_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Figures = dict[str, dict[str, Any]]

MIB = 2**20
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "seconds": ("seconds", lambda value: f"{value:.3f}"),
    "peak_bytes": ("peak\nMiB", lambda value: f"{value / MIB:.0f}"),
    "ours_seconds": ("ours", lambda value: f"{value:.4f}"),
    "share": ("share", lambda value: f"{value:.2%}"),
    "projected": ("projected", str),
    "pulled_back": ("pulled\nback", str),
    "largest_logits_bytes": ("logits\nMiB", lambda value: f"{value / MIB:.1f}"),
    "prefill_seconds": ("prefill,\ns", lambda value: f"{value:.3f}"),
    "prefill_peak_bytes": ("prefill,\nMiB", lambda value: f"{value / MIB:.0f}"),
    "token_seconds": ("a token,\nms", lambda value: f"{value * 1e3:.1f}"),
}
# Of these, the ratio to the first row or to the baseline says more than the figure.
_COMPARED = ("seconds", "peak_bytes", "prefill_seconds", "prefill_peak_bytes", "token_seconds")


def print_table(title: str, figures: Figures, baseline: str) -> None:
    """Print one row a variant; times and memory also relative to the baseline's."""
    header = [""]
    for field in next(iter(figures.values())):
        header += [_COLUMNS[field][0], *(["ratio"] if field in _COMPARED else [])]
    rows = [[name, *_cells(row, figures[baseline])] for name, row in figures.items()]
    print_figures(title, header, rows)


def _cells(row: dict[str, Any], baseline: dict[str, Any]) -> Iterator[str]:
    for field, value in row.items():
        yield _COLUMNS[field][1](value)
        if field in _COMPARED:
            yield f"{value / baseline[field]:.2f}"


def print_ratios(ratios: dict[str, float]) -> None:
    """Print the ratios, one a line, if there are any."""
    if ratios:
        print_figures("ratios", ("", ""), [(name, f"{v:.3f}") for name, v in ratios.items()])


BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def require_markers(path: Path) -> None:
    """Raise unless the file has the two lines between which the table goes.

    Raises:
        ConfigError: it has not.
    """
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    if BEGIN not in lines or END not in lines:
        raise ConfigError(f"{path}: no lines {BEGIN} and {END}, between which the table goes")


def write_table(path: Path, steps: Figures, baseline: str) -> None:
    """Write time and memory of a training step, relative to the baseline, between the markers."""
    lines = ["", "| one training step | time | peak memory |", "|---|---|---|"]
    for name, row in steps.items():
        ratios = [row[field] / steps[baseline][field] for field in ("seconds", "peak_bytes")]
        lines.append(f"| {name} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    before, _, rest = path.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    write_text(path, before + "\n".join([BEGIN, *lines, "", END]) + after)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw what was measured: the step, the cost of the loss as it grows, decoding."""
    from matplotlib.figure import Figure

    panels: list[Callable[[Axes], None]] = []
    if "step" in results:
        panels += [lambda axes: _bars(axes, results["step"], "seconds", "one training step, s")]
        panels += [lambda axes: _bars(axes, results["step"], "peak_bytes", "peak memory, GiB")]
    if "growth" in results:
        for name, title in (
            ("vocabulary", "vocabulary"),
            ("k", "late layers k"),
            ("tokens", "tokens"),
        ):
            panels.append(_growth_panel(results["growth"], name, title))
    if "decode" in results:
        panels += [lambda axes: _bars(axes, results["decode"], "token_seconds", "a token, s")]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes)
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, figures: Figures, field: str, title: str) -> None:
    scale = 2**30 if field == "peak_bytes" else 1
    names = list(figures)[::-1]
    bars = axes.barh(names, [figures[name][field] / scale for name in names], color="#3b6ea5")
    axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.margins(x=0.15)


def _growth_panel(growth: list[dict[str, Any]], name: str, title: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        rows = [row for row in growth if row["grows"] == name]
        for variant, colour in (("naive", "#c44e52"), ("depthmix", "#3b6ea5")):
            points = [(r[name], r[variant]["peak_bytes"] / MIB) for r in rows if variant in r]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=variant)
        axes.set_title(f"memory of the loss, MiB, by {title}", fontsize=9)
        axes.set(xscale="log", yscale="log")
        axes.set_xticks([r[name] for r in rows], [f"{r[name]:,}" for r in rows])
        axes.minorticks_off()
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7)

    return draw
