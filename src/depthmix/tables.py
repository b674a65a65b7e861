"""Tables of figures that fit a terminal of 80 columns: numbers are never cut."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table


def print_figures(title: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print rows of a name and figures; where it is narrow, the name goes on in a second line."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    first, *others = header
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
