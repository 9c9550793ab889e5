"""The cells of `reparam bench` as text and as Markdown: each by itself, and a line for each variant of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from reparam.report import tables
from reparam.report.format import duration, sentence
from reparam.report.markdown import escaped, render_timing_markdown
from reparam.report.text import render_timing

if TYPE_CHECKING:
    from rich.console import Console

    from reparam.bench import Series, Timing

OVERVIEW = ("cell", "variant", "median", "against its baseline")


def render_series(series: Series, console: Console) -> None:
    """Prints every cell, and an overview of several."""
    several = len(series.cells) > 1
    for cell in series.cells:
        if several:
            console.print(Text(str(cell.setting), style="bold"))
        if cell.timing is None:
            console.print(Text(f"not measured: {sentence(cell.failed)}", style="red"))
        else:
            console.print(Text(_conditions(cell.timing), style="dim"))
            render_timing(cell.timing, console)
            console.print(_table(tables.FOOTPRINT_COLUMNS, tables.footprint_rows(cell.timing)))
        if several:
            console.print()
    if several:
        console.print(_table(OVERVIEW, list(overview(series)), words=(1, 3)))
    for note in series.notes:
        console.print(Text(sentence(note), style="dim"))


def render_series_markdown(series: Series) -> str:
    """Every cell as a document."""
    parts = []
    for cell in series.cells:
        if cell.timing is None:
            parts.append(f"## {escaped(str(cell.setting))}\n\nNot measured: {escaped(sentence(cell.failed))}\n")
            continue
        page = render_timing_markdown(cell.timing)
        title, rest = page.split("\n", 1)
        parts.append(f"{title}: {escaped(str(cell.setting))}\n\n{escaped(_conditions(cell.timing))}\n{rest}")
    parts += [f"{escaped(sentence(note))}\n" for note in series.notes]
    return "\n".join(parts)


def overview(series: Series) -> Iterator[tuple[str, ...]]:
    """One row for each variant of each cell, in the order of `OVERVIEW`."""
    for cell in series.cells:
        timing = cell.timing
        if timing is None or not timing.runs:
            yield (str(cell.setting), "not measured", "", "")
            continue
        medians = timing.medians
        for number, label in enumerate(timing.samples):
            name = "" if number else str(cell.setting)
            yield (name, label, duration(medians[label]), timing.verdicts.get(label, ""))


def _conditions(timing: Timing) -> str:
    return ", ".join(f"{name} {value}" for name, value in timing.conditions.items())


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]], words: tuple[int, ...] = ()) -> Table:
    """The first column and those of `words` are text, the others figures."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or number in words else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
