"""The report as one HTML file that needs nothing else: no network, no fonts, no pictures beside it.

Names of models and modules, source lines and messages are other people's text: every one of them is escaped, and the
page's own policy lets no script run but the one that is written here.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from typing import TYPE_CHECKING, Any

from reparam.report import charts, diagram, evidence, format, tables
from reparam.report.headline import headline
from reparam.report.tree import Group, grouped

if TYPE_CHECKING:
    from jinja2 import Environment

    from reparam.passes.base import Rewrite
    from reparam.report.values import Report

MOST_DRAWN = 40
"""Operations of one side of a group that are drawn as a graph; more are listed only."""


def render_html(report: Report) -> str:
    """The report as a page."""
    environment = _environment()
    script = environment.loader.get_source(environment, "script.js")[0]  # type: ignore[union-attr]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    regions = () if report.graph is None else report.graph.regions
    region_of = {rewrite: number for number, region in enumerate(regions) for rewrite in region}
    return environment.get_template("report.html").render(
        report=report,
        headline=headline(report),
        captured=format.CAPTURED.get(report.capture, report.capture),
        script=script,
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'",
        operations=format.operation_rows(report),
        rewrites=_numbered(report, region_of),
        refusals=format.grouped_refusals(report.refusals),
        choices=format.grouped_choices(report.choices or ()),
        timings=[(subject, timing, charts.latency_chart(timing)) for subject, timing in tables.timings(report)],
        comparisons=[
            (subject, comparison, charts.error_chart(comparison)) for subject, comparison in tables.comparisons(report)
        ],
        graph=None if report.graph is None else grouped(report.graph),
        anchors=() if report.graph is None else report.graph.anchors,
        one_row=_one_row,
        environment_rows=tables.environment_rows(report),
    )


def _numbered(report: Report, region_of: dict[int, int]) -> list[tuple[str, list[tuple[int | None, Rewrite]]]]:
    """The rewrites that are alike under their label, each with its region."""
    index_of = {id(rewrite): index for index, rewrite in enumerate(report.rewrites)}
    return [
        (label, [(region_of.get(index_of[id(rewrite)]), rewrite) for rewrite in group])
        for label, group in format.grouped_rewrites(report.rewrites)
    ]


def _arrows(text: str) -> str:
    """An arrow that no line ends within."""
    return text.replace(" -> ", " → ")


def _one_row(group: Group) -> bool:
    """Whether a group is small enough to be drawn."""
    return 0 < max(len(group.before), len(group.after)) <= MOST_DRAWN


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("reparam.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "count": format.count,
        "duration": format.duration,
        "number": tables.number,
        "share": tables.share,
        "sentence": format.sentence,
        "capital": format.capital,
        "arrows": _arrows,
        "places": format.places,
        "undone_lines": format.undone_lines,
        "drawn": diagram.drawn,
        "latency_rows": tables.latency_rows,
        "measured_on": tables.measured_on,
        "remarks": tables.remarks,
        "footprint_rows": tables.footprint_rows,
        "case_rows": tables.case_rows,
        "case_line": evidence.case_line,
        "outputs_of": evidence.outputs_of,
        "shown_candidates": format.shown_candidates,
    }
    environment.filters.update(filters)
    environment.globals.update(
        LATENCY_COLUMNS=tables.LATENCY_COLUMNS,
        CASE_COLUMNS=tables.CASE_COLUMNS,
        FOOTPRINT_COLUMNS=tables.FOOTPRINT_COLUMNS,
    )
    return environment
