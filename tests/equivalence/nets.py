"""Small nets with randomised BatchNorm statistics, and folds of them written out by hand."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from torch import nn


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Eval mode, statistics and affine parameters of every BatchNorm drawn at random; activations keep their scale."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            fan_in = part.weight[0].numel()
            part.weight.data = torch.randn(part.weight.shape, generator=generator) * (2.0 / fan_in) ** 0.5
            if part.bias is not None:
                part.bias.data = torch.randn(part.bias.shape, generator=generator) * 0.2
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None:
            part.running_mean = torch.randn(part.running_mean.shape, generator=generator) * 0.3
            part.running_var = torch.rand(part.running_var.shape, generator=generator) * 2 + 0.5
            part.weight.data = torch.rand(part.weight.shape, generator=generator) + 0.75
            part.bias.data = torch.randn(part.bias.shape, generator=generator) * 0.3 + 0.3
    return module.eval()


class Plain(nn.Module):
    """Conv-BN-ReLU three times, pooled, classified."""

    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__()
        channels = [3] + [width] * depth
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        for conv, bn in zip(self.convs, self.bns, strict=True):
            x = torch.relu(bn(conv(x)))
        return x

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.features(x).mean((2, 3)))


class Branchy(Plain):
    """Each stage adds a 1x1 branch, with a BN of its own, and an identity where the widths allow."""

    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__(width, depth)
        self.points = nn.ModuleList(nn.Conv2d(conv.in_channels, width, 1) for conv in self.convs)
        self.point_bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(depth))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        for conv, bn, point, point_bn in zip(self.convs, self.bns, self.points, self.point_bns, strict=True):
            x = torch.relu(0.7 * (bn(conv(x)) + point_bn(point(x))))
        return x


class TwoOutputs(Plain):
    """A dict with the logits and the feature map."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(x)
        return {"logits": self.head(features.mean((2, 3))), "map": features}


def fold_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d, eps: float | None = None) -> None:
    """BN(conv(x)) as one conv, in place, combined in the precision of the weights; the BN becomes neutral."""
    assert conv.bias is not None
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight.data / (bn.running_var + (bn.eps if eps is None else eps)).sqrt()
    conv.bias.data = (conv.bias.data - bn.running_mean) * scale + bn.bias.data
    conv.weight.data = conv.weight.data * scale.reshape(-1, 1, 1, 1)


def folded(net: Plain, *, combine: torch.dtype | None = torch.float64, eps: float | None = None) -> Plain:
    """A copy with every BN folded; combined in `combine` and rounded once, or in the model's own dtype if None."""
    dtype = net.head.weight.dtype
    out = copy.deepcopy(net).to(combine or dtype)
    for conv, bn in zip(out.convs, out.bns, strict=True):
        fold_bn(conv, bn, eps)  # type: ignore[arg-type]
    out.bns = nn.ModuleList(nn.Identity() for _ in out.bns)
    if isinstance(out, Branchy):
        for conv, point, bn in zip(out.convs, out.points, out.point_bns, strict=True):
            fold_bn(point, bn, eps)  # type: ignore[arg-type]
            conv.weight.data[:, :, 1:2, 1:2] += point.weight.data  # type: ignore[index, operator, union-attr]
            conv.bias.data += point.bias.data  # type: ignore[operator, union-attr]
            point.weight.data.zero_(), point.bias.data.zero_()  # type: ignore[operator, union-attr]
        out.point_bns = nn.ModuleList(nn.Identity() for _ in out.point_bns)
    return out.to(dtype)


def example(dtype: torch.dtype = torch.float32, seed: int = 0, batch: int = 2, size: int = 12) -> torch.Tensor:
    """A random image batch [batch, 3, size, size]."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
