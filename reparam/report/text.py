"""The report as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from reparam.report.evidence import case_line, outputs_of
from reparam.report.format import (
    CAPTURED,
    SHOWN_PLACES,
    capital,
    count,
    duration,
    grouped_choices,
    grouped_refusals,
    grouped_rewrites,
    operation_rows,
    places,
    sentence,
    shown_candidates,
    undone_lines,
)
from reparam.report.headline import headline
from reparam.report.tables import comparisons, environment_rows, remarks

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from reparam.bench import Timing
    from reparam.equivalence import Comparison
    from reparam.passes.base import Candidate, Choice
    from reparam.report.values import Report


def render_text(report: Report, console: Console, *, verbose: bool = False) -> None:
    """Prints `report` on `console`.

    Args:
        verbose: list every rewrite and every place, with the identity applied, the settings, and the time each stage
            took.
    """
    console.print(f"[bold]{escape(report.model)}[/bold], captured {CAPTURED.get(report.capture, report.capture)}")
    partial = headline(report).partial
    if partial:
        console.print(Text(partial, style="yellow"))
    console.print()
    console.print(_operations(report))
    for title, lines in (
        ("Rewritten", _rewrites(report, verbose)),
        ("Undone", _undone(report)),
        ("Left as it is", _refusals(report, verbose)),
        ("Choices", _choices(report, verbose)),
        ("Equivalence", _equivalence(report, verbose)),
        ("Latency", _latency(report)),
        ("Written", _files(report)),
        ("Notes", list(report.notes)),
        ("Environment", [f"{name}: {value}" for name, value in environment_rows(report)] if verbose else []),
    ):
        if lines:
            console.print()
            console.print(f"[bold]{title}[/bold]")
            for line in lines:
                console.print(_indented(Text(line) if isinstance(line, str) else line, 2))


def _indented(line: RenderableType, columns: int) -> Padding:
    """`line` moved to the right, with whatever it wraps into."""
    return Padding(line, (0, 0, 0, columns), expand=False)


def _operations(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, before, after in operation_rows(report):
        style = "green" if before != after else ""
        table.add_row(name, before, Text(after, style=style))
    return table


def _rewrites(report: Report, verbose: bool) -> list[RenderableType]:
    if not report.rewrites:
        return [Text("nothing: no operation could be folded")]
    lines: list[RenderableType] = []
    for label, group in grouped_rewrites(report.rewrites):
        lines.append(
            Text.assemble((f"{len(group):>3} x ", "cyan"), label, ("" if verbose else f"  at {places(group)}", "dim"))
        )
        if verbose:
            for rewrite in group:
                what = f"{', '.join(rewrite.replaced)} -> {rewrite.replacement or 'nothing'}"
                lines.append(_indented(Text(f"{rewrite.where}: {what}"), 4))
                lines.append(_indented(Text(rewrite.identity, style="dim"), 6))
    return lines


def _undone(report: Report) -> list[RenderableType]:
    """What verification found at fault."""
    lines: list[RenderableType] = []
    for one in report.undone:
        rewrite = one.rewrite
        what = f"{rewrite.pass_name}: {', '.join(rewrite.replaced)} -> {rewrite.replacement or 'nothing'}"
        number = f", {one.number} times" if one.number > 1 else ""
        lines.append(Text.assemble((one.where, "red"), f"  {what}{number}"))
        lines.append(_indented(Text(rewrite.identity, style="dim"), 2))
        lines += [_indented(Text(line), 2) for line in undone_lines(one)]
    if lines:
        lines.append("The model was fused without them, and is verified. Please report this: a rewrite must be exact.")
    return lines


def _refusals(report: Report, verbose: bool) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for first, group in grouped_refusals(report.refusals):
        number = f"{len(group)} x " if len(group) > 1 else ""
        shown = len(group) if verbose else 3
        lines.append(Text.assemble((f"{number}{first.subject}", "yellow"), f" at {places(group, shown)}"))
        remedy = f" {sentence(first.remedy)}" if first.remedy else ""
        lines.append(_indented(Text(f"{sentence(first.reason)}{remedy}", style="dim"), 2))
    return lines


def _choices(report: Report, verbose: bool) -> list[RenderableType]:
    if report.choices is None:
        return []
    if not report.choices:
        return [Text("none: no region has more than one operation")]
    first = report.choices[0]
    wanted = {"latency": "least latency", "macs": "fewest multiply-adds", "parameters": "fewest weights"}
    lines: list[RenderableType] = [
        Text(
            f"for the {wanted[first.objective]} on {first.machine}; times are estimated: they are a model's prices, "
            "which only rank candidates, and no measurements",
            style="dim",
        )
    ]
    for group in grouped_choices(report.choices):
        number = f"{len(group)} x " if len(group) > 1 else ""
        part = "part: " if group[0].part else ""
        where = places(group, len(group) if verbose else SHOWN_PLACES)
        lines += [Text.assemble((f"{number}{part}", "cyan"), where), _candidates(group[0], verbose)]
    return lines


def _candidates(choice: Choice, verbose: bool) -> Padding:
    """The candidates with their prices, the winner marked."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("", "candidate"):
        table.add_column(title)
    for title in ("est. time", "multiply-adds", "weights", "launches"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    kept = range(len(choice.candidates)) if verbose else shown_candidates(choice)
    for index in kept:
        candidate, won = choice.candidates[index], index == choice.chosen
        remark = f"chosen: {choice.why}" if won else candidate.excluded
        style = "green" if won else "dim" if candidate.excluded else ""
        table.add_row("*" if won else "", Text(candidate.description), *_prices(candidate), Text(remark), style=style)
    if len(kept) < len(choice.candidates):
        table.add_row("", f"and {len(choice.candidates) - len(kept)} slower ones", style="dim")
    return _indented(table, 2)


def _prices(candidate: Candidate) -> tuple[str, ...]:
    cost = candidate.cost
    if cost is None:
        return ("-",) * 4
    return (duration(cost.seconds), count(cost.macs), count(cost.parameters), count(cost.launches))


def render_comparison(subject: str, comparison: Comparison, console: Console, *, verbose: bool = False) -> None:
    """Prints one comparison; with `verbose` also every figure of each output, and the verdict on each case."""
    for line in _comparison(subject, comparison, verbose):
        console.print(line)


def render_timing(timing: Timing, console: Console) -> None:
    """Prints one measurement of latency."""
    for line in _timing("", timing):
        console.print(line)


def _equivalence(report: Report, verbose: bool = False) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for subject, comparison in comparisons(report):
        lines += _comparison(subject, comparison, verbose)
    return lines


def _comparison(subject: str, comparison: Comparison, verbose: bool = False) -> list[RenderableType]:
    style = "green" if comparison.passed else "bold red"
    more: list[RenderableType] = []
    if verbose:
        for title, rows in outputs_of(comparison):
            more.append(_indented(Text(title), 2))
            more += [_indented(Text(f"{name}: {value}", style="dim"), 4) for name, value in rows]
        more += [_indented(Text(case_line(case), style="dim"), 2) for case in comparison.cases]
    return [
        Text.assemble(f"{subject}: ", (comparison.summary(), style)),
        *(_indented(Text(sentence(failure), style="red"), 2) for failure in comparison.failures[1:6]),
        *([] if comparison.parting is None else [_indented(Text(sentence(capital(str(comparison.parting)))), 2)]),
        *(_indented(Text(sentence(note), style="dim"), 2) for note in comparison.notes),
        *more,
    ]


def _latency(report: Report) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for subject, timing in (("", report.timing), ("in onnxruntime", report.onnx_timing)):
        if timing is not None:
            lines += _timing(subject, timing)
    return lines


def _timing(subject: str, timing: Timing) -> list[RenderableType]:
    if timing.runs == 0:
        return [Text("not measured: it was interrupted before the first round was complete")]
    threads = f"{timing.threads} thread{'s' if timing.threads != 1 else ''}"
    partial = ", interrupted" if timing.partial else ""
    where = f"{subject + ' ' if subject else ''}on {timing.hardware}"
    return [
        Text(f"{where}, {threads}, {timing.runs} paired runs{partial}"),
        _timing_table(timing),
        *(Text(remark, style="yellow") for remark in remarks(timing)),
    ]


def _timing_table(timing: Timing) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for column in ("median", "95th percentile"):
        table.add_column(column, justify="right")
    table.add_column("against " + timing.baseline)
    medians, p95s, verdicts = timing.medians, timing.p95s, timing.verdicts
    for label in timing.samples:
        verdict = verdicts.get(label, "")
        style = "green" if verdict.startswith("faster") else "yellow" if verdict.startswith("slower") else ""
        table.add_row(Text(label), duration(medians[label]), duration(p95s[label]), Text(verdict, style=style))
    return table


def _files(report: Report) -> list[RenderableType]:
    return [Text(path) for path in report.files.values()]
