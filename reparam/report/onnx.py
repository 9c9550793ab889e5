"""What `reparam export` did, as text for a terminal and as Markdown: the same facts, section by section."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.padding import Padding
from rich.text import Text

from reparam.report.format import operation_rows
from reparam.report.markdown import escaped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from reparam.report.exported import Exported

SHOWN_KINDS = 8
"""Operators that are named when not everything is asked for."""


def render_export(exported: Exported, console: Console, *, verbose: bool = False) -> None:
    """Prints what was written, on `console`.

    Args:
        verbose: list every operator of the file, every case of the comparison, and the time each stage took.
    """
    console.print(f"[bold]{escape(exported.model)}[/bold], {_how(exported)}")
    for title, lines in _sections(exported, verbose).items():
        console.print()
        console.print(f"[bold]{title}[/bold]")
        for line in lines:
            console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))


def render_export_markdown(exported: Exported) -> str:
    """The same for the summary of a job."""
    lines = [f"## {escaped(exported.model)}, {_how(exported)}"]
    for title, found in _sections(exported, verbose=False).items():
        lines += ["", f"**{title}**", "", *(f"- {escaped(line)}" for line in found)]
    return "\n".join([*lines, ""])


def _how(exported: Exported) -> str:
    return "fused" if exported.report else "as it is"


def _sections(exported: Exported, verbose: bool) -> dict[str, list[str]]:
    """Title -> lines; sections without lines are left out."""
    file, report = exported.file, exported.report
    compared = [] if file.comparison is None else [file.comparison.summary()]
    if file.comparison is not None and verbose:
        compared += [f"{case.name}: {case.status}, sizes {_sizes(case.shapes)}" for case in file.comparison.cases]
    kind = "float16 weights and activations, " if file.float16 else ""
    simplified = ", simplified by onnxsim" if file.simplified else ""
    sections = {
        "File": [
            str(file.path),
            f"{file.bytes:,} bytes, {kind}opset {file.opset}{simplified}",
            *(f"input {_value(exported, name)}" for name in file.inputs),
            *(f"output {_value(exported, name)}" for name in file.outputs),
            f"{sum(file.nodes.values())} nodes: {_operators(file.nodes, verbose)}",
        ],
        "Fused": [f"{name}: {before} -> {after}" for name, before, after in operation_rows(report)] if report else [],
        "Equivalence": compared or ["not compared with the original"],
        "Left in the file": list(exported.kept),
        "Notes": [*(report.notes if report else ()), *file.notes],
        "Time taken": [f"{name}: {seconds:.1f} s" for name, seconds in exported.seconds.items()] if verbose else [],
    }
    return {title: lines for title, lines in sections.items() if lines}


def _value(exported: Exported, name: str) -> str:
    axes = ", ".join(map(str, exported.file.shapes.get(name, ())))
    return f"{name} [{axes}] {exported.file.dtypes.get(name, '')}"


def _operators(nodes: Mapping[str, int], verbose: bool) -> str:
    ranked = sorted(nodes.items(), key=lambda item: (-item[1], item[0]))
    shown = ranked if verbose else ranked[:SHOWN_KINDS]
    rest = len(ranked) - len(shown)
    return ", ".join(f"{count} {name}" for name, count in shown) + (f" and {rest} other kinds" if rest else "")


def _sizes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)
