"""Chains, pools and residual adds inside one linear region: DBB, ECBSR, RepMixer, RepViT, layer scales."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import AVG_POOL, BlockCase, bn, channel_parameter, conv, conv_bn, shape


def zero_pad(x: torch.Tensor, rank: int, by: int) -> torch.Tensor:
    """Zero padding by `by` on all sides of all spatial axes."""
    return F.pad(x, (by,) * (2 * rank))


def pad_with(y: torch.Tensor, value: torch.Tensor, rank: int, by: int) -> torch.Tensor:
    """Pads `y` with one value for each channel."""
    value = value.view(1, -1, *(1,) * rank)
    return zero_pad(y - value, rank, by) + value


def shift_of(norm: nn.Module) -> torch.Tensor:
    """What a BatchNorm makes of 0."""
    return norm.bias - norm.running_mean * norm.weight / torch.sqrt(norm.running_var + norm.eps)


class DBB(nn.Module):
    """`BN(kxk) + BN(1x1) + BN(kxk pad(BN(1x1))) + BN(pool pad(BN(1x1)))`, padding by what the inner BN makes of 0.

    `spelling`: "value" pads by the value with an addition; "slices" writes it into the border, as the authors do.
    """

    def __init__(self, rank: int, c_in: int, c_out: int, k: int, stride: int, groups: int, spelling: str) -> None:
        super().__init__()
        self.rank, self.by, self.spelling = rank, k // 2, spelling
        self.dense = conv_bn(rank, c_in, c_out, k, stride, groups)
        self.point = conv_bn(rank, c_in, c_out, 1, stride, groups)
        self.first = conv_bn(rank, c_in, c_in, 1, groups=groups)
        self.second = conv_bn(rank, c_in, c_out, k, stride, groups, padding=0)
        self.before_pool = conv_bn(rank, c_in, c_out, 1, groups=groups)
        self.pool = nn.Sequential(AVG_POOL[rank](k, stride), bn(rank, c_out))

    def padded(self, branch: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        y, value = branch(x), shift_of(branch[1])
        if self.spelling == "value":
            return pad_with(y, value, self.rank, self.by)
        y = zero_pad(y, self.rank, self.by)
        value = value.view(1, -1, 1, 1)
        y[:, :, : self.by, :], y[:, :, -self.by :, :] = value, value
        y[:, :, :, : self.by], y[:, :, :, -self.by :] = value, value
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dense(x) + self.point(x) + self.second(self.padded(self.first, x))
        return F.relu(y + self.pool(self.padded(self.before_pool, x)))


class ECBSR(nn.Module):
    """`3x3 + (1x1, 3x3) + (1x1, Sobel x) + (1x1, Sobel y) + (1x1, Laplacian) + x`, inner padding by the 1x1's bias.

    `spelling`: "before" pads in front of the 1x1, which makes its bias the padding; "value" pads by the bias.
    """

    def __init__(self, channels: int, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.dense = conv(2, channels, channels, 3, bias=True)
        self.points = nn.ModuleList(conv(2, channels, channels, 1, bias=True) for _ in range(4))
        self.inner = conv(2, channels, channels, 3, padding=0, bias=True)
        sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        laplace = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
        for index, mask in enumerate((sobel, sobel.T, laplace)):
            self.register_buffer(f"mask{index}", mask.expand(channels, 1, 3, 3).clone())
        self.scales = nn.ParameterList(channel_parameter(channels, 2) for _ in range(3))
        self.shifts = nn.ParameterList(channel_parameter(channels, 2) for _ in range(3))
        self.act = nn.PReLU(channels)

    def padded(self, point: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "before":
            return point(zero_pad(x, 2, 1))
        return pad_with(point(x), point.bias, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dense(x) + self.inner(self.padded(self.points[0], x)) + x
        for index, mask in enumerate((self.mask0, self.mask1, self.mask2)):
            edges = F.conv2d(self.padded(self.points[index + 1], x), mask, groups=x.shape[1])
            y = y + edges * self.scales[index] + self.shifts[index]
        return self.act(y)


class RepMixer(nn.Module):
    """FastViT: `x + gamma * (mix(x) - norm(x))`, mix being branches of depthwise, scale and identity."""

    def __init__(self, rank: int, channels: int, k: int) -> None:
        super().__init__()
        self.dense = conv_bn(rank, channels, channels, k, groups=channels)
        self.point = conv_bn(rank, channels, channels, 1, groups=channels)
        self.skip, self.norm = bn(rank, channels), bn(rank, channels)
        self.gamma = channel_parameter(channels, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.dense(x) + self.point(x) + self.skip(x)
        return x + self.gamma * (mixed - self.norm(x))


class PositionalConv(nn.Module):
    """FastViT's positional encoding: `depthwise(x) + x`."""

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__()
        self.conv = conv(rank, channels, channels, 7, groups=channels, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + x


class ConvFFN(nn.Module):
    """FastViT: `x + gamma * fc2(gelu(fc1(BN(depthwise x))))`; depthwise and fc1 stay two layers (cost)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv_bn(2, channels, channels, 7, groups=channels)
        self.fc1, self.fc2 = (
            conv(2, channels, 3 * channels, 1, bias=True),
            conv(2, 3 * channels, channels, 1, bias=True),
        )
        self.gamma, self.drop = channel_parameter(channels, 2), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gamma * self.drop(self.fc2(self.drop(F.gelu(self.fc1(self.conv(x))))))


class RepViT(nn.Module):
    """`BN(BN(3x3 x) + 1x1 x + x)`, depthwise."""

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__()
        self.dense = conv_bn(rank, channels, channels, 3, groups=channels)
        self.point = conv(rank, channels, channels, 1, groups=channels, bias=True)
        self.norm = bn(rank, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm((self.dense(x) + self.point(x)) + x)


class LearnableAffine(nn.Module):
    """`conv2(s2 * relu(s1 * (BN(conv x) + BN(x)) + b1) + b2)` with scalar `s`, `b`; `padding` of conv2 is 0 or 1."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.first, self.norm = conv_bn(2, channels, channels, 3), bn(2, channels)
        self.s1, self.b1 = nn.Parameter(torch.tensor([-0.7])), nn.Parameter(torch.tensor([0.3]))
        self.s2, self.b2 = nn.Parameter(torch.tensor([1.6])), nn.Parameter(torch.tensor([0.2]))
        self.second = conv_bn(2, channels, channels + 2, 3, padding=padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.s1 * (self.first(x) + self.norm(x)) + self.b1
        return self.second(self.s2 * F.relu(y) + self.b2)


class ExpandNet(nn.Module):
    """ExpandNets: 1x1, kxk, 1x1 in a row without bias or nonlinearity between."""

    def __init__(self, rank: int, c_in: int, c_out: int, k: int, stride: int) -> None:
        super().__init__()
        self.chain = nn.Sequential(
            conv(rank, c_in, 3 * c_in, 1),
            conv(rank, 3 * c_in, 2 * c_out, k, stride),
            conv(rank, 2 * c_out, c_out, 1, bias=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.chain(x))


class NormAfterRelu(nn.Module):
    """BN behind ReLU and in front of a padded convolution: only the scale may cross the padding."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.first, self.norm = conv(2, 4, 6, 3, bias=True), bn(2, 6)
        self.second = conv(2, 6, 4, 3, padding=padding, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(F.relu(self.first(x))))


class TwoConvs(nn.Module):
    """Two convolutions in a row; what must become of them is a question of cost and of borders."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.second(self.first(x)))


def separable() -> nn.Module:
    """Depthwise then pointwise."""
    return TwoConvs(conv_bn(2, 16, 16, 3, groups=16), conv_bn(2, 16, 32, 1))


def bias_under_padding() -> nn.Module:
    """1x1 with bias, then 3x3 with zero padding: merging is wrong at the border."""
    return TwoConvs(conv(2, 4, 6, 1, bias=True), conv(2, 6, 4, 3, bias=True))


def stripes(bias: bool) -> nn.Module:
    """1x5 then 5x1."""
    return TwoConvs(conv(2, 4, 4, (1, 5), bias=bias), conv(2, 4, 4, (5, 1), bias=bias))


_STAYS = {"conv": 2, "bn": 0}

CASES = [
    *(
        BlockCase(
            f"dbb{r}d_{i}_{o}_k{k}_s{s}_g{g}_{spelling}",
            partial(DBB, r, i, o, k, s, g, spelling),
            shape(r, i, 7),
            {"conv": 1, "bn": 0} if spelling == "value" else {},
            since="3",
            may_refuse=spelling == "slices",
        )
        for r, i, o, k, s, g, spelling in (
            (2, 4, 4, 3, 1, 1, "value"),
            (2, 4, 6, 3, 2, 2, "value"),
            (2, 4, 8, 5, 1, 4, "value"),
            (1, 4, 4, 3, 1, 2, "value"),
            (3, 4, 4, 3, 1, 1, "value"),
            (2, 4, 4, 3, 1, 2, "slices"),
        )
    ),
    *(BlockCase(f"ecbsr_pad_{s}", partial(ECBSR, 4, s), shape(2, 4), since="3") for s in ("before", "value")),
    *(
        BlockCase(f"repmixer{r}d_k{k}", partial(RepMixer, r, 6, k), shape(r, 6, 6), {"conv": 1, "bn": 0, "add": 0}, "3")
        for r, k in ((2, 3), (2, 7), (1, 3), (3, 3))
    ),
    *(
        BlockCase(f"positional_conv{r}d", partial(PositionalConv, r, 6), shape(r, 6), {"conv": 1, "add": 0})
        for r in (1, 2)
    ),
    BlockCase("conv_ffn", partial(ConvFFN, 4), shape(2, 4), {"conv": 3, "bn": 0, "mul": 0}),
    *(BlockCase(f"repvit{r}d", partial(RepViT, r, 6), shape(r, 6, 6)) for r in (1, 2, 3)),
    BlockCase(
        "learnable_affine", partial(LearnableAffine, 4, 0), shape(2, 4), {"conv": 2, "bn": 0, "mul": 0, "add": 0}, "3"
    ),
    BlockCase("learnable_affine_padded", partial(LearnableAffine, 4, 1), shape(2, 4), {"conv": 2, "bn": 0}, "2"),
    *(
        BlockCase(f"expandnet{r}d_s{s}", partial(ExpandNet, r, 4, 5, 3, s), shape(r, 4, 7), since="3")
        for r, s in ((2, 1), (2, 2), (1, 1))
    ),
    BlockCase("norm_after_relu", partial(NormAfterRelu, 0), shape(2, 4), {"conv": 2, "bn": 0}, "3"),
    BlockCase("norm_after_relu_padded", partial(NormAfterRelu, 1), shape(2, 4), {"conv": 2}),
    BlockCase("separable", separable, shape(2, 16, 12), _STAYS),
    BlockCase("bias_under_padding", bias_under_padding, shape(2, 4), _STAYS),
    BlockCase("stripes_with_bias", partial(stripes, True), shape(2, 4), _STAYS),
    BlockCase("stripes_without_bias", partial(stripes, False), shape(2, 4), {}),
]
