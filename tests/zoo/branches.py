"""Parallel branches of one source: RepVGG and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import BlockCase, bn, channel_parameter, conv, conv_bn, shape


class RepVGG(nn.Module):
    """`relu(BN(kxk x) + BN(1x1 x) + BN(x))`; the identity branch only where shapes allow.

    `spelling` varies how the sum is written; `excite` puts squeeze-excite before or after the activation.
    """

    def __init__(
        self,
        rank: int,
        c_in: int,
        c_out: int,
        k: int = 3,
        stride: int = 1,
        groups: int = 1,
        eps: float = 1e-5,
        spelling: str = "plus",
        excite: str = "",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.dense = conv_bn(rank, c_in, c_out, k, stride, groups, eps, bias=bias)
        self.point = conv_bn(rank, c_in, c_out, 1, stride, groups, bias=bias)
        self.norm = bn(rank, c_in, eps) if c_in == c_out and stride == 1 else None
        self.spelling, self.excite = spelling, excite
        if excite:
            self.squeeze, self.expand = conv(rank, c_out, 3, 1, bias=True), conv(rank, 3, c_out, 1, bias=True)

    def branches(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "plus":
            y = self.dense(x) + self.point(x)
            return y if self.norm is None else y + self.norm(x)
        if self.spelling == "in place":
            y = self.dense(x)
            y += self.point(x)
            return y if self.norm is None else y.add_(self.norm(x))
        norm = [] if self.norm is None else [self.norm(x)]
        outputs = [self.point(x), *norm, self.dense(x)]
        if self.spelling == "sum":
            return sum(outputs)
        y = torch.zeros(())
        for output in outputs:
            y = torch.add(output, y)
        return y

    def gate(self, y: torch.Tensor) -> torch.Tensor:
        mean = y.mean((2, 3), keepdim=True)
        return y * torch.sigmoid(self.expand(F.relu(self.squeeze(mean))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.branches(x)
        if self.excite == "before":
            return F.relu(self.gate(y))
        if self.excite == "after":
            return self.gate(F.relu(y))
        return F.relu(y)


class ACNet(nn.Module):
    """`BN(3x3 x) + BN(3x1 x) + BN(1x3 x)`; in rank 3 one stripe for each axis."""

    def __init__(self, rank: int, c_in: int, c_out: int, k: int, stride: int, groups: int) -> None:
        super().__init__()
        self.square = conv_bn(rank, c_in, c_out, k, stride, groups)
        stripes = [tuple(k if axis == along else 1 for axis in range(rank)) for along in range(rank)]
        self.stripes = nn.ModuleList(conv_bn(rank, c_in, c_out, stripe, stride, groups) for stripe in stripes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.square(x)
        for stripe in self.stripes:
            y = y + stripe(x)
        return F.relu(y)


class MobileOne(nn.Module):
    """`sum_n BN_n(kxk_n x) + BN(1x1 x) + BN(x)`; depthwise (k = 3) or pointwise (k = 1, no 1x1 branch)."""

    def __init__(self, rank: int, c_in: int, c_out: int, k: int, stride: int, groups: int, n: int) -> None:
        super().__init__()
        self.norm = bn(rank, c_in) if c_in == c_out and stride == 1 else None
        self.scale = conv_bn(rank, c_in, c_out, 1, stride, groups) if k > 1 else None
        self.convs = nn.ModuleList(conv_bn(rank, c_in, c_out, k, stride, groups) for _ in range(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = 0 if self.norm is None else self.norm(x)
        scale = 0 if self.scale is None else self.scale(x)
        y = scale + identity
        for branch in self.convs:
            y += branch(x)
        return F.relu(y)


class LargeKernel(nn.Module):
    """RepLKNet: a large and a small depthwise convolution, each with BatchNorm."""

    def __init__(self, rank: int, channels: int, large: int, small: int, stride: int = 1) -> None:
        super().__init__()
        self.large = conv_bn(rank, channels, channels, large, stride, channels)
        self.small = conv_bn(rank, channels, channels, small, stride, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.large(x) + self.small(x))


class LargeKernelBlock(nn.Module):
    """RepLKNet's block: `x + BN(1x1 relu(large(relu(BN(1x1 BN(x))))))`; the innermost BatchNorm precedes a 1x1."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.before = bn(2, channels)
        self.enter = conv_bn(2, channels, inner, 1)
        self.large = LargeKernel(2, inner, 13, 5)
        self.leave = conv_bn(2, inner, channels, 1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.leave(self.large(F.relu(self.enter(self.before(x))))))


class DilatedLargeKernel(nn.Module):
    """UniRepLKNet: `gamma * BN(BN(large x) + sum_i BN_i(dilated_i x))`, all depthwise."""

    def __init__(self, rank: int, channels: int, large: int, dilated: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.large = conv_bn(rank, channels, channels, large, groups=channels)
        self.dilated = nn.ModuleList(
            conv_bn(rank, channels, channels, k, groups=channels, dilation=d) for k, d in dilated
        )
        self.norm, self.gamma = bn(rank, channels), channel_parameter(channels, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.large(x)
        for branch in self.dilated:
            y = y + branch(x)
        return F.gelu(self.gamma * self.norm(y))


class RepGhost(nn.Module):
    """`relu(BN(depthwise x) + BN(x))`, and optionally 1x1 + BN and several kxk + BN (GhostNetV3)."""

    def __init__(self, rank: int, channels: int, k: int, n: int, pointwise: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv_bn(rank, channels, channels, k, groups=channels) for _ in range(n))
        self.point = conv_bn(rank, channels, channels, 1, groups=channels) if pointwise else None
        self.norm = bn(rank, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        if self.point is not None:
            y = y + self.point(x)
        for branch in self.convs:
            y = branch(x) + y
        return F.relu(y)


class YoloRepConv(nn.Module):
    """`silu(BN(3x3 x) + BN(1x1 x))`."""

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.first = conv_bn(2, c_in, c_out, 3, stride, groups, 1e-3)
        self.second = conv_bn(2, c_in, c_out, 1, stride, groups, 1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.first(x) + self.second(x))


class QARepVGG(nn.Module):
    """`relu(BN(BN(3x3 x) + 1x1 x + x))`, and variant 2, which also adds an average pool of 1x1."""

    def __init__(self, rank: int, c_in: int, c_out: int, stride: int, groups: int) -> None:
        super().__init__()
        self.dense = conv_bn(rank, c_in, c_out, 3, stride, groups)
        self.point = conv(rank, c_in, c_out, 1, stride, groups)
        self.identity = c_in == c_out and stride == 1
        self.norm = bn(rank, c_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dense(x) + self.point(x)
        return F.relu(self.norm(y + x if self.identity else y))


def _repvgg_cases() -> list[BlockCase]:
    cases = []
    for rank, c_in, c_out, k, stride, groups, eps in (
        (2, 6, 6, 3, 1, 1, 1e-5),
        (2, 6, 6, 3, 1, 2, 1e-3),
        (2, 6, 6, 3, 1, 6, 1e-5),
        (2, 6, 9, 3, 1, 3, 1e-5),
        (2, 6, 12, 3, 2, 2, 1e-5),
        (2, 6, 6, 3, 2, 1, 1e-5),
        (2, 4, 4, 5, 1, 2, 1e-2),
        (1, 6, 6, 3, 1, 3, 1e-5),
        (1, 4, 8, 7, 2, 2, 1e-5),
        (3, 4, 4, 3, 1, 2, 1e-5),
        (3, 4, 6, 3, 2, 1, 1e-5),
    ):
        name = f"repvgg{rank}d_{c_in}_{c_out}_k{k}_s{stride}_g{groups}"
        cases.append(
            BlockCase(
                name,
                partial(RepVGG, rank, c_in, c_out, k, stride, groups, eps),
                shape(rank, c_in, 5 if rank == 3 else 9),
            )
        )
    for spelling in ("in place", "sum", "zeros first"):
        name = f"repvgg_{spelling.replace(' ', '_')}"
        expected = {"conv": 1, "bn": 0, "linear": 0, "add": 0}
        since = "5" if spelling == "zeros first" else "2"
        cases.append(
            BlockCase(name, partial(RepVGG, 2, 4, 4, groups=2, spelling=spelling), shape(2, 4), expected, since)
        )
    for excite in ("before", "after"):
        name = f"repvgg_excite_{excite}"
        expected = {"conv": 3, "bn": 0, "linear": 0}
        cases.append(BlockCase(name, partial(RepVGG, 2, 6, 6, groups=2, excite=excite), shape(2, 6), expected))
    cases.append(BlockCase("repvgg_with_biases", partial(RepVGG, 2, 4, 4, bias=True), shape(2, 4)))
    return cases


_DILATED = ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5))

CASES = [
    *_repvgg_cases(),
    *(
        BlockCase(f"acnet{r}d_k{k}_s{s}_g{g}", partial(ACNet, r, 4, o, k, s, g), shape(r, 4, 6))
        for r, o, k, s, g in ((2, 6, 3, 1, 1), (2, 6, 3, 2, 2), (2, 4, 5, 1, 4), (3, 4, 3, 1, 1), (1, 4, 3, 1, 2))
    ),
    *(
        BlockCase(f"mobileone{r}d_{i}_{o}_k{k}_s{s}_g{g}_n{n}", partial(MobileOne, r, i, o, k, s, g, n), shape(r, i, 7))
        for r, i, o, k, s, g, n in (
            (2, 6, 6, 3, 1, 6, 4),
            (2, 6, 6, 3, 2, 6, 2),
            (2, 6, 6, 1, 1, 1, 3),
            (2, 6, 9, 1, 1, 1, 1),
            (2, 6, 9, 3, 2, 3, 1),
            (1, 6, 6, 3, 1, 6, 2),
            (3, 4, 4, 3, 1, 4, 2),
        )
    ),
    BlockCase("replknet_31", partial(LargeKernel, 2, 4, 31, 5), shape(2, 4, 33)),
    BlockCase("replknet_larger_than_image", partial(LargeKernel, 2, 4, 31, 5), shape(2, 4, 9)),
    BlockCase("replknet_stride", partial(LargeKernel, 2, 4, 13, 5, 2), shape(2, 4, 15)),
    BlockCase("replknet1d", partial(LargeKernel, 1, 6, 51, 5), shape(1, 6, 40)),
    BlockCase("replknet_block", partial(LargeKernelBlock, 4, 6), shape(2, 4, 14), {"conv": 3, "bn": 0}, "3"),
    BlockCase("unireplknet", partial(DilatedLargeKernel, 2, 4, 13, _DILATED), shape(2, 4, 14), since="3"),
    BlockCase("unireplknet_four", partial(DilatedLargeKernel, 2, 4, 9, _DILATED[:4]), shape(2, 4, 10), since="3"),
    BlockCase("unireplknet1d", partial(DilatedLargeKernel, 1, 4, 17, _DILATED), shape(1, 4, 20), since="3"),
    *(
        BlockCase(f"repghost{r}d_k{k}_n{n}", partial(RepGhost, r, 6, k, n, p), shape(r, 6, 6))
        for r, k, n, p in ((2, 3, 1, False), (2, 3, 3, True), (2, 5, 2, True), (1, 3, 1, False), (3, 3, 1, True))
    ),
    *(
        BlockCase(f"yolo_repconv_{i}_{o}_s{s}_g{g}", partial(YoloRepConv, i, o, s, g), shape(2, i, 7))
        for i, o, s, g in ((4, 8, 1, 1), (4, 4, 2, 2), (6, 6, 1, 3))
    ),
    *(
        BlockCase(f"qarepvgg{r}d_{i}_{o}_s{s}_g{g}", partial(QARepVGG, r, i, o, s, g), shape(r, i, 6))
        for r, i, o, s, g in ((2, 4, 4, 1, 1), (2, 4, 8, 2, 2), (2, 6, 6, 1, 3), (1, 4, 4, 1, 2), (3, 4, 4, 1, 1))
    ),
]
