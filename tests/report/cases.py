"""Reports to print: one that has everything, and how to change it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reparam.bench import Ratio, Timing
from reparam.bench.footprint import Footprint
from reparam.equivalence import CaseResult, Comparison, OutputComparison
from reparam.passes.base import Candidate, Choice, Cost, Place, Refusal, Rewrite, Undone
from reparam.report import GraphView, NodeView, OperationCounts, Report


def rewrite(number: int) -> Rewrite:
    return Rewrite(
        "collapse",
        Place(f"layer{number}.conv", "net.py:41"),
        (f"layer{number}.conv: Conv2d", f"layer{number}.bn: BatchNorm2d"),
        f"Conv2d({number}, 64, 3x3)",
        "W' = W * g / sqrt(v + eps)",
    )


REMOVED = Rewrite("inference form", Place("drop", "net.py:44"), ("drop: Dropout",), "", "dropout(x) = x in eval mode")
UNDONE = Undone(
    replace(rewrite(7), identity="A(B(x)) = C(x)"),
    "output: the error of the candidate is 9 times what is allowed",
    worst=(0, 7),
    shape=(2, 10),
    error_with=0.125,
    error_without=2e-15,
    parting="the first tensor that only the original computes is that of conv2d in layer7",
)
REFUSAL = Refusal(
    "collapse", Place("head.bn", "net.py:50"), "BatchNorm1d", "it follows a ReLU", "move it before the ReLU"
)


def output(**figures: Any) -> OutputComparison:
    known = {"shape": (2, 10), "dtype": "float32", "elements": 20, "numeric_error": 2e-7, "original_noise": 1.9e-7}
    return OutputComparison(
        "output['logits']",
        **{**known, "numeric_ratio": 0.37, "algebra_per_tensor": 1e-13, "algebra_per_channel": 1.5e-13,
           "algebra_ratio": 0.02, "worst_index": (1, 3), **figures},
    )  # fmt: skip


def comparison(passed: bool = True) -> Comparison:
    failures = () if passed else ("output: the error is 9 times the bar", "case ones: NaN")
    bad = {} if passed else {"numeric_error": 5e-6, "numeric_ratio": 9.0, "failures": failures[:1]}
    cases = (
        CaseResult("example", None, ((2, 3, 8, 8),), "passed" if passed else "failed", (output(**bad),), failures[:1]),
        CaseResult("random normal", 31, ((2, 3, 8, 8),), "passed", (output(numeric_error=1e-7, numeric_ratio=0.21),)),
        CaseResult("zeros", 32, ((2, 3, 8, 8),), "skipped", notes=("left out of the budget",)),
    )
    return Comparison(
        *(passed, 1.5e-13, 1e-10, 2e-7, 1.9e-7, 2.0, "float32", cases[0].outputs, cases, failures),
        notes=("the output is constant in places",),
        seed=1234,
    )


def timing(value: float = 2.0, **facts: Any) -> Timing:
    samples = {
        "original": tuple(0.004 + 0.00001 * (7 * i % 40) for i in range(40)),
        "fused [eager]": tuple((0.004 + 0.00001 * (11 * i % 40)) / value for i in range(40)),
    }
    known: dict[str, Any] = {
        "warnings": ("few samples; take more",),
        "reasons": {"fused [eager]": ("its layers are too small to matter",)},
        "footprints": {"original": Footprint(weights_bytes=3 << 20, first_seconds=0.25)},
        "left_out": {"openvino": "it is not installed"},
    }
    return Timing(
        samples,
        {},
        {"fused [eager]": Ratio("original", value, value * 0.9, value * 1.1, 40)},
        hardware="Test CPU",
        device="cpu",
        threads=1,
        torch_version="2",
        seed=77,
        **{**known, **facts},
    )


def graph(layers: int = 20) -> GraphView:
    """A chain of `layers` times conv, norm and ReLU, with a dropout behind."""
    before, after = [NodeView("the model's input", "", detail="x", shape=(2, 3, 8, 8))], []
    after = list(before)
    for number in range(layers):
        path, end = f"layer{number}", len(before) - 1
        shape = (2, 64, 8, 8)
        before += [
            NodeView("Conv2d", f"{path}.conv", "net.py:41", shape, (end,), number, "3, 64, kernel_size=(3, 3)"),
            NodeView("BatchNorm2d", f"{path}.bn", "net.py:42", shape, (end + 1,), number),
            NodeView("relu", path, "net.py:43", shape, (end + 2,)),
        ]
        last = len(after) - 1
        after += [
            NodeView("Conv2d", f"{path}.conv", "net.py:41", shape, (last,), number, "3, 64, kernel_size=(3, 3)"),
            NodeView("relu", path, "net.py:43", shape, (last + 1,)),
        ]
    before.append(NodeView("Dropout", "drop", "net.py:44", (2, 64, 8, 8), (len(before) - 1,), layers))
    for side in (before, after):
        side.append(NodeView("the model's output", "", inputs=(len(side) - 1,)))
    return GraphView(tuple(before), tuple(after), tuple((number,) for number in range(layers + 1)))


CHOICE = Choice(
    Place("layer3", "net.py:7"),
    (
        Candidate("as it is: Conv2d + BatchNorm2d", Cost(1000, 50, 2, 3e-5, 70)),
        Candidate("one layer: Conv2d(8, 8, 3x3)", Cost(900, 40, 1, 2e-5, 60)),
        Candidate("one layer, wrong", None, "bn stays in front of conv: it is padded"),
    ),
    *(1, "least estimated time", "latency", "eager-cpu"),
)

FULL = Report(
    model="Net from net.pt",
    capture="symbolic",
    before=OperationCounts(20, 20, 1, 8, 2, 61, 11_689_512, 1_814_073_344),
    after=OperationCounts(20, 0, 1, 8, 0, 40, 11_684_712, 1_814_073_343),
    rewrites=(*(rewrite(number) for number in range(20)), REMOVED),
    refusals=(REFUSAL,) * 5,
    undone=(UNDONE,),
    choices=(CHOICE,),
    comparison=comparison(),
    onnx_comparison=comparison(),
    timing=timing(),
    files={"onnx": "net.fused.onnx"},
    environment={"torch": "2.13.0", "seed": "5", "inputs": "2x3x8x8"},
    seconds={"fusing": 0.25},
    notes=("the model was in train mode",),
    graph=graph(),
)
