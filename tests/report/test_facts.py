"""One set of facts, in each of the four forms of the report."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from reparam.report import Report
from reparam.report.text import render_text
from tests.report import cases
from tests.report.cases import FULL, REFUSAL, comparison, graph, rewrite, timing

Plain = dict[str, Any]
FACTS: list[tuple[str, Callable[[Plain], Any], Any]] = [
    # what is shown, where it stands in JSON, and what stands there
    ("Net from net.pt", lambda r: r["model"], "Net from net.pt"),
    ("by symbolic tracing", lambda r: r["capture"], "symbolic"),
    ("11.7 M", lambda r: r["before"]["parameters"], 11_689_512),
    ("1.81 G", lambda r: r["after"]["macs"], 1_814_073_343),
    ("20 x Conv2d + BatchNorm2d -> Conv2d", lambda r: len(r["rewrites"]), 21),
    ("layer19.conv (net.py:41)", lambda r: r["rewrites"][19]["where"], "layer19.conv (net.py:41)"),
    ("layer3.conv: Conv2d, layer3.bn: BatchNorm2d", lambda r: r["rewrites"][3]["replaced"],
     ["layer3.conv: Conv2d", "layer3.bn: BatchNorm2d"]),
    ("Conv2d(5, 64, 3x3)", lambda r: r["rewrites"][5]["replacement"], "Conv2d(5, 64, 3x3)"),
    ("W' = W * g / sqrt(v + eps)", lambda r: r["rewrites"][0]["identity"], "W' = W * g / sqrt(v + eps)"),
    ("dropout(x) = x in eval mode", lambda r: r["rewrites"][20]["identity"], "dropout(x) = x in eval mode"),
    ("5 x BatchNorm1d", lambda r: len(r["refusals"]), 5),
    ("head.bn (net.py:50)", lambda r: r["refusals"][4]["where"], "head.bn (net.py:50)"),
    ("it follows a ReLU", lambda r: r["refusals"][0]["reason"], "it follows a ReLU"),
    ("move it before the ReLU", lambda r: r["refusals"][0]["remedy"], "move it before the ReLU"),
    ("layer7.conv (net.py:41)", lambda r: r["undone"][0]["where"], "layer7.conv (net.py:41)"),
    ("A(B(x)) = C(x)", lambda r: r["undone"][0]["rewrite"]["identity"], "A(B(x)) = C(x)"),
    ("9 times what is allowed", lambda r: r["undone"][0]["failure"],
     "output: the error of the candidate is 9 times what is allowed"),
    ("the first tensor that only the original computes is that of conv2d in layer7",
     lambda r: r["undone"][0]["parting"], cases.UNDONE.parting),
    ("worst element [0, 7] of [2, 10]", lambda r: r["undone"][0]["worst"], [0, 7]),
    ("error of the model with it 0.12, without it 2e-15", lambda r: r["undone"][0]["error_with"], 0.125),
    ("one layer: Conv2d(8, 8, 3x3)", lambda r: r["choices"][0]["chosen"], 1),
    ("bn stays in front of conv: it is padded", lambda r: r["choices"][0]["candidates"][2]["excluded"],
     "bn stays in front of conv: it is padded"),
    ("chosen: least estimated time", lambda r: r["choices"][0]["why"], "least estimated time"),
    ("float64 error 1.5e-13", lambda r: r["comparison"]["algebra_error"], 1.5e-13),
    ("beside the original's own 1.9e-07", lambda r: r["comparison"]["original_noise"], 1.9e-7),
    ("equivalent on 2 input cases", lambda r: r["equivalent"], True),
    ("random normal (2x3x8x8, seed 31): passed", lambda r: r["comparison"]["cases"][1]["seed"], 31),
    ("left out of the budget", lambda r: r["comparison"]["cases"][2]["notes"], ["left out of the budget"]),
    ("output['logits'] on example", lambda r: r["comparison"]["outputs"][0]["name"], "output['logits']"),
    ("0.37", lambda r: r["onnx_comparison"]["outputs"][0]["numeric_ratio"], 0.37),
    ("the output is constant in places", lambda r: r["comparison"]["notes"], ["the output is constant in places"]),
    ("4.2 ms", lambda r: round(r["timing"]["medians"]["original"], 6), 0.004195),
    ("2.19 ms", lambda r: round(r["timing"]["p95s"]["fused [eager]"], 5), 0.00219),
    ("faster by x2.00 (1.80-2.20)", lambda r: r["timing"]["ratios"]["fused [eager]"]["verdict"],
     "faster by x2.00 (1.80-2.20)"),
    ("40 paired runs", lambda r: r["timing"]["runs"], 40),
    ("Test CPU", lambda r: r["timing"]["hardware"], "Test CPU"),
    ("few samples; take more", lambda r: r["timing"]["warnings"], ["few samples; take more"]),
    ("net.fused.onnx", lambda r: r["files"], {"onnx": "net.fused.onnx"}),
    ("2.13.0", lambda r: r["environment"]["torch"], "2.13.0"),
    ("seed 1234", lambda r: r["comparison"]["seed"], 1234),
    ("seed 77", lambda r: r["timing"]["seed"], 77),
    ("250 ms", lambda r: r["seconds"], {"fusing": 0.25}),
    ("the model was in train mode", lambda r: r["notes"], ["the model was in train mode"]),
]  # fmt: skip


class _Words(HTMLParser):
    """What a page says, without its style and script."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.tags: set[str] = set()
        self._silent = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self._silent = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._silent = False

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.said.append(data)


def as_text(report: Report) -> str:
    console = Console(file=io.StringIO(), width=2000, color_system=None)
    render_text(report, console, verbose=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def as_markdown(report: Report) -> str:
    return report.to_markdown().replace("\\", "").replace("`", "").replace("</summary>", "")


def as_html(report: Report) -> str:
    words = _Words()
    words.feed(report.to_html())
    return "".join(words.said)


FORMS = {"text": as_text, "markdown": as_markdown, "html": as_html}


def said(form: str, report: Report) -> str:
    """In one line, in lower case, with one sign for `times` and one for `becomes`."""
    one = " ".join(FORMS[form](report).split()).lower()
    return (
        one.replace("×", "x").replace("→", "->").replace("| 20 |", "20 x").replace("| 5 |", "5 x").replace("x | ", "x ")
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_fact_is_in_every_form(form: str) -> None:
    shown = said(form, FULL)
    assert [fact for fact, _, _ in FACTS if fact.lower() not in shown] == []


@pytest.mark.parametrize(("fact", "where", "value"), FACTS, ids=[fact for fact, _, _ in FACTS])
def test_every_fact_is_in_json(fact: str, where: Callable[[Plain], Any], value: Any) -> None:
    assert where(json.loads(json.dumps(FULL.to_dict(), allow_nan=False))) == value


OTHERS: list[tuple[str, Report, list[str]]] = [
    ("not equal", replace(FULL, comparison=comparison(False)),
     ["not equivalent: output: the error is 9 times the bar", "case ones: nan"]),
    ("not faster", replace(FULL, timing=timing(0.8, warnings=())), ["slower by x1.25", "too small to matter"]),
    ("not measured", replace(FULL, timing=None), []),
    ("nothing to do", replace(FULL, rewrites=(), refusals=(), graph=None), ["no operation could be folded"]),
    ("interrupted", replace(FULL, timing=timing(partial=True)), ["partial", "40 complete rounds were kept"]),
    ("interrupted at once", replace(FULL, timing=None, interrupted="measuring latency"),
     ["partial: interrupted while measuring latency; no round was complete"]),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "report", "facts"), OTHERS, ids=[name for name, _, _ in OTHERS])
def test_what_else_may_have_happened(form: str, name: str, report: Report, facts: list[str]) -> None:
    shown = said(form, report)
    assert [fact for fact in facts if fact not in shown] == []
    assert ("partial" in shown) == report.partial == json.loads(json.dumps(report.to_dict()))["partial"]


def test_a_failed_comparison_is_never_called_equivalent() -> None:
    failed = replace(FULL, comparison=comparison(False), onnx_comparison=None)
    for form in FORMS:
        assert "equivalent" not in said(form, failed).replace("not equivalent", "")
    assert failed.to_dict()["headline"]["verdict"] == "NOT equivalent"


MARKS = set("h2 h3 p ul li strong em table thead tbody tr th td code details summary blockquote br".split())
NAMES = [
    "<script>alert(1)</script>",
    "a|b",
    "`x`",
    "**bold**",
    "[l](http://x)",
    "</details>",
    "' onload='x",
    "<img src=x>",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_and_nothing_else(name: str) -> None:
    small = graph(layers=0)
    evil = replace(
        FULL,
        model=name,
        rewrites=(replace(rewrite(0), replaced=(name,), replacement=name, identity=name),),
        refusals=(replace(REFUSAL, subject=name, reason=name, remedy=name),),
        files={"onnx": name},
        notes=(name,),
        graph=replace(small, before=tuple(replace(node, module=name, op=name) for node in small.before)),
    )
    page = evil.to_html()
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "onload='x" not in page
    assert page.count("<script>") == 1
    assert as_html(evil).count(name) >= 8
    shown = MarkdownIt("commonmark").enable("table").render(evil.to_markdown())
    words = _Words()
    words.feed(shown)
    assert words.tags <= MARKS, "nothing but what the report itself is made of"
    assert "".join(words.said).count(name) >= 8
    assert len(set(re.findall(r"<tr>(?:(?!</tr>).)*", shown, re.DOTALL))) > 5
    for table in re.findall(r"<table>.*?</table>", shown, re.DOTALL):
        assert len({row.count("<td") for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)[1:]}) == 1
