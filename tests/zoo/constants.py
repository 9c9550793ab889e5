"""Kernels that are expressions of parameters only."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from tests.zoo.case import BlockCase, bn, conv, shape


class WeightStandardised(nn.Conv2d):
    """`conv(x, gain * (W - mean) / sqrt(var + eps))`: BiT's and NFNet's kernels.

    `spelling`: "arithmetic", or "batch_norm", which standardises by a BatchNorm in training mode over the weight.
    """

    def __init__(self, c_in: int, c_out: int, spelling: str) -> None:
        super().__init__(c_in, c_out, 3, padding=1)
        self.gain, self.spelling = nn.Parameter(torch.randn(c_out)), spelling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "batch_norm":
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(flat, None, None, weight=self.gain, training=True, momentum=0.0, eps=1e-6)
            weight = weight.reshape_as(self.weight)
        else:
            mean = self.weight.mean((1, 2, 3), keepdim=True)
            var = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
            weight = self.gain.view(-1, 1, 1, 1) * (self.weight - mean) / torch.sqrt(var + 1e-6)
        return F.conv2d(x, weight, self.bias, padding=1)


def standardised_bn(spelling: str) -> nn.Module:
    """A weight-standardised convolution, BatchNorm, ReLU."""
    return nn.Sequential(WeightStandardised(4, 6, spelling), bn(2, 6), nn.ReLU())


def parametrised_bn(which: str) -> nn.Module:
    """A convolution under one of torch's parametrisations, then BatchNorm."""
    layer = conv(2, 4, 6, 3, bias=True)
    layer = parametrizations.weight_norm(layer) if which == "weight_norm" else parametrizations.spectral_norm(layer)
    return nn.Sequential(layer, bn(2, 6), nn.ReLU())


class EqualisedConv(nn.Module):
    """Equalised learning rate: `conv(x, W * sqrt(2 / fan_in))`, then BatchNorm."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(c_out, c_in, 3, 3)), bn(2, c_out)
        self.gain = (2 / (9 * c_in)) ** 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(F.conv2d(x, self.weight * self.gain, padding=1)))


class OREPA(nn.Module):
    """The kernel is a sum of weighted kernels, built by einsum, then BatchNorm."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(3, c_out, c_in, 3, 3))
        self.vector = nn.Parameter(torch.randn(3, c_out))
        self.norm = bn(2, c_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.einsum("noihw,no->oihw", self.kernels, self.vector)
        return F.relu(self.norm(F.conv2d(x, weight, padding=1)))


class DOConv(nn.Module):
    """Depthwise over-parameterised: `W[o, c, k] = sum_d D[c, k, d] * W'[o, d, c]`, then BatchNorm."""

    def __init__(self, c_in: int, c_out: int, depth: int) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(c_out, depth, c_in))
        self.depthwise = nn.Parameter(torch.randn(c_in, 9, depth))
        self.norm = bn(2, c_out)
        self.sizes = (c_out, c_in, 3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.einsum("ckd,odc->ock", self.depthwise, self.inner).reshape(self.sizes)
        return F.relu(self.norm(F.conv2d(x, weight, padding=1)))


class FrozenNorm(nn.Module):
    """Detection models' frozen BatchNorm, written as arithmetic on buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(2, 4, channels, 3)
        for name in ("weight", "bias", "mean"):
            self.register_buffer(name, torch.randn(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight.reshape(1, -1, 1, 1) * (self.var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        shift = self.bias.reshape(1, -1, 1, 1) - self.mean.reshape(1, -1, 1, 1) * scale
        return F.relu(self.conv(x) * scale + shift)


class DropConnect(nn.Module):
    """Classical DropConnect at inference: `conv(x, (1 - p) * W)`, then BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm, self.p = nn.Parameter(torch.randn(6, 4, 3, 3)), bn(2, 6), 0.3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(F.conv2d(x, (1 - self.p) * self.weight, padding=1)))


CASES = [
    *(
        BlockCase(f"weight_standardised_{s}", partial(standardised_bn, s), shape(2, 4), since="5")
        for s in ("arithmetic", "batch_norm")
    ),
    *(
        BlockCase(w, partial(parametrised_bn, w), shape(2, 4), since="5", may_refuse=True)
        for w in ("weight_norm", "spectral_norm")
    ),
    BlockCase("equalised_lr", partial(EqualisedConv, 4, 6), shape(2, 4), since="5"),
    BlockCase("orepa", partial(OREPA, 4, 6), shape(2, 4), since="5"),
    BlockCase("do_conv", partial(DOConv, 4, 6, 12), shape(2, 4), since="5"),
    BlockCase("frozen_norm", partial(FrozenNorm, 6), shape(2, 4), {"conv": 1, "mul": 0, "add": 0}, since="5"),
    BlockCase("drop_connect", DropConnect, shape(2, 4), since="5"),
]
