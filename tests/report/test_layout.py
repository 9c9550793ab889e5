"""What the page is made of, before it is drawn: scales, groups, diagrams, headline and cells."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest

from reparam.report import GraphView, NodeView, Report
from reparam.report.charts import APART, error_chart, latency_chart, linear, logarithmic
from reparam.report.diagram import BOX, HEIGHT, drawn
from reparam.report.headline import headline
from reparam.report.markdown import code, escaped
from reparam.report.tables import footprint_rows, remarks, share
from reparam.report.tree import MOST_SHOWN, Entry, grouped
from tests.report.cases import FULL, comparison, graph, output, timing


@pytest.mark.parametrize("high", [1e-9, 0.7, 1.0, 3.0, 9.99, 4321.0])
def test_a_linear_scale_begins_at_zero(high: float) -> None:
    axis = linear(high)
    assert (axis(0.0), axis(axis.high)) == (0.0, 100.0)
    assert axis(high) < 100.0
    assert axis(high / 2) == pytest.approx(axis(high) / 2, abs=0.02)
    assert 2 <= len(axis.ticks) <= 8
    assert all(place == axis(value) for place, value in axis.ticks)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (1e-7, 2e-7), (3e-16, 5e-6), (0.1, 1e12)])
def test_a_logarithmic_scale_holds_both_ends(low: float, high: float) -> None:
    axis = logarithmic(low, high)
    assert 0 < axis(low) <= axis(high) < 100
    assert axis(math.sqrt(low * high)) == pytest.approx((axis(low) + axis(high)) / 2, abs=0.02)
    places = [place for place, _ in axis.ticks]
    assert all(right - left >= APART for left, right in itertools.pairwise(places))
    assert places


def test_values_beyond_a_scale_stand_at_its_end() -> None:
    assert logarithmic(1.0, 2.0)(1e9) == 100.0
    assert logarithmic(1.0, 2.0)(0.0) == 0.0


def test_latencies_that_span_much_are_on_a_logarithmic_scale() -> None:
    assert latency_chart(timing()).axis.log is False  # type: ignore[union-attr]
    wide = latency_chart(timing(100.0))
    assert wide is not None
    assert wide.axis.log
    original, fused = wide.strips
    assert original.box is not None
    assert fused.box is not None
    assert fused.box[0] < fused.box[1] < fused.box[2] < fused.p95 < original.box[0]
    assert latency_chart(replace(timing(), samples={"original": ()})) is None


def test_one_sample_has_no_box() -> None:
    chart = latency_chart(replace(timing(), samples={"original": (0.1,)}))
    assert chart is not None
    assert chart.strips[0].box is None
    assert chart.strips[0].dots.count("M") == 1


def test_errors_that_are_no_numbers_are_left_out_of_the_chart() -> None:
    case = replace(comparison().cases[0], outputs=(output(numeric_error=math.nan, numeric_ratio=math.inf),))
    chart = error_chart(replace(comparison(), cases=(case,)))
    assert chart is not None
    (mark,) = chart.marks
    assert (mark.error, mark.noise is None, mark.used) == (None, False, 100.0)
    nothing = replace(case, outputs=(output(numeric_error=0.0, original_noise=0.0, numeric_ratio=0.0),))
    exact = error_chart(replace(comparison(), cases=(nothing,)))
    assert exact is not None
    assert (exact.axis, exact.marks[0].used) == (None, 0.0)
    assert error_chart(replace(comparison(), cases=())) is None


def test_the_bar_is_the_whole_of_what_is_allowed() -> None:
    for passed in (True, False):
        chart = error_chart(comparison(passed))
        assert chart is not None
        assert chart.bar == chart.shares(1.0)
        assert [mark.used <= chart.bar for mark in chart.marks if mark.used is not None] == [passed, True]


def test_every_node_is_in_one_group() -> None:
    view = graph(30)
    whole = grouped(view)
    for side, nodes in (("before", view.before), ("after", view.after)):
        found = [entry.index for group in whole.walk() for entry in group.entries(side)]
        assert sorted(found) == list(range(len(nodes)))
        assert whole.count(side) == sum(node.is_operation for node in nodes)
    assert all(max(len(group.before), len(group.after)) <= MOST_SHOWN for group in whole.walk())
    assert [group.name for group in whole.groups] == ["input", *(f"layer{n}" for n in range(30)), "drop", "output"]
    assert whole.groups[3].regions == [2]
    assert [(f.region, len(f.entries)) for f in whole.groups[3].fragments("before", view.removed)] == [
        (2, 2),
        (None, 1),
    ]
    removed = whole.groups[31].fragments("before", view.removed)
    assert [(fragment.removed, fragment.region) for fragment in removed] == [(True, None)]


def test_small_models_are_one_group_and_long_forwards_too() -> None:
    assert grouped(graph(2)).groups == []
    long = tuple(NodeView("add", "") for _ in range(100))
    assert len(grouped(GraphView(long, long)).before) == 100


def test_modules_that_only_hold_another_one_are_named_with_it() -> None:
    nodes = tuple(NodeView("add", f"net.body.{index // 10}.x") for index in range(40))
    whole = grouped(GraphView(nodes, ()))
    assert [group.name for group in whole.groups] == ["net.body"]
    assert [group.path for group in whole.groups[0].groups] == [f"net.body.{index}" for index in range(4)]


def test_boxes_stand_below_what_they_read_and_apart() -> None:
    reads: list[tuple[int, ...]] = [(), (0,), (0,), (1, 2), (3, 0), (99,)]
    found = drawn([Entry(index, NodeView("op", "", inputs=inputs)) for index, inputs in enumerate(reads)])
    at = {box.entry.index: box for box in found.boxes}
    assert all(at[one].y + HEIGHT < at[index].y for index, inputs in enumerate(reads) for one in inputs if one in at)
    assert at[1].y == at[2].y
    assert abs(at[1].x - at[2].x) >= BOX
    assert len(found.lines) == sum(map(len, reads))
    assert all(box.x >= 0 and box.x + BOX <= found.width and box.y + HEIGHT <= found.height for box in found.boxes)


def test_lines_pass_beside_the_boxes_between_their_ends() -> None:
    """A skip past a chain, and one past a row that is wider than its ends."""
    for reads in ([(), (0,), (1,), (2, 0)], [(), (0,), (0,), (0,), (1, 2, 3), (4, 0)]):
        found = drawn([Entry(index, NodeView("op", "", inputs=inputs)) for index, inputs in enumerate(reads)])
        (lane,) = {float(x) for line in found.lines for x in re.findall(r" ([\d.]+) [\d.]+V\d", line)}
        assert 0 < lane < found.width
        between = [box for box in found.boxes if box.entry.index not in (0, len(reads) - 1)]
        assert all(not box.x <= lane <= box.x + BOX for box in between)


HEADLINES: list[tuple[Report, tuple[str, str], str]] = [
    (FULL, ("equivalent", "faster by x2.00"), "fused [eager] (1.80-2.20)"),
    (replace(FULL, comparison=comparison(False)), ("NOT equivalent", "faster by x2.00"), "fused [eager] (1.80-2.20)"),
    (replace(FULL, timing=timing(0.5)), ("equivalent", "slower by x2.00"), "fused [eager] (1.82-2.22)"),
    (replace(FULL, timing=timing(1.0)), ("equivalent", "no measurable difference"), "fused [eager] (0.90-1.10)"),
    (replace(FULL, comparison=None, onnx_comparison=None, timing=None), ("not checked", "not measured"), ""),
]


@pytest.mark.parametrize(("report", "verdicts", "which"), HEADLINES)
def test_the_headline_claims_no_more_than_was_found(report: Report, verdicts: tuple[str, str], which: str) -> None:
    top = headline(report)
    assert (top.verdict, top.speed[0]) == verdicts
    assert top.speed[1] == which
    assert (top.speed[2] == "doubtful") == bool(report.timing and report.timing.warnings)


def test_the_headline_counts_what_changed() -> None:
    assert headline(FULL).changed == "61 operations became 40: batch norms 20 -> 0, dropouts 2 -> 0."
    assert headline(replace(FULL, rewrites=())).changed == "Nothing could be folded: 61 operations stay as they are."


def test_remarks_and_space() -> None:
    assert remarks(timing()) == [
        "fused [eager] is not faster than original on this machine: its layers are too small to matter.",
        "openvino was not measured: it is not installed.",
        "few samples; take more.",
    ]
    assert footprint_rows(timing()) == [("original", "3 MiB", "-", "-", "-", "250 ms", "-")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "-"), (0.0, "0%"), (0.004, "under 1%"), (0.37, "37%"), (9.0, "900%"), (math.inf, "not finite")],
)
def test_shares_are_readable(value: float | None, expected: str) -> None:
    assert share(value) == expected


@pytest.mark.parametrize(
    ("text", "plain", "as_code"),
    [
        ("layer_1.conv", "layer_1.conv", "`layer_1.conv`"),
        ("a|b", "a\\|b", "`a|b`"),
        ("_x_", "\\_x\\_", "`_x_`"),
        ("`x`", "\\`x\\`", "`` `x` ``"),
        ("two\nlines", "two lines", "`two lines`"),
        ("# no title", "\\# no title", "`# no title`"),
    ],
)
def test_markdown_is_escaped(text: str, plain: str, as_code: str) -> None:
    assert (escaped(text), code(text)) == (plain, as_code)


def test_runs_between_modules_stand_side_by_side() -> None:
    """What follows a module that is gone stands beside what followed it, and not beside what came later."""
    modules = ["a", "", "gone", "", "b", "c", "", "d"]
    before = [NodeView(f"op{index}", module) for index, module in enumerate(modules) for _ in range(9)]
    after = [node for node in before if node.module != "gone"]
    whole = grouped(GraphView(tuple(before), tuple(after)))
    sides = [
        (group.path, {e.node.op for e in group.before}, {e.node.op for e in group.after}) for group in whole.groups
    ]
    assert sides == [
        ("a", {"op0"}, {"op0"}), ("", {"op1"}, {"op1", "op3"}), ("gone", {"op2"}, set()), ("", {"op3"}, set()),
        ("b", {"op4"}, {"op4"}), ("c", {"op5"}, {"op5"}), ("", {"op6"}, {"op6"}), ("d", {"op7"}, {"op7"}),
    ]  # fmt: skip
    late = [node for node in before if node.module or node.op == "op6"]
    moved = grouped(GraphView(tuple(late), tuple(node for node in before if node.op != "op6")))
    assert ("", {"op6"}, set()) in [
        (g.path, {e.node.op for e in g.before}, {e.node.op for e in g.after}) for g in moved.groups
    ]
