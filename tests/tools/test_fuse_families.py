"""The table of fused families: each check can fail and shows, and one model goes through all of them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reparam
from tests.support import sampled
from tools import fuse_families
from tools.fuse_families import Row, load, markdown, save

FINE = Row(
    "net",
    "alpha",
    parameters=10,
    image="3x8x8",
    way="symbolic",
    float64_error=2e-15,
    float32_passed=True,
    float32_error=3e-7,
    float32_noise=2e-7,
    onnx_written=True,
    onnx_passed=True,
    onnx_error=4e-7,
    onnx_noise=2e-7,
    before={"convolutions": 5, "batch_norms": 4, "linears": 1, "nodes": 20},
    after={"convolutions": 3, "batch_norms": 0, "linears": 1, "nodes": 9},
    rewrites=4,
    refusals=1,
    seconds={"build": 1.0, "float64": 0.5},
)
OFF = replace(FINE, model="off", family="beta", float64_error=1e-6, failures={"float64": "ValueError: relative"})
LOST = Row("lost", "gamma", failures={"process": "stopped after 900 s"})
SMALLEST = [{"family": row.family, "model": row.model, "parameters": 1} for row in (FINE, OFF, LOST)]
FACTS = {"reparam": "abc123", "torch": "2", "timm": "1.0", "smallest": SMALLEST}


class Model(nn.Module):
    """Something to fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((2, 3))


class Spoilt(nn.Module):
    """A module whose output is off by `error`, relative to the whole."""

    def __init__(self, module: nn.Module, error: float) -> None:
        super().__init__()
        self.module, self.error = module, error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.module(x)
        return y + self.error * y.abs().max()


def spoilt(result: reparam.FuseResult, error: float) -> reparam.FuseResult:
    return replace(result, module=Spoilt(result.module, error))


def case() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Model().eval(), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    "change",
    [
        {"float64_error": None},
        {"float64_error": 2e-9},
        {"float32_passed": False},
        {"float32_passed": None},
        {"onnx_passed": False},
        {"onnx_passed": None},
    ],
)
def test_a_model_fails_if_one_check_does(change: dict[str, Any]) -> None:
    assert not FINE.failed
    assert replace(FINE, **change).failed


def test_totals_lines_and_failures() -> None:
    text = markdown([FINE, OFF, LOST], FACTS)
    assert "3 of 3 families were tried." in text
    assert "2 are captured (2 by symbolic tracing), 1 are exact in float64 (largest error 1.0e-06), 2 pass" in text
    assert "10 → 6 convolutions, 8 → 0 BatchNorms, 2 → 2 linear layers, 40 → 18 operations; 8 rewrites, 2 ref" in text
    cells = "3x8x8 | symbolic | 5 → 3 | 4 → 0 | 1 → 1 | 20 → 9 | 4 | 1"
    assert f"| alpha | net | {cells} | 2.0e-15 | 3.0e-07 / 2.0e-07 | 4.0e-07 / 2.0e-07 | 2 |" in text
    assert f"| beta | off | {cells} | 1.0e-06 ✗ |" in text
    assert "- beta, off, float64: ValueError: relative (noise 2.0e-07)\n" in text
    assert "- gamma, lost, process: stopped after 900 s (noise –)\n" in text
    assert "What failed" not in markdown([FINE], FACTS)


def test_a_run_goes_on_only_with_the_same_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse_families, "OUT", tmp_path)
    monkeypatch.setattr(fuse_families, "smallest", lambda: ["searched"])
    assert fuse_families.chosen("1.0") == ["searched"]
    save({row.model: row for row in (FINE, OFF, LOST)}, FACTS)
    held = load("abc123")
    assert list(held) == ["net", "off", "lost"]
    assert replace(held["net"], onnx_notes=()) == FINE
    assert load("def456") == {}
    assert fuse_families.chosen("1.0") == SMALLEST
    assert fuse_families.chosen("1.1") == ["searched"]


def test_one_model_of_each_family_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = fuse_families.timm_zoo.import_timm()
    names = ["resnet34", "resnet18", "resnet26", "vgg11", "mobilenetv3_small_050"]
    monkeypatch.setattr(timm, "list_models", lambda: names)
    found = [(one["family"], one["model"]) for one in fuse_families.smallest()]
    assert found == [("mobilenetv3", "mobilenetv3_small_050"), ("resnet", "resnet18"), ("vgg", "vgg11")]


DOZEN = (
    *("test_byobnet", "test_resnet", "test_nfnet", "test_vit", "test_mambaout", "test_efficientnet"),
    *("regnetx_002", "starnet_s050", "lcnetv2_small", "fasternet_t0", "cspnext_tiny", "hgnetv2_b0"),
)
"""Twelve of the table's models, the same ones in every run."""


@pytest.mark.parametrize("name", sampled(DOZEN, 6))
@pytest.mark.parametrize("onnx", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["torch", "onnx"])
def test_a_dozen_of_the_table_pass(name: str, onnx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not onnx:
        monkeypatch.setattr(fuse_families, "as_onnx", lambda *_: None)
    row = fuse_families.measured(name)
    assert row.failures == {}
    assert row.way == "symbolic"
    assert row.exact
    assert row.float32_passed
    assert row.leftovers == []
    assert row.after["batch_norms"] < max(row.before["batch_norms"], 1)
    assert row.rewrites > 0
    assert row.onnx_passed is (True if onnx else None)


@pytest.mark.slow
def test_a_model_goes_through_all_checks() -> None:
    row = fuse_families.measured("test_resnet")
    assert (row.family, row.image, row.way, row.failures) == ("resnet", "3x64x64", "symbolic", {})
    assert not row.failed
    assert row.onnx_written
    assert 0 < (row.float64_error or 0) < 1e-12
    assert 0 < (row.float32_noise or 0) < 1e-4
    assert 0 < (row.onnx_error or 0) < 1e-4
    assert row.before["batch_norms"] == 15
    assert row.after["batch_norms"] == 0
    assert row.rewrites > 0
    assert set(row.seconds) == {"build", "float64", "float32", "ONNX"}


def test_an_inexact_module_is_found_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = case()
    fuse, facts = reparam.fuse, {}
    monkeypatch.setattr(reparam, "fuse", lambda *args, **options: spoilt(fuse(*args, **options), 1e-8))
    with pytest.raises(ValueError, match=r"relative error 1\.0e-08, allowed is 1e-09"):
        fuse_families.in_float64(model, x, facts)
    assert facts["way"] == "symbolic"
    assert facts["float64_error"] == pytest.approx(1e-8, rel=1e-3)


def test_a_refused_module_leaves_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = case()
    fuse, facts = reparam.fuse, {}

    def refuses(*args: Any, **options: Any) -> Any:
        result = fuse(*args, **options)
        comparison = replace(result.report.comparison, passed=False)
        raise reparam.NotEquivalentError("no", replace(result.report, comparison=comparison))

    monkeypatch.setattr(reparam, "fuse", refuses)
    with pytest.raises(reparam.NotEquivalentError):
        fuse_families.in_float32(model, x, facts)
    assert facts["float32_passed"] is False
    assert facts["after"] == {"convolutions": 1, "batch_norms": 0, "linears": 0, "nodes": 3}


@pytest.mark.slow
@pytest.mark.parametrize(("error", "passed"), [(0.0, True), (1e-2, False)])
def test_the_file_is_held_against_the_original(error: float, passed: bool) -> None:
    model, x = case()
    facts: dict[str, Any] = {}
    with nullcontext() if passed else pytest.raises(ValueError, match="NOT equivalent"):
        fuse_families.as_onnx(model, Spoilt(reparam.fuse(model, x).module, error), x, facts)
    assert facts["onnx_written"]
    assert facts["onnx_passed"] is passed
    assert (facts["onnx_error"] > 1e-3) is not passed


def test_a_failed_stage_does_not_keep_the_next_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom\nand more")

    monkeypatch.setattr(fuse_families.timm_zoo, "create_small", lambda name, lively: case())
    monkeypatch.setattr(fuse_families, "in_float64", fails)
    monkeypatch.setattr(fuse_families, "as_onnx", fails)
    row = fuse_families.measured("resnet18")
    assert row.failures == {"float64": "RuntimeError: boom", "ONNX": "RuntimeError: boom"}
    assert (row.float32_passed, row.onnx_written, row.failed) == (True, False, True)
    assert row.line == "float64: RuntimeError: boom; ONNX: RuntimeError: boom"
    monkeypatch.setattr(fuse_families.timm_zoo, "create_small", fails)
    row = fuse_families.measured("resnet18")
    assert (row.failures, list(row.seconds)) == ({"build": "RuntimeError: boom"}, ["build"])
