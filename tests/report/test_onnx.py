"""What `reparam export` prints: the file, its comparison, what stays and why."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from reparam.equivalence import CaseResult, Comparison
from reparam.export import OnnxFile
from reparam.export.leftovers import Leftover
from reparam.exporting import reasons_of
from reparam.passes.base import Place, Refusal
from reparam.report import OperationCounts, Report
from reparam.report.exported import Exported
from reparam.report.onnx import render_export, render_export_markdown
from tests.report.cases import UNDONE

COMPARISON = Comparison(
    passed=True, level="standard", seed=0, outputs=(), cases=(CaseResult("example", None, ((2, 3),), "passed"),),
    algebra_error=None, algebra_tolerance=1e-10, numeric_error=1e-7, original_noise=1e-7, noise_factor=2.0,
    dtype="float16", failures=(),
)  # fmt: skip
LEFT = (
    Leftover("BatchNormalization", "BatchNormalization", "node_7", "norm"),
    Leftover("Identity", "Identity", "node_9", "", "the model returns an input"),
    Leftover("Dropout", "Dropout", "node_10"),
)
FILE = OnnxFile(
    path=Path("out/net.onnx"),
    opset=20,
    nodes={"Conv": 9, **{f"Kind{number}": 1 for number in range(9)}},
    bytes=1_234_567,
    inputs=("image",),
    outputs=("logits",),
    dynamic_axes={"image": {0: "batch"}},
    simplified=True,
    checked=True,
    notes=("the size axes are fixed [because]",),
    shapes={"image": ("batch", 3, 8, 8), "logits": ("batch", 5)},
    dtypes={"image": "float32", "logits": "float32"},
    float16=True,
    comparison=COMPARISON,
    leftovers=LEFT,
)
REPORT = Report(
    "Net", "symbolic", OperationCounts(convolutions=4, nodes=9), OperationCounts(convolutions=2, nodes=5),
    refusals=(Refusal("collapse", Place("norm", "net.py:7"), "BatchNorm2d", "its scale is negative"),),
)  # fmt: skip
EXPORTED = Exported("Net from net.pt", FILE, REPORT, reasons_of(LEFT, REPORT), {"loading the model": 1.25})


def test_reasons() -> None:
    assert EXPORTED.kept == (
        "BatchNormalization norm: its scale is negative",
        "Identity node_9: the model returns an input",
        "Dropout node_10: no reason is known: please report it",
    )
    assert reasons_of(LEFT[:1], None) == ("BatchNormalization norm: the original was exported as it is",)


SAID = [
    "Net from net.pt", "1,234,567 bytes, float16 weights and activations, opset 20, simplified by onnxsim",
    "input image [batch, 3, 8, 8] float32", "output logits [batch, 5] float32", "convolutions: 4 -> 2",
    "and 2 other kinds", "the size axes are fixed [because]", "BatchNormalization norm: its scale is negative",
]  # fmt: skip


@pytest.mark.parametrize("verbose", [False, True])
def test_text(verbose: bool) -> None:
    console = Console(file=io.StringIO(), width=200)
    render_export(EXPORTED, console, verbose=verbose)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in SAID:
        assert (words in text) is not (verbose and "other kinds" in words), words
    assert ("example: passed, sizes 2x3" in text) is verbose
    assert ("loading the model: 1.2 s" in text) is verbose


def test_markdown_and_json_hold_the_same() -> None:
    text = render_export_markdown(EXPORTED)
    assert text.startswith("## Net from net.pt, fused\n")
    assert "- convolutions: 4 -&gt; 2" in text or "- convolutions: 4 -> 2" in text
    plain = json.loads(json.dumps(EXPORTED.to_dict()))
    assert plain["file"]["path"] == "out/net.onnx"
    assert plain["kept"] == list(EXPORTED.kept)
    assert plain["fusing"]["model"] == "Net"


def test_the_original_as_it_is_and_not_compared() -> None:
    console = Console(file=io.StringIO(), width=200)
    render_export(Exported("Net from net.pt", replace(FILE, comparison=None)), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Net from net.pt, as it is" in text
    assert "not compared with the original" in text
    assert "Fused" not in text


def test_a_norm_whose_merging_was_undone_is_told_so() -> None:
    report = replace(REPORT, undone=(UNDONE,))
    place = UNDONE.rewrite.place.module
    norm = Leftover("BatchNormalization", "BatchNormalization", "node_11", f"{place}.bn")
    said = f"BatchNormalization {place}.bn: merging it was undone: {UNDONE.failure}"
    assert reasons_of((norm,), report) == (said,)
    assert reasons_of((replace(norm, module=f"{place}2.bn"),), report)[0].endswith("please report it")


def test_what_fusing_said_of_a_norm_itself_goes_before_what_was_undone_around_it() -> None:
    root = replace(UNDONE, rewrite=replace(UNDONE.rewrite, place=replace(UNDONE.rewrite.place, module="")))
    around = replace(UNDONE, rewrite=replace(UNDONE.rewrite, place=replace(UNDONE.rewrite.place, module="net")))
    refusal = replace(REPORT.refusals[0], place=replace(REPORT.refusals[0].place, module="net.bn"))
    report = replace(REPORT, undone=(root, around), refusals=(refusal,))
    norm = Leftover("BatchNormalization", "BatchNormalization", "node_11", "net.bn")
    assert reasons_of((norm,), report) == (f"BatchNormalization net.bn: {refusal.reason}",)
    assert reasons_of((replace(norm, module="net.other"),), report)[0].endswith(f"undone: {UNDONE.failure}")
    assert reasons_of((replace(norm, module=""),), report)[0].endswith("please report it")
