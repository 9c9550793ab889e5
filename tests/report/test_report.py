"""The report as JSON and as text: every fact is in both, and long lists are grouped."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from reparam.bench import Ratio, Timing
from reparam.equivalence import CaseResult, Comparison
from reparam.passes.base import Candidate, Choice, Cost, Place, Refusal, Rewrite
from reparam.report import OperationCounts, Report
from reparam.report.format import count, duration, grouped_rewrites, rewrite_label
from reparam.report.text import render_text


def rewrite(number: int) -> Rewrite:
    return Rewrite(
        "collapse",
        Place(f"layer{number}.conv", "net.py:41"),
        (f"layer{number}.conv: Conv2d", f"layer{number}.bn: BatchNorm2d"),
        f"Conv2d({number}, 64, 3x3)",
        "W' = W * g / sqrt(v + eps)",
    )


REFUSAL = Refusal(
    "collapse", Place("head.bn", "net.py:50"), "BatchNorm1d", "it follows a ReLU", "move it before the ReLU"
)


def comparison(passed: bool = True) -> Comparison:
    failures = () if passed else ("output: the error is 9 times the bar", "case ones: NaN")
    cases = () if passed else (CaseResult("ones", None, (), "failed", failures=("NaN",)),)
    return Comparison(passed, 1.5e-13, 1e-10, 2e-7, 1.9e-7, 2.0, "float32", (), cases, failures)


def timing(value: float = 2.0) -> Timing:
    return Timing(
        {"original": (0.004, 0.005, 0.006), "fused [eager]": (0.002, 0.0025, 0.003)},
        {},
        {"fused [eager]": Ratio("original", value, value * 0.9, value * 1.1, 30)},
        hardware="Test CPU",
        device="cpu",
        threads=1,
        torch_version="2",
        seed=0,
        warnings=("few samples; take more",),
    )


REPORT = Report(
    model="Net from net.pt",
    capture="symbolic",
    before=OperationCounts(20, 20, 1, 8, 2, 70, 11_689_512, 1_814_073_344),
    after=OperationCounts(20, 0, 1, 8, 0, 48, 11_684_712, 1_814_073_344),
    rewrites=tuple(rewrite(number) for number in range(20)),
    refusals=(REFUSAL,) * 5,
    comparison=comparison(),
    timing=timing(),
    files={"onnx": "net.fused.onnx"},
    seconds={"fusing": 0.25},
    notes=("the model was in train mode",),
)


def text(report: Report, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    render_text(report, console, **options)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_text_holds_the_facts() -> None:
    printed = text(REPORT)
    for fact in (
        "Net from net.pt", "by symbolic tracing", "11.7 M", "1.81 G", "20 x Conv2d + BatchNorm2d -> Conv2d",
        "layer0.conv (net.py:41), layer1.conv (net.py:41), layer2.conv (net.py:41) and 17 more", "5 x BatchNorm1d",
        "it follows a ReLU. move it before the ReLU.", "float64 error 1.5e-13",
        "beside the original's own 1.9e-07", "5 ms", "2.5 ms", "faster by x2.00 (1.80-2.20)", "fused [eager]",
        "Test CPU", "few samples", "net.fused.onnx", "the model was in train mode",
    ):  # fmt: skip
        assert fact in printed, fact
    rows = {
        line.rsplit(None, 2)[0].strip(): line.split()[-2:] for line in printed.splitlines() if "batch norms" in line
    }
    assert rows == {"batch norms": ["20", "0"]}
    assert not any(line != line.rstrip() for line in printed.splitlines() if line.strip().endswith("onnx"))


def test_verbose_lists_everything() -> None:
    printed = text(REPORT, verbose=True)
    assert printed.count("W' = W * g") == 20
    assert "layer19.conv (net.py:41)" in printed
    assert "and 17 more" not in printed
    assert "time for fusing: 250 ms" in printed
    assert "layer19.conv" not in text(REPORT)


def test_failure_is_printed_with_its_figures() -> None:
    printed = text(replace(REPORT, comparison=comparison(False), onnx_comparison=comparison(), timing=None))
    assert "NOT equivalent: output: the error is 9 times the bar (and 1 more)" in printed
    assert "case ones: NaN." in printed
    assert "ONNX file: equivalent" in printed
    assert "Latency" not in printed


def test_nothing_to_do_is_said() -> None:
    empty = replace(REPORT, rewrites=(), refusals=(), comparison=None, timing=None, files={}, notes=())
    printed = text(empty)
    assert "no operation could be folded" in printed
    assert not any(word in printed for word in ("Left as it is", "Equivalence", "Written", "Notes"))


def choice(number: int, more: int = 0) -> Choice:
    candidates = (
        Candidate("as it is: Conv2d + BatchNorm2d", Cost(1000, 50, 2, 3e-5, 70)),
        Candidate("one layer: Conv2d(8, 8, 3x3)", Cost(900, 40, 1, 2e-5, 60)),
        Candidate("one layer, wrong", None, "bn stays in front of conv: it is padded"),
        *(Candidate(f"cut behind {n}", Cost(2000, 40, 1, 1e-5 * n, 60), "too much") for n in range(9, 9 - more, -1)),
    )
    return Choice(Place(f"layer{number}", "net.py:7"), candidates, 1, "least estimated time", "latency", "eager-cpu")


def test_choices_are_tables_with_the_winner_marked() -> None:
    report = replace(REPORT, choices=(choice(0), replace(choice(3), part=True), choice(1)))
    section = text(report).split("\nChoices\n")[1].split("\nEquivalence")[0]
    lines = [" ".join(line.split()) for line in section.splitlines() if line.strip()]
    table = [
        "candidate est. time multiply-adds weights launches",
        "as it is: Conv2d + BatchNorm2d 30 us 1,000 70 2",
        "* one layer: Conv2d(8, 8, 3x3) 20 us 900 60 1 chosen: least estimated time",
        "one layer, wrong - - - - bn stays in front of conv: it is padded",
    ]
    assert lines == [
        "for the least latency on eager-cpu; times are estimated: they are a model's prices, which only rank "
        "candidates, and no measurements",
        "2 x layer0 (net.py:7), layer1 (net.py:7)", *table,
        "part: layer3 (net.py:7)", *table,
    ]  # fmt: skip


def test_only_the_cheapest_of_many_candidates_are_printed() -> None:
    report = replace(REPORT, choices=(choice(0, more=6),))
    printed = text(report)
    assert [n for n in range(10) if f"cut behind {n}" in printed] == [4, 5]
    assert "and 4 slower ones" in printed
    everything = text(report, verbose=True)
    assert [n for n in range(10) if f"cut behind {n}" in everything] == [4, 5, 6, 7, 8, 9]
    assert "slower ones" not in everything


def test_choices_are_there_if_asked_for() -> None:
    assert "Choices" not in text(REPORT)
    assert REPORT.to_dict()["choices"] is None
    assert "none: no region has more than one operation" in text(replace(REPORT, choices=()))
    (plain,) = json.loads(json.dumps(replace(REPORT, choices=(choice(4),)).to_dict()))["choices"]
    assert {name: plain[name] for name in plain if name != "candidates"} == {
        "place": {"module": "layer4", "source": "net.py:7"}, "where": "layer4 (net.py:7)", "chosen": 1,
        "why": "least estimated time", "objective": "latency", "machine": "eager-cpu", "part": False,
    }  # fmt: skip
    assert plain["candidates"][1] == {
        "description": "one layer: Conv2d(8, 8, 3x3)", "excluded": "",
        "cost": {"macs": 900, "bytes": 40, "launches": 1, "parameters": 60, "estimated_seconds": 2e-5},
    }  # fmt: skip
    assert plain["candidates"][2]["cost"] is None


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [(None, None, None), (True, None, True), (True, True, True), (True, False, False), (False, True, False)],
)
def test_equivalent_needs_every_comparison(one: bool | None, other: bool | None, expected: bool | None) -> None:
    made = [None if passed is None else comparison(passed) for passed in (one, other)]
    assert replace(REPORT, comparison=made[0], onnx_comparison=made[1]).equivalent is expected


def test_json_is_strict_and_complete() -> None:
    broken = replace(comparison(), numeric_error=math.nan, original_noise=math.inf)
    report = replace(REPORT, comparison=broken, seconds={"fusing": math.inf})
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["comparison"]["numeric_error"] == "NaN"
    assert plain["seconds"] == {"fusing": "Infinity"}
    assert plain["before"]["batch_norms"] == 20
    assert plain["after"]["macs"] == 1_814_073_344
    assert len(plain["rewrites"]) == 20
    assert plain["rewrites"][3]["where"] == "layer3.conv (net.py:41)"
    assert plain["refusals"][0]["reason"] == "it follows a ReLU"
    assert plain["timing"]["ratios"]["fused [eager]"]["value"] == 2.0
    assert plain["timing"]["samples"]["original"] == [0.004, 0.005, 0.006]
    assert plain["files"] == {"onnx": "net.fused.onnx"}
    assert set(plain) == {"equivalent", "headline", "partial", *vars(report)}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (999_999, "999,999"),
        (1_000_000, "1 M"),
        (11_689_512, "11.7 M"),
        (4_089_184_256, "4.09 G"),
        (10**15, "1,000 T"),
    ],
)
def test_counts_are_readable(value: int, expected: str) -> None:
    assert count(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.2e-6, "4.2 us"), (3e-8, "0.03 us")]
)
def test_durations_are_readable(value: float, expected: str) -> None:
    assert duration(value) == expected


def test_labels_count_what_went() -> None:
    place = Place("block")
    branches = ("b.1: BatchNorm2d", "add", "b.0: Conv2d", "c.0: Conv2d", "c.1: BatchNorm2d")
    assert rewrite_label(Rewrite("collapse", place, branches, "Conv2d(3, 4, 3x3)", "")) == (
        "2 Conv2d + 2 BatchNorm2d + add -> Conv2d"
    )
    assert rewrite_label(Rewrite("inference_form", place, ("drop: Dropout(p=0.1)",), "", "")) == "Dropout -> nothing"


def test_what_was_merely_removed_comes_last() -> None:
    removed = Rewrite("inference_form", Place("drop"), ("drop: Dropout",), "", "")
    labels = [label for label, _ in grouped_rewrites((removed, removed, rewrite(0)))]
    assert labels == ["Conv2d + BatchNorm2d -> Conv2d", "Dropout -> nothing"]
