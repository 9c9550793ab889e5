"""The latency of the zoo: the verdict can turn red, a stopped run goes on, and two engines never share a table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import zoo_latency
from benchmarks.zoo_latency import INTEREST, Candidate, listed, load, pending, save
from benchmarks.zoo_latency_table import Latency, Row, complaints, markdown, summary
from reparam.bench import Ratio
from tools import record

CONDITIONS = {
    "revision": "abc", "hardware": "abacus", "threads": 1, "machine": "default", "torch": "2", "timm": "1",
    "onnxruntime": "3",
}  # fmt: skip
FACTS: dict[str, Any] = {"command": "python x.py", "conditions": CONDITIONS}
COUNTS = {"convolutions": 9, "batch_norms": 8, "linears": 1, "nodes": 30}


def latency(value: float, low: float, high: float, runs: int = 30, doubts: tuple[str, ...] = ()) -> Latency:
    return Latency(2e-3, 2e-3 / value, Ratio("original", value, low, high, runs), doubts)


def row(model: str = "net", eager: Latency | None = None, **changes: Any) -> Row:
    after = {**COUNTS, "convolutions": 4, "batch_norms": 0}
    fields = {"size": 224, "before": COUNTS, "after": after, "eager": eager or latency(1.5, 1.4, 1.6)}
    return replace(Row("family", model, 10), **{**fields, **changes})


FASTER, SAME, SLOWER = latency(1.5, 1.4, 1.6), latency(1.0, 0.98, 1.02), latency(0.8, 0.75, 0.85)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"eager": SAME}, []),
        ({"eager": latency(0.8, 0.7, 1.01)}, []),
        ({"eager": latency(0.8, 0.7, 0.9, runs=4)}, []),
        ({"eager": SLOWER}, ["eager: slower by x1.25 (1.18-1.33)"]),
        ({"onnx": SLOWER}, ["onnxruntime: slower by x1.25 (1.18-1.33)"]),
        ({"eager": None, "refused": "CaptureError: no"}, []),
        ({"eager": None, "failed": "NotEquivalentError: no"}, ["NotEquivalentError: no"]),
        ({"onnx_failed": "original: ExportError: no"}, []),
        ({"onnx_failed": "fused: ExportError: no"}, ["ONNX of fused: ExportError: no"]),
    ],
)
def test_complaints(changes: dict[str, Any], words: list[str]) -> None:
    assert list(complaints(replace(row(), **changes))) == words


def test_page() -> None:
    rows = [
        row("quick"),
        row("same", SAME, onnx=FASTER),
        row("slow", latency(0.8, 0.75, 0.85, doubts=("busy",))),
        replace(row("closed"), eager=None, refused="CaptureError: no"),
        row("odd", onnx_failed="original: ExportError: no"),
    ]
    page = markdown(rows, FACTS)
    assert "`python x.py` on abacus, 1 thread(s), torch 2, timm 1, onnxruntime 3, reparam at abc" in page
    assert (
        "| family | quick | 9 / 4 | 8 / 0 | 1 / 1 | 30 / 30 | 2.00 | 1.33 | 1.50 (1.40-1.60) | faster | 30 | - | - | - "
        "| - | 0.0 |" in page
    )
    assert "| 1.00 (0.98-1.02) | no measurable difference | 30 | 2.00 | 1.33 | 1.50 (1.40-1.60) | faster |" in page
    assert "| 0.80 (0.75-0.85)* | slower |" in page
    assert "| closed |" not in page
    text = " ".join(summary(rows))
    assert "eager: 4 models, 2 faster, 1 no measurable difference, 1 slower, 0 undecided; 1 with doubtful" in text
    assert "onnxruntime: 1 models, 1 faster" in text
    assert "Not captured (1): - closed: CaptureError: no" in text
    assert "No ONNX file (1): - odd: original: ExportError: no" in text
    assert "Slower, or failed (1): - slow: eager: slower by x1.25" in text
    assert summary(rows[:2])[-1] == "No model became slower."


def test_saved_rows_come_back(tmp_path: Path) -> None:
    rows = {"a": row("a", onnx=SAME), "b": replace(row("b"), eager=None, refused="CaptureError: no")}
    save(tmp_path, rows, FACTS)
    assert load(tmp_path, CONDITIONS) == rows
    assert load(tmp_path / "elsewhere", CONDITIONS) == {}


@pytest.mark.parametrize("key", list(CONDITIONS))
def test_two_engines_do_not_share_a_table(key: str, tmp_path: Path) -> None:
    save(tmp_path, {"a": row("a")}, FACTS)
    with pytest.raises(ValueError, match=f"was measured with {key} {CONDITIONS[key]}, now other: move it away"):
        load(tmp_path, {**CONDITIONS, key: "other"})


@pytest.mark.parametrize(
    ("arguments", "due"),
    [
        ([], ["new"]),
        (["--models", "^(new|fast)$"], ["new"]),
        (["--again", "all"], ["new", "shut", "slow", "fast"]),
        (["--again", "all", "--models", "a"], ["fast"]),
        (["--again", "slower"], ["new", "slow"]),
        (["--again", "failed"], ["new", "shut"]),
        (["--onnx"], ["new", "slow", "fast"]),
    ],
)
def test_pending(arguments: list[str], due: list[str]) -> None:
    candidates = [Candidate("f", "fast", 4), Candidate("f", "slow", 3), Candidate("f", "shut", 2)]
    rows = {"fast": row("fast"), "slow": row("slow", SLOWER), "shut": replace(row("shut"), eager=None, refused="no")}
    found = pending([*candidates, Candidate("f", "new", 1)], rows, zoo_latency.parse(arguments))
    assert [candidate.model for candidate in found] == due


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.pretrained_cfg = {"input_size": (3, 16, 16)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu()  # type: ignore[no-any-return]


class Branching(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else x


class Broken(Small):
    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (4, 16, 16)}


def test_a_run_measures_saves_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models: dict[str, type[nn.Module]] = {"small": Small, "branching": Branching}
    built: list[str] = []

    def create(name: str) -> nn.Module:
        built.append(name)
        return models[name]().eval()

    monkeypatch.setattr(zoo_latency.timm_zoo, "create", create)
    monkeypatch.setattr(zoo_latency, "listed", lambda: [Candidate("f", name, 1) for name in models])
    monkeypatch.setattr(zoo_latency, "conditions", lambda args: CONDITIONS)
    monkeypatch.setattr(Latency, "verdict", "faster")  # no verdict of this test hangs on time
    arguments = ["--seconds", "0", "--out", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        assert zoo_latency.main(arguments) == 0
        assert zoo_latency.main(arguments) == 0
        assert built == ["small", "branching"], "measured twice"
        models["broken"] = Broken
        assert zoo_latency.main(arguments) == 1, "a model that fails must be noticed"
        monkeypatch.setattr(zoo_latency, "conditions", lambda args: {**CONDITIONS, "revision": "def"})
        assert zoo_latency.main(arguments) == 2
    finally:
        torch.set_num_threads(threads)
    assert "measured with revision abc, now def" in capsys.readouterr().out
    saved = {row["model"]: row for row in json.loads((tmp_path / "zoo_latency.json").read_text())["rows"]}
    assert [saved["small"][side]["batch_norms"] for side in ("before", "after")] == [1, 0]
    assert saved["small"]["eager"]["ratio"]["runs"] >= zoo_latency.LEAST_RUNS
    assert saved["branching"]["refused"].startswith("CaptureError: Branching cannot be traced")
    assert saved["broken"]["failed"].startswith("InputError: the model cannot run on the example input")
    assert (tmp_path / "zoo_latency.md").exists()


def test_list_of_models() -> None:
    models = listed()
    assert 60 <= len(models) <= 120
    assert len({candidate.model for candidate in models}) == len(models)
    assert set(INTEREST) <= {candidate.model for candidate in models}


def test_engine_revision_follows_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "reparam").mkdir()
    source = tmp_path / "reparam" / "a.py"
    source.write_text("x = 1\n")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    before = record.engine_revision()
    assert before == record.engine_revision()
    assert "-changed-" in before
    source.write_text("x = 2\n")
    assert record.engine_revision() != before
