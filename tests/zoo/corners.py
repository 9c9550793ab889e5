"""Corners of published blocks: other ranks, groups and strides, even kernels, one-sided and tuple padding, modes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.branches import (
    ACNet,
    DilatedLargeKernel,
    LargeKernel,
    MobileOne,
    QARepVGG,
    RepGhost,
    RepVGG,
    YoloRepConv,
)
from tests.zoo.case import AVG_POOL, CONV, CONV_TRANSPOSE, BlockCase, bn, conv, conv_bn, shape
from tests.zoo.trap import Lambda

PADS = {1: (2, 0), 2: (1, 0, 0, 2), 3: (1, 0, 0, 1, 2, 0)}


def padded_conv_bn(rank: int, mode: str, k: int, stride: int = 1, groups: int = 1) -> nn.Module:
    """One-sided explicit padding, a convolution without its own, BatchNorm, ReLU."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, PADS[rank]) if mode == "zeros" else F.pad(x, PADS[rank], mode=mode)
        return F.relu(m.block(x))

    return Lambda(forward, block=conv_bn(rank, 4, 6, k, stride, groups, padding=0))


def mode_conv_bn(rank: int, mode: str, padding: Any, stride: int = 1, k: int = 3) -> nn.Module:
    """A convolution with a padding mode or 'same' padding, BatchNorm, ReLU."""
    layer = CONV[rank](4, 6, k, stride, padding, padding_mode=mode)
    return nn.Sequential(layer, bn(rank, 6), nn.ReLU())


def transposed_bn(rank: int, k: int, stride: int, dilation: int, output_padding: int, groups: int) -> nn.Module:
    """A transposed convolution with dilation and output padding, BatchNorm, ReLU."""
    up = CONV_TRANSPOSE[rank](4, 6, k, stride, 1, output_padding, groups, True, dilation)
    return nn.Sequential(up, bn(rank, 6), nn.ReLU())


def branches(rank: int, c_out: int, stride: int, *layers: nn.Module, identity: bool = False) -> nn.Module:
    """`relu(sum_i BN_i(layer_i x) + BN(x))` of the given layers."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norms[0](m.layers[0](x))
        for layer, norm in zip(m.layers[1:], m.norms[1:], strict=True):
            y = y + norm(layer(x))
        return F.relu(y + m.skip(x)) if identity else F.relu(y)

    norms = nn.ModuleList(bn(rank, c_out) for _ in layers)
    skip = bn(rank, c_out) if identity else nn.Identity()
    return Lambda(forward, layers=nn.ModuleList(layers), norms=norms, skip=skip)


def even_branches(rank: int, stride: int) -> nn.Module:
    """4x4 padded by 1 beside 2x2 without padding beside another 4x4, all of one output size; no 1x1 fits."""
    layers = (conv(rank, 4, 6, 4, stride, 2, padding=1), conv(rank, 4, 6, 2, stride, padding=0))
    return branches(rank, 6, stride, *layers, conv(rank, 4, 6, 4, stride, padding=1))


def mode_branches(mode: str, stride: int) -> nn.Module:
    """A RepVGG block whose 3x3 and 5x5 pad by `mode`; the 1x1 and the identity do not pad."""
    three = nn.Conv2d(4, 4, 3, stride, 1, padding_mode=mode, groups=2, bias=False)
    five = nn.Conv2d(4, 4, 5, stride, 2, padding_mode=mode)
    return branches(2, 4, stride, three, five, conv(2, 4, 4, 1, stride), identity=stride == 1)


def dilated_branches(rank: int, groups: int, stride: int) -> nn.Module:
    """Dilation in one branch only, and kernels of no common centre: 3x3 dilated by 2, 5x5, 1x1."""
    wide = conv(rank, 4, 4, 3, stride, groups, dilation=2)
    rest = (conv(rank, 4, 4, 5, stride, groups), conv(rank, 4, 4, 1, stride, groups))
    return branches(rank, 4, stride, wide, *rest, identity=stride == 1)


def cropped_acnet() -> nn.Module:
    """ACNet without padding: the stripes run on the cropped input."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(m.square(x) + m.row(x[:, :, 1:-1, :]) + m.column(x[:, :, :, 1:-1]))

    layers = {"square": conv_bn(2, 4, 6, 3, padding=0), "row": conv_bn(2, 4, 6, (1, 3), padding=0)}
    return Lambda(forward, **layers, column=conv_bn(2, 4, 6, (3, 1), padding=0))


def striped_large_kernel(k: int) -> nn.Module:
    """SLaK: kx3 + 3xk + 5x5 depthwise. One kxk kernel would compute more: only the BatchNorms have to go."""
    stripes = (conv(2, 4, 4, (k, 3), groups=4), conv(2, 4, 4, (3, k), groups=4))
    return branches(2, 4, 1, *stripes, conv(2, 4, 4, 5, groups=4))


def pooled_qarepvgg(rank: int, c_out: int, stride: int, groups: int) -> nn.Module:
    """QARepVGG's second variant: `relu(BN(BN(3x3 x) + 1x1 x + pool(1x1 x)))`, the pool over 3x3 with its padding."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(m.norm(m.dense(x) + m.point(x) + m.pool(m.before(x))))

    layers = {"dense": conv_bn(rank, 4, c_out, 3, stride, groups), "point": conv(rank, 4, c_out, 1, stride, groups)}
    pool, before = AVG_POOL[rank](3, stride, 1), conv(rank, 4, c_out, 1, groups=groups)
    return Lambda(forward, **layers, pool=pool, before=before, norm=bn(rank, c_out))


_ONE = {"conv": 1, "bn": 0, "linear": 0, "add": 0, "mul": 0}

CASES = [
    *(
        BlockCase(
            f"pad_{mode}_conv{r}d_bn_k{k}_s{s}_g{g}", partial(padded_conv_bn, r, mode, k, s, g), shape(r, 4, 6), _ONE
        )
        for r, mode, k, s, g in (
            (1, "zeros", 3, 1, 1),
            (2, "zeros", 2, 2, 2),
            (3, "zeros", 3, 1, 2),
            (2, "reflect", 3, 1, 1),
            (1, "replicate", 2, 2, 2),
            (2, "circular", 3, 2, 1),
        )
    ),
    *(
        BlockCase(
            f"conv{r}d_bn_{mode}_{p}_k{k}_s{s}".replace(", ", "_"),
            partial(mode_conv_bn, r, mode, p, s, k),
            shape(r, 4, 6),
            _ONE,
        )
        for r, mode, p, s, k in (
            (1, "reflect", 2, 2, 3),
            (3, "replicate", 1, 1, 3),
            (3, "circular", 1, 2, 3),
            (2, "zeros", (2, 0), 2, 3),
            (3, "zeros", (0, 1, 2), 1, 2),
            (1, "zeros", "same", 1, 5),
            (3, "zeros", "same", 1, 3),
        )
    ),
    *(
        BlockCase(
            f"conv_transpose{r}d_bn_k{k}_s{s}_d{d}_o{o}_g{g}",
            partial(transposed_bn, r, k, s, d, o, g),
            shape(r, 4, 4),
            _ONE,
        )
        for r, k, s, d, o, g in ((1, 4, 3, 1, 2, 2), (2, 3, 2, 2, 1, 1), (2, 2, 3, 1, 0, 2), (3, 3, 2, 1, 1, 2))
    ),
    *(
        BlockCase(f"repvgg{r}d_{i}_{o}_k{k}_s{s}_g{g}", partial(RepVGG, r, i, o, k, s, g), shape(r, i, z), _ONE)
        for r, i, o, k, s, g, z in (
            (2, 4, 8, 3, 3, 4, 10),
            (1, 6, 6, 3, 2, 3, 8),
            (3, 6, 6, 3, 1, 6, 5),
            (2, 8, 8, 7, 1, 8, 8),
        )
    ),
    *(
        BlockCase(
            f"repvgg_excite_{e}_s2", partial(RepVGG, 2, 4, 6, stride=2, excite=e), shape(2, 4), {"conv": 3, "bn": 0}
        )
        for e in ("before", "after")
    ),
    *(
        BlockCase(f"repvgg_{m}_s{s}", partial(mode_branches, m, s), shape(2, 4), _ONE)
        for m, s in (("reflect", 1), ("replicate", 2), ("circular", 1))
    ),
    *(
        BlockCase(f"even_branches{r}d_s{s}", partial(even_branches, r, s), shape(r, 4, 7), _ONE if s == 1 else {})
        for r, s in ((1, 1), (2, 1), (2, 2), (3, 1))
    ),
    *(
        BlockCase(f"dilated_branches{r}d_g{g}_s{s}", partial(dilated_branches, r, g, s), shape(r, 4, 7), _ONE)
        for r, g, s in ((1, 2, 1), (2, 1, 2), (2, 4, 1), (3, 2, 1))
    ),
    *(
        BlockCase(f"acnet{r}d_k{k}_s{s}_g{g}", partial(ACNet, r, 4, o, k, s, g), shape(r, 4, 7), _ONE)
        for r, o, k, s, g in ((1, 8, 5, 2, 4), (3, 6, 3, 2, 2), (2, 4, 7, 1, 1))
    ),
    BlockCase("acnet_cropped", cropped_acnet, shape(2, 4), _ONE, "3"),
    *(
        BlockCase(
            f"mobileone{r}d_{i}_{o}_k{k}_s{s}_g{g}_n{n}", partial(MobileOne, r, i, o, k, s, g, n), shape(r, i, 7), _ONE
        )
        for r, i, o, k, s, g, n in (
            (1, 4, 8, 1, 1, 2, 3),
            (3, 4, 4, 5, 2, 4, 1),
            (2, 4, 4, 5, 1, 4, 1),
            (2, 8, 8, 1, 1, 4, 2),
        )
    ),
    *(
        BlockCase(f"replknet{r}d_{a}_{b}_s{s}", partial(LargeKernel, r, 4, a, b, s), shape(r, 4, 10), _ONE)
        for r, a, b, s in ((3, 7, 3, 1), (1, 21, 5, 2), (2, 9, 7, 2))
    ),
    BlockCase("slak_stripes", partial(striped_large_kernel, 13), shape(2, 4, 14), {"bn": 0}, "3"),
    *(
        BlockCase(f"unireplknet{r}d_k{k}", partial(DilatedLargeKernel, r, 4, k, d), shape(r, 4, 9), _ONE)
        for r, k, d in ((3, 5, ((3, 1), (3, 2))), (2, 7, ((5, 1), (3, 2), (3, 3), (3, 1))))
    ),
    *(
        BlockCase(f"repghost{r}d_k{k}_n{n}", partial(RepGhost, r, 4, k, n, p), shape(r, 4, 6), _ONE)
        for r, k, n, p in ((1, 5, 3, True), (3, 3, 2, False))
    ),
    *(
        BlockCase(f"yolo_repconv_{i}_{o}_s{s}_g{g}", partial(YoloRepConv, i, o, s, g), shape(2, i, 8), _ONE)
        for i, o, s, g in ((4, 4, 1, 4), (6, 9, 2, 3))
    ),
    *(
        BlockCase(f"qarepvgg{r}d_{i}_{o}_s{s}_g{g}", partial(QARepVGG, r, i, o, s, g), shape(r, i, 7), _ONE)
        for r, i, o, s, g in ((2, 4, 4, 2, 4), (1, 6, 6, 1, 6))
    ),
    *(
        BlockCase(f"qarepvgg_pooled{r}d_{o}_s{s}_g{g}", partial(pooled_qarepvgg, r, o, s, g), shape(r, 4, 7), _ONE)
        for r, o, s, g in ((2, 4, 1, 1), (2, 6, 2, 2), (1, 4, 1, 4), (3, 4, 1, 2))
    ),
]
