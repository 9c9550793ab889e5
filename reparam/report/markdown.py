"""The report as GitHub's Markdown, for logs and job summaries: the same facts, long lists folded away."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from reparam.report import tables
from reparam.report.evidence import case_line, outputs_of
from reparam.report.format import (
    CAPTURED,
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

if TYPE_CHECKING:
    from reparam.bench import Timing
    from reparam.equivalence import Comparison
    from reparam.passes.base import Choice, Rewrite
    from reparam.report.values import Report

_SIGNS = {"equivalent": "✅", "NOT equivalent": "❌", "not checked": "⚠️"}


def render_markdown(report: Report) -> str:
    """The report as one document."""
    return "\n".join(_document(report)).strip() + "\n"


def render_comparison_markdown(subject: str, comparison: Comparison) -> str:
    """One comparison as a document."""
    verdict = "equivalent" if comparison.passed else "NOT equivalent"
    lines = [f"## {_SIGNS[verdict]} {escaped(subject)}: {verdict}", "", *_comparison(comparison)]
    return "\n".join(lines).strip() + "\n"


def render_timing_markdown(timing: Timing) -> str:
    """One measurement of latency as a document."""
    return "\n".join(["## Latency", "", *_timing(timing)]).strip() + "\n"


def escaped(text: str) -> str:
    """Other people's text as Markdown that shows just that; in one line."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*<\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|^[#+-](?=\s))", r"\\\1", one_line)


def code(text: str) -> str:
    """Other people's text as code, also where it holds backticks; in one line."""
    one_line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", one_line)), default=0))
    pad = " " if "`" in one_line else ""
    return f"{fence}{pad}{one_line}{pad}{fence}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> Iterator[str]:
    """A table of cells that are Markdown already; `right` are the columns of numbers."""
    numbers = set(right)
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join('--:' if index in numbers else '---' for index in range(len(columns)))}|"
    for row in rows:
        yield f"| {' | '.join(_cell(cell) for cell in row)} |"
    yield ""


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)  # GitHub wants it inside of code, too


def _folded(title: str, lines: Iterable[str]) -> Iterator[str]:
    """`title` is no text of other people's."""
    yield from ("<details>", f"<summary>{title}</summary>", "", *lines, "</details>", "")


def _document(report: Report) -> Iterator[str]:
    top = headline(report)
    yield f"## {_SIGNS[top.verdict]} {escaped(report.model)}: {top.verdict}"
    yield ""
    if top.partial:
        yield f"> ⚠️ **{top.partial}**"
        yield ""
    for line in (top.changed, top.equal, top.faster):
        yield f"- {escaped(line)}"
    yield ""
    rows = [
        (name, before, f"**{after}**" if after != before else after) for name, before, after in operation_rows(report)
    ]
    yield from _table(("operation", "before", "after"), rows, (1, 2))
    for subject, timing in tables.timings(report):
        yield from (f"### {subject.capitalize()}", "", *_timing(timing))
    for subject, comparison in tables.comparisons(report):
        yield from (f"### Equivalence: {subject}", "", *_comparison(comparison))
    yield from _rewrites(report)
    yield from _undone(report)
    yield from _refusals(report)
    yield from _choices(report)
    yield from _rest(report)


def _timing(timing: Timing) -> Iterator[str]:
    if timing.runs == 0:
        yield from ("Not measured: it was interrupted before the first round was complete.", "")
        return
    yield from (escaped(tables.measured_on(timing)), "")
    rows = [tuple(map(escaped, row)) for row in tables.latency_rows(timing)]
    yield from _table(tables.LATENCY_COLUMNS, rows, (1, 2))
    for line in tables.remarks(timing):
        yield f"- {escaped(line)}"
    yield ""
    space = tables.footprint_rows(timing)
    if space:
        yield from _table(tables.FOOTPRINT_COLUMNS, [tuple(map(escaped, row)) for row in space], range(1, 7))


def _comparison(comparison: Comparison) -> Iterator[str]:
    yield from (f"**{escaped(comparison.summary())}**", "")
    more = () if comparison.parting is None else (str(comparison.parting),)
    for line in (*comparison.failures, *more, *comparison.notes):
        yield f"- {escaped(sentence(line))}"
    yield ""
    rows = [tuple(map(escaped, row)) for row in tables.case_rows(comparison)]
    figures = [f"- {escaped(case_line(case))}" for case in comparison.cases]
    for title, values in outputs_of(comparison):
        figures += ["", f"**{escaped(title)}**", "", *_table(("figure", "value"), [_pair(*row) for row in values])]
    body = [*_table(tables.CASE_COLUMNS, rows, range(3, 8)), *figures, ""]
    yield from _folded(f"{len(comparison.cases)} input cases in figures", body)


def _pair(name: str, value: str) -> tuple[str, str]:
    return escaped(name), escaped(value)


def _rewrites(report: Report) -> Iterator[str]:
    yield from ("### Rewritten", "")
    if not report.rewrites:
        yield from ("Nothing: no operation could be folded.", "")
        return
    groups = grouped_rewrites(report.rewrites)
    rows = [(str(len(group)), code(label), escaped(places(group))) for label, group in groups]
    yield from _table(("times", "what", "where"), rows, (0,))
    every = [_rewrite_row(rewrite) for _, group in groups for rewrite in group]
    yield from _folded(f"all {len(every)} rewrites", _table(("where", "what became what", "because"), every))


def _rewrite_row(rewrite: Rewrite) -> tuple[str, str, str]:
    what = f"{', '.join(rewrite.replaced)} -> {rewrite.replacement or 'nothing'}"
    return code(rewrite.where), escaped(what), code(rewrite.identity)


def _undone(report: Report) -> Iterator[str]:
    if not report.undone:
        return
    yield from ("### Undone", "")
    yield "Verification found these rewrites at fault, and the model was fused without them. Please report this."
    yield ""
    rows = [
        (*_rewrite_row(one.rewrite), escaped(" ".join(map(sentence, map(capital, undone_lines(one))))))
        for one in report.undone
    ]
    yield from _table(("where", "what was tried", "because", "what was wrong"), rows)


def _refusals(report: Report) -> Iterator[str]:
    if not report.refusals:
        return
    yield from ("### Left as it is", "")
    groups = grouped_refusals(report.refusals)
    rows = [
        (str(len(group)), *map(escaped, (first.subject, places(group), sentence(first.reason), first.remedy)))
        for first, group in groups
    ]
    yield from _table(("times", "what", "where", "why", "what would lift it"), rows, (0,))
    every = [f"- {code(one.where)}: {escaped(one.subject)}" for _, group in groups for one in group]
    yield from _folded(f"all {len(every)} places", [*every, ""])


def _choices(report: Report) -> Iterator[str]:
    if report.choices is None:
        return
    yield from ("### Choices", "")
    if not report.choices:
        yield from ("None: no region has more than one operation.", "")
    for group in grouped_choices(report.choices):
        yield f"{len(group)} × {escaped(places(group))}"
        yield ""
        columns = ("candidate", "est. time", "multiply-adds", "weights", "launches", "")
        yield from _table(columns, [_candidate(group[0], index) for index in shown_candidates(group[0])], range(1, 5))


def _candidate(choice: Choice, index: int) -> tuple[str, ...]:
    candidate, won = choice.candidates[index], index == choice.chosen
    cost = candidate.cost
    prices = ("-",) * 4
    if cost is not None:
        prices = (duration(cost.seconds), count(cost.macs), count(cost.parameters), count(cost.launches))
    remark = f"**chosen: {escaped(choice.why)}**" if won else escaped(candidate.excluded)
    return (escaped(candidate.description), *prices, remark)


def _rest(report: Report) -> Iterator[str]:
    if report.files:
        yield from ("### Written", "", *(f"- {kind}: {code(path)}" for kind, path in report.files.items()), "")
    if report.notes:
        yield from ("### Notes", "", *(f"- {escaped(sentence(note))}" for note in report.notes), "")
    rows = [("captured", CAPTURED.get(report.capture, report.capture)), *tables.environment_rows(report)]
    yield from _folded("environment", _table(("setting", "value"), [_pair(*row) for row in rows]))
