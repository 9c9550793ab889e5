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


class LayerScaled(nn.Module):
    """ConvNeXt's block: depthwise, LayerNorm, two linears in channels-last layout, `gamma`, drop path, `x +`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = conv(2, channels, channels, 3, groups=channels, bias=True)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 12), nn.Linear(12, channels)
        self.gamma = nn.Parameter(torch.randn(channels))
        self.drop_path = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.mix(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ScaledAttention(nn.Module):
    """Attention of tokens with `1 / sqrt(d)` written out, and a temperature behind the last linear.

    `where`: what is scaled, "query" or "scores"; `joint`: query, key and value are one layer.
    """

    def __init__(self, where: str, joint: bool) -> None:
        super().__init__()
        self.where, self.scale = where, 3**-0.5
        self.qkv = nn.Linear(6, 18) if joint else None
        self.q, self.k, self.v = (None if joint else nn.Linear(6, 6) for _ in range(3))
        self.out, self.temperature = nn.Linear(6, 5), 0.7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        if self.qkv is not None:
            q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            assert self.q is not None
            assert self.k is not None
            assert self.v is not None
            q, k, v = (layer(x).reshape(batch, tokens, 2, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.where == "query":
            scores = (q * self.scale) @ k.transpose(-2, -1)
        else:
            scores = (q @ k.transpose(-2, -1)) / (1 / self.scale)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, 6)
        return torch.softmax(self.out(mixed) / self.temperature, -1)


class RelativePositions(nn.Module):
    """A window's attention with the bias of relative positions, looked up in a table: Swin's."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.qk, self.side = nn.Linear(6, 12), side
        self.table = nn.Parameter(torch.randn((2 * side - 1) ** 2, 2))
        at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
        step = at[:, :, None] - at[:, None, :] + side - 1
        self.register_buffer("index", step[0] * (2 * side - 1) + step[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k = self.qk(x).reshape(batch, tokens, 2, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(tokens, tokens, 2).permute(2, 0, 1)
        scores = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        return (scores @ x.unsqueeze(1)).flatten(2)


class NormalisedInput(nn.Module):
    """`(x - mean) / std` of literals at the head, then a stem without padding, or with it."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.stem, self.norm = conv(2, 3, 8, 3, stride=2, padding=padding), bn(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
        return F.relu(self.norm(self.stem((x / 2.0 - mean) / std)))


class Clutter(nn.Module):
    """What generated code is full of: `* 1`, `+ 0`, `-(-x)`, reshapes to the same sizes, one thing computed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(2, 4, 6, 3), bn(2, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x * 1)
        y = (y.reshape(y.shape) + 0) ** 1
        y = self.norm(torch.cat([y], 1).permute(0, 1, 2, 3)[:, :])
        gate = torch.sigmoid(F.relu(-torch.neg(y)) - 0.0)
        return gate * (F.relu(y) / 1) * torch.sigmoid(F.relu(y))


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
    BlockCase("layer_scale", partial(LayerScaled, 4), shape(2, 4), {"conv": 1, "linear": 2, "mul": 0}, since="5"),
    *(
        BlockCase(
            f"scaled_{where}_{'joint' if joint else 'apart'}",
            partial(ScaledAttention, where, joint),
            (2, 5, 6),
            {"linear": 2, "mul": 0} if joint else {"mul": 0},
            since="5",
            flexible=False,
        )
        for where in ("query", "scores")
        for joint in (True, False)
    ),
    BlockCase("relative_positions", partial(RelativePositions, 3), (2, 9, 6), {"linear": 1}, since="5", flexible=False),
    BlockCase(
        "normalised_input",
        partial(NormalisedInput, 0),
        shape(2, 3),
        {"conv": 1, "bn": 0, "add": 0, "mul": 0},
        since="5",
    ),
    BlockCase(
        "normalised_input_padded",
        partial(NormalisedInput, 1),
        shape(2, 3),
        {"conv": 1, "bn": 0, "add": 1, "mul": 0},
        since="5",
    ),
    BlockCase("clutter", Clutter, shape(2, 4), {"conv": 1, "bn": 0, "add": 0, "mul": 2}, since="5"),
]
