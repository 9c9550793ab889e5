"""What came of repeating a certificate, as text and as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from reparam.report.markdown import escaped
from reparam.report.text import render_comparison

if TYPE_CHECKING:
    from rich.console import Console

    from reparam.certificate import Repeated

_SIGNS = {
    "holds": ("ok", "green", "✅"),
    "changed": ("CHANGED", "bold red", "❌"),
    "differs": ("differs", "yellow", "⚠️"),
}


def render_repeated(done: Repeated, console: Console, *, verbose: bool = False) -> None:
    """Prints each finding in a line, and the verdict; with `verbose` also the comparisons as they are now."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", no_wrap=True)
    for finding in done.findings:
        sign, style, _ = _SIGNS[finding.kind]
        table.add_row(Text(sign, style=style), Text(finding.sentence))
    console.print(table)
    for kind, comparison in done.comparisons.items() if verbose else ():
        render_comparison(kind, comparison, console, verbose=True)
    console.print(Text(done.summary(), style="green" if done.holds else "bold red"))


def render_repeated_markdown(done: Repeated) -> str:
    """The same as a document."""
    sign = "✅" if done.holds else "❌"
    lines = [f"- {_SIGNS[finding.kind][2]} {escaped(finding.sentence)}" for finding in done.findings]
    return "\n".join([f"## {sign} {escaped(done.summary())}", "", *lines]) + "\n"
