"""Every combination of what the constructors of convolutions take, in front of a BatchNorm and a reshape."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import reparam
from tests.support import sampled, static_counts
from tests.zoo.case import BATCH_NORM, CONV, CONV_TRANSPOSE, randomise

IMAGES = {1: (2, 4, 12), 2: (2, 4, 12, 11), 3: (2, 4, 7, 8, 9)}
Arguments = tuple[int, dict[str, Any]]


def _convolutions() -> Iterator[Arguments]:
    paddings = ("valid", "same", 0, 1, 2)
    modes = ("zeros", "reflect", "replicate", "circular")
    for rank, padding, mode in itertools.product(CONV, paddings, modes):
        for kernel, dilation, groups, stride in itertools.product((1, 2, 3), (1, 2), (1, 4), (1, 2)):
            settings = {"padding": padding, "padding_mode": mode, "kernel_size": kernel, "dilation": dilation}
            if not (padding == "same" and stride == 2):
                yield rank, {**settings, "groups": groups, "stride": stride, "bias": groups == 1}


def _transposed() -> Iterator[Arguments]:
    for rank, stride, padding, more in itertools.product(CONV_TRANSPOSE, (1, 2, 3), (0, 1), (0, 1)):
        for groups, dilation in itertools.product((1, 2), (1, 2)):
            if more < max(stride, dilation):
                settings = {"padding": padding, "output_padding": more, "stride": stride, "kernel_size": 3}
                yield rank, {**settings, "groups": groups, "dilation": dilation}


class Computed(nn.Module):
    """The convolution as a function of weights that are computed from parameters, as weight standardisation does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own: Any = self.layer
        function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.dim() - 2]
        weight = own.weight - own.weight.mean(1, keepdim=True)
        return function(x, weight, own.bias, own.stride, own.padding, own.dilation, groups=own.groups)  # type: ignore[no-any-return]


def check(layer: nn.Module, rank: int) -> None:
    model = nn.Sequential(layer, BATCH_NORM[rank](8), nn.ReLU(), nn.Flatten(2))
    randomise(model)
    x = torch.randn(IMAGES[rank])
    fused = reparam.fuse(model.eval(), x)
    comparison = fused.report.comparison
    assert comparison is not None
    assert comparison.passed
    assert not fused.report.undone
    assert static_counts(fused.module)["bn"] == 0


SOME, MORE = sampled(list(_convolutions()), 24), sampled(list(_transposed()), 12)


@pytest.mark.parametrize(("rank", "settings"), SOME)
def test_a_convolution(rank: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    check(CONV[rank](4, 8, **settings), rank)


@pytest.mark.parametrize(("rank", "settings"), MORE)
def test_a_transposed_convolution(rank: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    check(CONV_TRANSPOSE[rank](4, 8, **settings), rank)


@pytest.mark.parametrize("padding", ["valid", "same", 0, 1, (1, 0)])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_with_computed_weights(padding: Any, groups: int) -> None:
    torch.manual_seed(0)
    check(Computed(nn.Conv2d(4, 8, 3, padding=padding, groups=groups)), 2)


@pytest.mark.parametrize("rank", CONV)
def test_valid_padding_is_none(rank: int) -> None:
    torch.manual_seed(0)
    check(CONV[rank](4, 8, 3, padding="valid"), rank)
