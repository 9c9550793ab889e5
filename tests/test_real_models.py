"""Real models with randomised BatchNorms: what is left of each, and the errors in float64 and float32."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import nn

import reparam
from tests.support import (
    assert_unchanged,
    executed_counts,
    idle_layers,
    relative_error,
    sampled,
    snapshot,
    static_counts,
)
from tests.zoo.trap import output_of
from tools import timm_zoo

CONVS_LEFT = {
    "repvgg_a0": 22,
    "mobileone_s0": 43,
    "mobileone_s1": 43,
    "resnet18": 20,
    "resnet50": 53,
    "efficientnet_b0": None,
}
"""Convolutions left; None means as many as before."""
SIZE = 64
DEAR = {"mobileone_s0", "mobileone_s1", "resnet50"}
MODELS = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in DEAR else ()) for name in CONVS_LEFT]
)


def image(batch: int = 2, size: int = SIZE) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


@functools.cache
def case(name: str) -> tuple[nn.Module, nn.Module, Any, nn.Module]:
    """(float32 model, the same in float64, result of fusing the first, fused module of the second)."""
    model = timm_zoo.create(name)
    double = copy.deepcopy(model).double()
    before = snapshot(model)
    result = reparam.fuse(model, image(), verify=False)
    assert_unchanged(before, model)
    return model, double, result, reparam.fuse(double, image().double(), verify=False).module


@MODELS
def test_layers_left(name: str) -> None:
    model, _, result, _ = case(name)
    before = executed_counts(model, image(1))
    expected = {"conv": CONVS_LEFT[name] or before["conv"], "bn": 0, "linear": before["linear"]}
    static, executed = static_counts(result.module), executed_counts(result.module, image(1))
    assert before["bn"] > 0
    assert {kind: static[kind] for kind in expected} == expected, [str(r) for r in result.report.refusals]
    assert {kind: executed[kind] for kind in expected} == expected
    assert idle_layers(result.module) == []
    assert result.report.rewrites


@MODELS
def test_float64_is_exact(name: str) -> None:
    _, original, _, fused = case(name)
    for batch, size in ((2, SIZE), (1, SIZE + 32), (3, 40)):
        x = image(batch, size).double()
        assert relative_error(output_of(original, x), output_of(fused, x)) < 1e-12


@MODELS
def test_float32_error_is_at_most_twice_the_originals(name: str) -> None:
    """Both against the original in float64; the largest error over a few inputs, relative to the largest output."""
    model, double, result, _ = case(name)
    errors = {"original": 0.0, "fused": 0.0}
    for seed in range(3):
        x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
        truth = output_of(double, x.double())
        for key, module in (("original", model), ("fused", result.module)):
            errors[key] = max(errors[key], relative_error(truth, output_of(module, x).double()))
    assert 0 < errors["original"] < 1e-3
    assert errors["fused"] <= 2 * errors["original"]


@pytest.mark.parametrize("name", sampled(["repvgg_a0", "resnet18"], 2))
def test_with_verification_and_twice(name: str) -> None:
    model = case(name)[0]
    result = reparam.fuse(model, image())
    assert result.report.comparison.passed
    again = reparam.fuse(result.module, image(), verify=False)
    assert static_counts(again.module) == static_counts(result.module)
    assert relative_error(output_of(result.module, image()), output_of(again.module, image())) == 0
