"""Layers whose input is a weight: they depend on no input, and whatever the engine asks of an image must bear that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reparam
from tests.support import EXACT, relative_error, run, sampled
from tests.zoo.trap import Lambda

LAYERS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "convolution": lambda m, x: m.conv(x) + m.conv(m.image),
    "convolution by a weight": lambda m, x: m.conv(x) + F.conv2d(m.image, m.kernel, padding=1),
    "transposed convolution": lambda m, x: m.up(m.conv(x)) + m.up(m.features),
    "batch norm": lambda m, x: m.conv(x) + m.norm(m.features),
    "group norm": lambda m, x: m.conv(x) + m.groups(m.features),
    "adaptive pooling": lambda m, x: m.pool(m.conv(x)) + m.pool(m.features),
    "average pooling": lambda m, x: F.avg_pool2d(m.conv(x), 2) + F.avg_pool2d(m.features, 2),
    "maximum": lambda m, x: F.max_pool2d(m.conv(x), 2) + F.max_pool2d(m.features, 2),
    "pixel shuffle": lambda m, x: F.pixel_shuffle(m.conv(x), 2) + F.pixel_shuffle(m.features, 2),
    "padding": lambda m, x: F.pad(m.conv(x), (1, 1, 1, 1)) + F.pad(m.features, (1, 1, 1, 1)),
    "unfolding": lambda m, x: F.unfold(m.conv(x), 3, padding=1) + F.unfold(m.features, 3, padding=1),
    "interpolation by a factor": lambda m, x: (
        F.interpolate(m.conv(x), scale_factor=2) + F.interpolate(m.features, scale_factor=2)
    ),
    "interpolation to the input's size": lambda m, x: (
        m.conv(x) + F.interpolate(m.features[..., :4], size=x.shape[-2:], mode="bilinear")
    ),
    "interpolation by name": lambda m, x: m.conv(x) + F.interpolate(input=m.features[..., :4], size=(8, 8)),
    "linear layer of an embedding": lambda m, x: m.conv(x) + m.linear(m.embedding.weight[:8]),
    "nothing of the input": lambda m, x: m.norm(m.conv(m.image)),
}


@pytest.mark.parametrize("name", sampled(list(LAYERS), 6))
@pytest.mark.parametrize("fixed_sizes", [False, True])
def test_a_layer_of_a_weight_is_exact(name: str, fixed_sizes: bool) -> None:
    torch.manual_seed(0)
    model = Lambda(
        LAYERS[name],
        conv=nn.Conv2d(3, 8, 3, padding=1),
        up=nn.ConvTranspose2d(8, 8, 2, 2),
        norm=nn.BatchNorm2d(8),
        groups=nn.GroupNorm(2, 8),
        pool=nn.AdaptiveAvgPool2d(4),
        linear=nn.Linear(8, 8),
        embedding=nn.Embedding(10, 8),
        image=torch.randn(1, 3, 8, 8),
        features=torch.randn(1, 8, 8, 8),
        kernel=torch.randn(8, 3, 3, 3),
    )
    model = model.double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = reparam.fuse(model, x, fixed_sizes=fixed_sizes, verify="quick")
    assert not result.report.undone
    assert relative_error(run(model, x), run(result.module, x)) < EXACT
