"""Tensors that a forward makes of literals are exact where weights are merged, and rounded once in the fused model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import reparam
from reparam.capture.literals import note_exact
from reparam.capture.trace import capture
from tests.support import relative_error
from tests.zoo.trap import Lambda

X = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.relu(m.a((x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)))


FORWARDS: dict[str, Callable[..., Any]] = {
    "number": lambda m, x: torch.relu(m.a(x)) * torch.tensor(0.1),
    "full": lambda m, x: torch.relu(m.a(x)) + torch.full((6,), 0.1),
    "ramp": lambda m, x: torch.relu(m.a(x)) + torch.linspace(0, 1, 6),
    "sines": lambda m, x: torch.relu(m.a(x)) + torch.sin(torch.arange(6)),
    "sines_by_dtype": lambda m, x: torch.relu(m.a(x)) + torch.sin(torch.arange(6, dtype=torch.float32)),
    "table": lambda m, x: (
        torch.relu(m.a(x)) + torch.cat([(torch.arange(3) * torch.exp(-torch.arange(3) / 4.0)).sin(), torch.ones(3)])
    ),
    "cast": lambda m, x: torch.relu(m.a(x)) * (torch.arange(1, 7).float() / 7),
    "in_place": lambda m, x: torch.relu(m.a(x)) * torch.ones(6).mul_(0.1),
    "beside_a_parameter": lambda m, x: torch.relu(m.a(x)) * (m.a.bias.sum() * torch.tensor(0.3)),
    "merged": normalised,
}


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Lambda(FORWARDS[name], a=nn.Conv2d(3, 4, 3)).eval()


@pytest.mark.parametrize("way", ["symbolic", "export"])
@pytest.mark.parametrize("name", FORWARDS)
def test_a_model_with_literals_is_fused(name: str, way: str) -> None:
    original = model(name)
    result = reparam.fuse(original, X, capture=way)
    assert result.report.comparison is not None
    assert result.report.comparison.passed
    assert relative_error(original(X), result.module(X)) < 1e-6
    if name == "merged":
        assert result.report.after.convolutions == 1
        assert result.report.after.additions == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_in_other_precisions_the_model_answers_as_before(dtype: torch.dtype) -> None:
    original = model("number").to(dtype)
    result = reparam.fuse(original, X.to(dtype), verify=False)
    assert relative_error(original(X.to(dtype)).double(), result.module(X.to(dtype)).double()) < 1e-2


def test_a_float64_model_is_compared_as_it_runs() -> None:
    """There `torch.tensor(0.1)` is 0.1 rounded to torch's default dtype, and stays so."""
    original = model("number").double()
    result = reparam.fuse(original, X.double())
    assert result.report.comparison is not None
    assert result.report.comparison.passed
    assert relative_error(original(X.double()), result.module(X.double())) < 1e-14


def test_the_exact_values_stand_beside_the_rounded_ones() -> None:
    captured = capture(model("number"), X)
    (node,) = [node for node in captured.graph.nodes if "exact" in node.meta]
    assert node.meta["exact"].item() == 0.1
    assert getattr(captured.root, str(node.target)).item() != 0.1
    assert reparam.fuse(model("number"), X).module(X).dtype == torch.float32


def test_numbers_that_are_others_in_the_second_trace_are_not_believed() -> None:
    original = model("number")
    captured = capture(original, X)
    (node,) = [node for node in captured.graph.nodes if node.meta.pop("exact", None) is not None]
    name = str(node.target)

    def elsewhere(value: float) -> Callable[..., Any]:
        holder = nn.Module()
        setattr(holder, name, torch.tensor(value, dtype=torch.float64))
        return lambda *_: (holder, captured.graph)

    for value, believed in ((0.2, False), (0.1, True)):
        node.meta.pop("exact", None)
        note_exact(original, reparam.inputs.Inputs.of(X), captured.root, captured.graph, [name], elsewhere(value))
        assert ("exact" in node.meta) is believed


def test_the_model_is_left_alone() -> None:
    original = model("beside_a_parameter")
    before = {name: (p.data_ptr(), p.dtype) for name, p in original.named_parameters()}
    reparam.fuse(original, X)
    assert before == {name: (p.data_ptr(), p.dtype) for name, p in original.named_parameters()}
    assert torch.get_default_dtype() == torch.float32
