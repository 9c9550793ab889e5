"""Operators of torch that call functions: `torch.cond` is captured with both of its branches."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from reparam import CaptureError, export_archive, export_onnx, fuse, verify
from reparam.export import OnnxSession
from tests.equivalence.nets import randomise


class Branching(nn.Module):
    """Its values decide which of two functions it calls; they may have weights."""

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.weights = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), weights
        self.other = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        first = self.first if self.weights else (lambda y: y * 2.0)
        return torch.cond(x.sum() > 0.0, first, lambda y: torch.relu(y) - 1.0, (y,))

    def first(self, y: torch.Tensor) -> torch.Tensor:
        """Where the sum is positive."""
        return self.norm(self.other(y)) * 2.0


def ready(weights: bool = False) -> nn.Module:
    return randomise(Branching(weights), seed=0).eval()


@torch.no_grad()
@pytest.mark.parametrize("weights", [False, True])
def test_both_branches_are_kept(weights: bool, tmp_path: Path) -> None:
    model, x = ready(weights), torch.rand(2, 3, 8, 8)
    result = fuse(model, x)
    assert result.report.comparison.passed
    assert any(type(rewrite).__name__ == "Rewrite" for rewrite in result.report.rewrites)
    assert not any("torch.compile" in note for note in result.report.notes), "torch compiles such operators itself"
    assert "the functions that cond calls are left as they are" in result.report.notes
    session = OnnxSession(export_onnx(result.module, x, tmp_path / "model.onnx").path)
    program = torch.export.load(export_archive(result.module, x, tmp_path / "model.pt2")).module()
    copied = copy.deepcopy(result.module)
    for other in (torch.rand(2, 3, 8, 8), -torch.rand(2, 3, 8, 8)):
        for fused in (result.module, session, program, copied):
            torch.testing.assert_close(fused(other), model(other), atol=1e-5, rtol=1e-5)


def test_two_of_them_are_compared() -> None:
    model, wrong = ready(), ready()
    comparison = verify(model, ready(), torch.rand(2, 3, 8, 8))
    assert comparison.passed
    assert not any("torch.compile" in note for note in comparison.notes)
    next(wrong.parameters()).data.mul_(1.01)
    assert not verify(model, wrong, torch.rand(2, 3, 8, 8)).passed


class Writing(nn.Module):
    """Writes to a weight in a branch, which is large enough for copies to share it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(300, 300))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def writing(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.add_(1.0)
            return x @ self.weight

        return torch.cond(x.mean() > 0, writing, lambda x: x * 1.0, (x,))  # type: ignore[no-any-return]


def test_a_branch_does_not_write_to_the_weights_of_the_model() -> None:
    model, x = Writing().eval(), torch.rand(2, 300)
    before = model.weight.detach().clone()
    with pytest.raises(CaptureError, match="writes to a parameter"):
        fuse(model, x)
    assert not verify(nn.Linear(300, 300), model, x).passed
    assert torch.equal(model.weight, before)
