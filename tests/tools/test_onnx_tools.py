"""The comparison of tools for ONNX files: it goes on where it was, an answer that changes is marked, ours can fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import onnx_tools
from benchmarks.onnx_tools import MODELS, measured, save
from benchmarks.onnx_tools_table import ONNXSIM, ONNXSLIM, ORIGINAL, OURS, VARIANTS, Row, complaints, markdown, smaller
from benchmarks.zoo_latency import listed
from tools.record import measured_before

CONDITIONS: dict[str, Any] = {
    "revision": "abc", "hardware": "abacus", "threads": 1, "torch": "2", "timm": "1", "onnx": "3", "onnxruntime": "4",
    "onnxsim": "5", "onnxslim": "6",
}  # fmt: skip
FACTS: dict[str, Any] = {"command": "python x.py", "conditions": CONDITIONS}


def graph(nodes: int, agrees: bool = True, **more: Any) -> dict[str, Any]:
    plain = {"nodes": nodes, "bytes": 2_000_000, "batch_norms": 0, "leftovers": [], "agrees": agrees, "error": 1e-7}
    return {**plain, "noise": 1e-7, "why": "" if agrees else "off by one", **more}


def row(**changes: Any) -> Row:
    graphs = {ORIGINAL: graph(50, batch_norms=9), ONNXSIM: graph(45), ONNXSLIM: graph(40, False), OURS: graph(30)}
    samples = {name: [speed] * 30 for name, speed in zip(VARIANTS, (2000.0, 2000.0, 1000.0, 1000.0), strict=True)}
    return replace(Row("net", "family", 10, 224, graphs, samples=samples), **changes)


ODD: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"failure": "stopped after 5 s"}, ["stopped after 5 s"]),
    ({OURS: graph(30, False)}, ["our file does not agree: off by one"]),
    ({OURS: graph(30, leftovers=["Dropout d (Dropout)"])}, ["our file holds Dropout d (Dropout)"]),
    ({"stays": ["BatchNormalization b: no reason is known: please report it"]},
     ["our file keeps a node without a reason: BatchNormalization b: no reason is known: please report it"]),
    ({"stays": ["BatchNormalization b: its scale is negative"]}, []),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), ODD)
def test_complaints(changes: dict[str, Any], words: list[str]) -> None:
    fields = {key: value for key, value in changes.items() if key != OURS}
    made = row(**fields)
    made = replace(made, graphs={**made.graphs, **({OURS: changes[OURS]} if OURS in changes else {})})
    assert list(complaints(made)) == words
    assert made.failed is bool(words)


def test_a_smaller_file_of_another_tool_is_told_if_it_agrees() -> None:
    made = row()
    assert list(smaller(made)) == []
    made = replace(made, graphs={**made.graphs, OURS: graph(42)})
    assert list(smaller(made)) == []
    assert list(smaller(replace(made, graphs={**made.graphs, ONNXSLIM: graph(40)}))) == [
        "onnxslim has 40 nodes, ours 42"
    ]


def test_page() -> None:
    odd = row(
        model="odd", missing={ONNXSIM: "RuntimeError: no"}, stays=["BatchNormalization b: negative"], doubts=["busy"]
    )
    odd = replace(odd, graphs={name: found for name, found in odd.graphs.items() if name != ONNXSIM})
    odd = replace(odd, samples={name: found for name, found in odd.samples.items() if name != ONNXSIM})
    page = markdown([row(), odd, Row("gone", "f", failure="stopped after 5 s")], FACTS)
    assert "`python x.py` on abacus, 1 thread(s), torch 2, timm 1, onnx 3, onnxruntime 4, onnxsim 5, onnxslim 6" in page
    assert "| net | 50 (9), 2.0 | 45 (0), 2.0 | 40 (0), 2.0 ✗ | 30 (0), 2.0 |" in page
    assert "| net | 2 | 1.00 (1.00-1.00) | 2.00 (2.00-2.00) ✗ | 2.00 (2.00-2.00) | 30 |" in page
    assert "| odd | 2 | - | 2.00 (2.00-2.00)* ✗ | 2.00 (2.00-2.00)* | 30 |" in page
    assert "- onnxsim: 1 of 2 files agree; 50 -> 45 nodes; geometric mean of the speed-up 1.00, 0 faster" in page
    assert "- reparam: 2 of 2 files agree; 100 -> 60 nodes; geometric mean of the speed-up 2.00, 2 faster" in page
    assert "onnxslim: 0 of" not in page
    for line in ("net: onnxslim: off by one", "odd: onnxsim: RuntimeError: no", "odd: BatchNormalization b: negative"):
        assert f"- {line}" in page
    assert "What must not be (1):\n\n- gone: stopped after 5 s" in page


def test_models_are_of_the_list() -> None:
    assert len(set(MODELS)) == len(MODELS) >= 12
    assert set(MODELS) <= {candidate.model for candidate in listed()}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.pretrained_cfg = {"input_size": (3, 16, 16)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x).relu()).mean((2, 3))


@pytest.mark.slow
def test_a_row_is_measured_and_a_tool_that_is_wrong_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    def wrong(source: Path, target: Path) -> None:
        model = onnx.load(str(source))
        bias = next(tensor for tensor in model.graph.initializer if tensor.name == "conv.bias")
        array = onnx.numpy_helper.to_array(bias) + 0.5
        bias.CopyFrom(onnx.numpy_helper.from_array(array, bias.name))
        onnx.save_model(model, str(target))

    def broken(source: Path, target: Path) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(onnx_tools, "onnxslim", wrong)
    monkeypatch.setattr(onnx_tools, "simplify", broken)
    monkeypatch.setattr(onnx_tools.timm_zoo, "create", lambda name: Small().eval())
    monkeypatch.setattr(onnx_tools.timm_zoo, "family", lambda name: "f")
    made = measured("net", 0.0, 1)
    assert {name: found["agrees"] for name, found in made.graphs.items()} == {
        ORIGINAL: True,
        ONNXSLIM: False,
        OURS: True,
    }
    assert made.missing == {ONNXSIM: "RuntimeError: no"}
    assert "NOT equivalent" in made.graphs[ONNXSLIM]["why"]
    assert {len(found) for found in made.samples.values()} == {len(made.samples[ORIGINAL])}
    assert len(made.samples[ORIGINAL]) >= onnx_tools.LEAST_RUNS
    assert not made.failed


def test_onnxslim_is_called_as_it_wants_to_be(tmp_path: Path) -> None:
    from benchmarks.zoo_variants import plain_export

    plain_export(Small().eval(), torch.randn(1, 3, 16, 16), tmp_path / "a.onnx")
    onnx_tools.onnxslim(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").stat().st_size > 0


def test_a_run_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def each(function: Callable[[str], Row], names: Iterable[str], *rest: Any) -> Iterator[Row]:
        for name in names:
            asked.append(name)
            yield row(model=name)

    monkeypatch.setattr(onnx_tools.sweep, "each", each)
    monkeypatch.setattr(onnx_tools, "conditions", lambda threads: CONDITIONS)
    out = ["--out", str(tmp_path)]
    assert onnx_tools.main([*out, "--models", "resnet18|repvgg"]) == 0
    assert onnx_tools.main([*out, "--models", "resnet18|densenet"]) == 0
    assert asked == ["repvgg_a0", "resnet18", "densenet121"]
    assert [one["model"] for one in json.loads((tmp_path / "onnx_tools.json").read_text())["rows"]] == asked
    assert (tmp_path / "onnx_tools.md").exists()
    assert onnx_tools.main([*out, "--models", "resnet18", "--again", "all"]) == 0
    assert asked[-1] == "resnet18"
    monkeypatch.setattr(onnx_tools, "conditions", lambda threads: {**CONDITIONS, "hardware": "slide rule"})
    assert onnx_tools.main(out) == 2
    assert "was measured with hardware abacus, now slide rule: move it away" in capsys.readouterr().out


def test_saved_rows_come_back(tmp_path: Path) -> None:
    save(tmp_path, {"net": row(doubts=["busy"])}, FACTS)
    assert [Row(**one) for one in measured_before(tmp_path / "onnx_tools.json", CONDITIONS)] == [
        row(doubts=["busy"], stays=[])
    ]
    shutil.rmtree(tmp_path)
    assert measured_before(tmp_path / "onnx_tools.json", CONDITIONS) == []
