"""The page: one HTML file that needs nothing else, with its figures as PNG and JSON beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from depthmix.files import write_bytes, write_text
from depthmix.report.examples import shown_complements, shown_rows, token_data
from depthmix.report.figures import Figure
from depthmix.report.layer_figures import layer_figures
from depthmix.report.report import Report
from depthmix.report.routing_figures import routing_figures
from depthmix.report.training_figures import training_figures

_HERE = Path(__file__).parent
_PICTURE_WIDTH = 640
_BUNDLE = "window.vegaEmbed = vegaEmbed;"  # all that the page's script uses
PAGE_NAME, TABLES_NAME, FIGURES_NAME = "report.html", "tables.json", "figures"


def write_report(report: Report, folder: Path) -> Path:
    """Write the page, its tables and its figures into a folder; return the page, written last.

    Args:
        report: what was found.
        folder: is made; files of an earlier report in it are replaced.
    """
    sections = figures_of(report)
    for figure in (figure for figures in sections.values() for figure in figures):
        place = folder / FIGURES_NAME / figure.name
        write_bytes(place.with_suffix(".png"), picture(figure))
        write_text(place.with_suffix(".json"), json.dumps(figure.chart.to_dict()))
    write_text(folder / TABLES_NAME, json.dumps(report.tables(), default=str))
    write_text(folder / PAGE_NAME, render(report, sections))
    return folder / PAGE_NAME


def figures_of(report: Report) -> dict[str, list[Figure]]:
    """Return the figures of a report, by its sections."""
    seen = report.seen
    return {
        "training": training_figures(report.log) if report.log else [],
        "layers": layer_figures(seen),
        "routing": routing_figures(seen, report.groups, report.table) if seen.late else [],
    }


def picture(figure: Figure, width: int = _PICTURE_WIDTH) -> bytes:
    """Return a figure as PNG."""
    import vl_convert

    spec = {**figure.chart.to_dict(), "width": width, "background": "white"}
    png: bytes = vl_convert.vegalite_to_png({**spec, "title": figure.title}, scale=2)
    return png


def render(report: Report, sections: dict[str, list[Figure]]) -> str:
    """Return the page."""
    import vl_convert
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = {f.name: f.chart.to_dict() for figures in sections.values() for f in figures}
    return environment.get_template("page.html.jinja").render(
        report=report,
        sections=sections,
        rows=shown_rows(report),
        complements=shown_complements(report),
        record=_record(report.record),
        options=_flat(report.record.get("options", {})),
        sources=list(dict.fromkeys(row.source for row in report.rows)),
        held_out=sum(not row.generated for row in report.rows),
        learned=int(report.seen.supervised.sum()),
        charts=_script_json(charts),
        tokens=_script_json(token_data(report)),
        style=(_HERE / "page.css").read_text("utf-8"),
        script=(_HERE / "page.js").read_text("utf-8"),
        vega=vl_convert.javascript_bundle(_BUNDLE).replace("</script", "<\\/script"),
    )


def _record(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a run was: command, base model, data and versions."""
    lines = [("command", str(facts["command"]))] if "command" in facts else []
    for part in ("base", "data", "versions"):
        lines += [(f"{part}: {name}", value) for name, value in _flat(facts.get(part) or {})]
    return lines


def _flat(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, _shown(value)) for name, value in values.items() if value is not None]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return (
        ", ".join(map(str, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )


def _script_json(value: Any) -> str:
    """Return JSON that may stand within a script element: no tag can begin in it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
