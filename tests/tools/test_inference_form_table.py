"""The table of constants and scales: operations are counted, complaints turn red, rows outlive a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import inference_form
from benchmarks.inference_form import Row, load, markdown, operations, save
from benchmarks.zoo_latency_table import Latency
from reparam.bench import Ratio
from reparam.capture.trace import capture
from tests.zoo.trap import Lambda

CONDITIONS = {"revision": "abc", "hardware": "abacus", "threads": 1, "torch": "2", "timm": "1", "onnxruntime": "3"}
FACTS: dict[str, Any] = {"command": "python x.py", "conditions": CONDITIONS}


def latency(value: float, low: float, high: float) -> Latency:
    return Latency(2e-3, 2e-3 / value, Ratio("original", value, low, high, 30))


GOOD = Row("net", 224, (5, 40), (0, 30), 1e-15, latency(1.5, 1.4, 1.6), latency(1.0, 0.9, 1.1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"after": (2, 30)}, "2 constant operations are left"),
        ({"error": 1e-8}, "float64 error 1.0e-08"),
        ({"error": float("nan")}, "float64 error nan"),
        ({"eager": latency(0.8, 0.7, 0.9)}, "eager: slower"),
        ({"onnx": latency(0.8, 0.7, 0.9)}, "onnxruntime: slower"),
        ({"failed": "ValueError: no"}, "ValueError: no"),
    ],
)
def test_complaints(changes: dict[str, Any], words: str) -> None:
    row = replace(GOOD, **changes)
    assert words in " ".join(row.complaints())
    assert bool(list(row.complaints())) == bool(words)
    assert ("What is wrong" in markdown([row], FACTS)) == bool(words)


def test_operations_that_no_input_goes_into_are_counted() -> None:
    model = Lambda(lambda m, x: x * m.w.exp().sin() + torch.cos(x), w=nn.Parameter(torch.ones(3))).eval()
    captured = capture(model, torch.ones(2, 3))
    assert operations(captured.graph, captured.root) == (2, 5)


def test_rows_outlive_a_run_of_the_same_engine(tmp_path: Path) -> None:
    save(tmp_path, {"net": GOOD}, FACTS)
    assert load(tmp_path, CONDITIONS) == {"net": GOOD}
    with pytest.raises(ValueError, match="other conditions"):
        load(tmp_path, {**CONDITIONS, "revision": "def"})


def test_a_model_that_cannot_be_built_is_a_row() -> None:
    row = inference_form.measure("no_such_model", inference_form.parse([]))
    assert row.failed
    assert json.dumps(row.failed)


def test_a_budget_ends_a_run_and_an_untimed_one_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def measure(name: str, args: Any) -> Row:
        measured.append(name)
        return replace(GOOD, model=name)

    monkeypatch.setattr(inference_form, "measure", measure)
    monkeypatch.setattr(inference_form, "conditions", lambda args: CONDITIONS)
    assert inference_form.main(["--out", str(tmp_path), "--untimed"]) == 0
    assert measured == list(inference_form.MODELS)
    assert list(tmp_path.iterdir()) == []
    measured.clear()
    assert inference_form.main(["--out", str(tmp_path), "--budget", "0"]) == 0
    assert "the budget is spent before" in capsys.readouterr().out
    assert measured == []
    inference_form.main(["--out", str(tmp_path), "--models", "^convnext"])
    inference_form.main(["--out", str(tmp_path), "--budget", "5"])
    assert measured == list(inference_form.MODELS)
