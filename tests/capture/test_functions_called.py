"""Operators of torch that call functions: `torch.cond` is captured with both of its branches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from reparam import CaptureError, export_onnx, fuse, verify
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
        first = (lambda y: self.other(y) * 2.0) if self.weights else (lambda y: y * 2.0)
        return torch.cond(x.sum() > 0.0, first, lambda y: torch.relu(y) - 1.0, (y,))


def ready(weights: bool = False) -> nn.Module:
    return randomise(Branching(weights), seed=0).eval()


@torch.no_grad()
def test_both_branches_are_kept(tmp_path: Path) -> None:
    model, x = ready(), torch.rand(2, 3, 8, 8)
    result = fuse(model, x)
    assert result.report.after.batch_norms == 0
    assert result.report.comparison.passed
    assert not any("torch.compile" in note for note in result.report.notes), "torch compiles such operators itself"
    file = export_onnx(result.module, x, tmp_path / "model.onnx")
    session = OnnxSession(file.path)
    for other in (torch.rand(2, 3, 8, 8), -torch.rand(2, 3, 8, 8)):
        torch.testing.assert_close(result.module(other), model(other))
        torch.testing.assert_close(session(other), model(other), atol=1e-5, rtol=1e-5)


def test_two_of_them_are_compared() -> None:
    model, wrong = ready(), ready()
    comparison = verify(model, ready(), torch.rand(2, 3, 8, 8))
    assert comparison.passed
    assert not any("torch.compile" in note for note in comparison.notes)
    next(wrong.parameters()).data.mul_(1.01)
    assert not verify(model, wrong, torch.rand(2, 3, 8, 8)).passed


def test_a_branch_with_weights_is_refused_with_the_reason() -> None:
    with pytest.raises(CaptureError, match="Unable to symbolically trace the HigherOrderOperator cond"):
        fuse(ready(weights=True), torch.rand(2, 3, 8, 8))
