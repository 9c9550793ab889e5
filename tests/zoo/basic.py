"""One layer with its BatchNorm, scale or dropout, in every spelling."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import BATCH_NORM, CONV_TRANSPOSE, BlockCase, bn, channel_parameter, conv, conv_bn, shape


def transposed_bn(rank: int, c_in: int, c_out: int, k: int, stride: int, groups: int, bias: bool) -> nn.Module:
    """A transposed convolution and its BatchNorm."""
    up = CONV_TRANSPOSE[rank](
        c_in, c_out, k, stride=stride, padding=1, output_padding=stride - 1, groups=groups, bias=bias
    )
    return nn.Sequential(up, bn(rank, c_out))


class FunctionalConvBN(nn.Module):
    """Convolution and BatchNorm as functions of bare parameters; bias and statistics partly by keyword."""

    def __init__(self, rank: int, c_in: int, c_out: int, k: int, groups: int = 1) -> None:
        super().__init__()
        self.rank, self.groups, self.k = rank, groups, k
        self.weight = nn.Parameter(torch.randn(c_out, c_in // groups, *(k,) * rank) / k)
        self.bias = nn.Parameter(torch.randn(c_out))
        self.gamma, self.beta = nn.Parameter(torch.randn(c_out)), nn.Parameter(torch.randn(c_out))
        self.register_buffer("mean", torch.randn(c_out))
        self.register_buffer("var", torch.rand(c_out) + 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[self.rank]
        y = function(x, self.weight, bias=self.bias, padding=self.k // 2, groups=self.groups)
        return F.relu(F.batch_norm(y, self.mean, self.var, self.gamma, self.beta, eps=1e-3))


class FunctionalTransposedBN(nn.Module):
    """Grouped transposed convolution and BatchNorm as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2, 3, 3))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(F.conv_transpose2d(x, self.weight, stride=2, padding=1, groups=3), self.mean, self.var)


class FunctionalLinearBN(nn.Module):
    """Linear and BatchNorm as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(7))
        self.gamma = nn.Parameter(torch.randn(7))
        self.register_buffer("mean", torch.randn(7))
        self.register_buffer("var", torch.rand(7) + 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(F.linear(x, self.weight, self.bias), self.mean, self.var, weight=self.gamma, training=False)


class Scaled(nn.Module):
    """A convolution, then constants of several shapes, in one spelling."""

    def __init__(self, spelling: str, rank: int = 2) -> None:
        super().__init__()
        self.conv = conv(rank, 4, 6, 3, bias=True)
        self.scale, self.shift = channel_parameter(6, rank), channel_parameter(6, rank)
        self.register_buffer("scalar", torch.tensor(1.7))
        self.spelling = spelling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if self.spelling == "operators":
            return F.relu(y * self.scale + self.shift)
        if self.spelling == "constants first":
            return F.relu(self.shift - self.scale * y)
        if self.spelling == "functions":
            return F.relu(torch.add(torch.mul(y, self.scale), self.shift))
        if self.spelling == "methods":
            return F.relu(y.mul(self.scale).add(self.shift))
        if self.spelling == "in place":
            y *= self.scale
            y.add_(self.shift)
            return F.relu_(y)
        if self.spelling == "scalars":
            return F.relu((2 * y / 3 - 0.1) * self.scalar)
        return F.relu(torch.sub(torch.neg(y), self.shift, alpha=0.5).div(self.scale))


class ParameterScale(nn.Module):
    """`gamma * conv(x)` with gamma a bare `(C,)` behind a `view`; the scale must fold all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(2, 4, 6, 3)
        self.gamma = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) * self.gamma.view(1, -1, 1, 1)


class Dropouts(nn.Module):
    """Convolutions and BatchNorms with every dropout and no-op of the library in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.second = conv(2, 4, 8, 3), bn(2, 8), conv_bn(2, 8, 4, 1)
        self.idle = nn.Sequential(nn.Dropout(0.3), nn.Identity(), nn.Dropout2d(0.2), nn.AlphaDropout(0.1))
        self.feature = nn.FeatureAlphaDropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.idle(self.conv(x)), 0.4, self.training)
        x = F.relu(self.norm(F.dropout2d(x, training=self.training)))
        x = F.alpha_dropout(self.feature(x), 0.5, training=self.training)
        return F.feature_alpha_dropout(self.second(x), 0.1, self.training)


class Dropouts1d3d(nn.Module):
    """The remaining ranks of channel dropout."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.conv, self.norm = conv(rank, 4, 6, 3), bn(rank, 6)
        self.drop = {1: nn.Dropout1d, 3: nn.Dropout3d}[rank](0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.drop(self.conv(x))))


class LinearBN(nn.Module):
    """Linear, BatchNorm, ReLU, with dropout between."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.fc, self.drop, self.norm = nn.Linear(5, 7, bias=bias), nn.Dropout(), BATCH_NORM[1](7, eps=1e-2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.drop(self.fc(x))))


def _conv_cases() -> list[BlockCase]:
    cases = []
    for rank in (1, 2, 3):
        for c_in, c_out, k, stride, groups, bias, eps in (
            (4, 6, 3, 1, 1, False, 1e-5),
            (6, 6, 3, 2, 6, True, 1e-3),
            (6, 9, 2, 1, 3, True, 1e-5),
            (4, 8, 1, 1, 2, False, 0.1),
        ):
            name = f"conv{rank}d_bn_{c_in}_{c_out}_k{k}_s{stride}_g{groups}"
            build = partial(conv_bn, rank, c_in, c_out, k, stride, groups, eps, bias=bias)
            cases.append(BlockCase(name, build, shape(rank, c_in, 5 if rank == 3 else 8)))
        for c_in, c_out, k, stride, groups, bias in (
            (4, 6, 3, 1, 1, True),
            (6, 6, 3, 2, 3, False),
            (6, 12, 4, 2, 2, True),
        ):
            name = f"conv_transpose{rank}d_bn_{c_in}_{c_out}_k{k}_s{stride}_g{groups}"
            build = partial(transposed_bn, rank, c_in, c_out, k, stride, groups, bias)
            cases.append(BlockCase(name, build, shape(rank, c_in, 4)))
        cases.append(
            BlockCase(f"functional_conv{rank}d_bn", partial(FunctionalConvBN, rank, 4, 6, 3, 2), shape(rank, 4, 5))
        )
    return cases


_SPELLINGS = ("operators", "constants first", "functions", "methods", "in place", "scalars", "sub neg div")
_SCALED = {"conv": 1, "bn": 0, "linear": 0, "mul": 0, "add": 0}
_LINEAR = {"conv": 0, "bn": 0, "linear": 1}

CASES = [
    *_conv_cases(),
    BlockCase("conv2d_bn_dilated", partial(conv_bn, 2, 4, 6, 3, dilation=2), shape(2, 4)),
    BlockCase("conv2d_bn_tuple_padding", partial(conv_bn, 2, 4, 6, (3, 5), padding=(2, 1)), shape(2, 4)),
    BlockCase("functional_conv_transpose2d_bn", FunctionalTransposedBN, shape(2, 6, 4)),
    BlockCase("functional_linear_bn", FunctionalLinearBN, (3, 5), _LINEAR, flexible=False),
    BlockCase("linear_bn", partial(LinearBN, True), (3, 5), {**_LINEAR, "dropout": 0}, flexible=False),
    BlockCase("linear_bn_without_bias", partial(LinearBN, False), (3, 5), _LINEAR, flexible=False),
    *(BlockCase(f"scale_{s.replace(' ', '_')}", partial(Scaled, s), shape(2, 4), _SCALED) for s in _SPELLINGS),
    *(BlockCase(f"scale_rank{r}", partial(Scaled, "operators", r), shape(r, 4, 5), _SCALED) for r in (1, 3)),
    BlockCase("scale_viewed", ParameterScale, shape(2, 4), _SCALED),
    BlockCase("dropouts", Dropouts, shape(2, 4), {"conv": 2, "bn": 0, "dropout": 0, "identity": 0}),
    *(
        BlockCase(f"dropout{r}d", partial(Dropouts1d3d, r), shape(r, 4, 5), {"conv": 1, "bn": 0, "dropout": 0})
        for r in (1, 3)
    ),
]
