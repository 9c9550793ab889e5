"""Corners of blocks with chains and scales: other ranks, widths, groups and strides; pairs that must stay pairs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import BlockCase, channel_parameter, conv, conv_bn, shape
from tests.zoo.chains import DBB, ConvFFN, ExpandNet, PositionalConv, RepMixer, TwoConvs
from tests.zoo.linears import LowRank
from tests.zoo.trap import Lambda


def edge_block(c_in: int, c_out: int, stride: int) -> nn.Module:
    """ECBSR between unequal widths: `3x3 x + 3x3 pad(1x1 x) + g * laplace(1x1 x)`, padding in front of the 1x1."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        wide = F.pad(x, (1, 1, 1, 1))
        edges = F.conv2d(m.edge(wide), m.mask, stride=stride, groups=c_out)
        return m.act(m.dense(x) + m.inner(m.first(wide)) + m.g * edges)

    laplace = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).expand(c_out, 1, 3, 3).clone()
    layers = {"dense": conv(2, c_in, c_out, 3, stride, bias=True), "first": conv(2, c_in, 2 * c_in, 1, bias=True)}
    more = {"inner": conv(2, 2 * c_in, c_out, 3, stride, padding=0), "edge": conv(2, c_in, c_out, 1, bias=True)}
    return Lambda(forward, **layers, **more, mask=laplace, g=channel_parameter(c_out, 2), act=nn.PReLU(c_out))


def gated_mixer(rank: int) -> nn.Module:
    """EfficientViM: `(1 - a) * x + a * BN(depthwise x)` with a per channel: one depthwise layer."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.rest * x + m.a * m.block(x)

    a = channel_parameter(4, rank).detach()
    return Lambda(forward, block=conv_bn(rank, 4, 4, 3, groups=4), a=a, rest=1 - a)


def downsampling_repvit(rank: int) -> nn.Module:
    """RepViT at stride 2: `BN(depthwise x)` then 1x1 with BatchNorm: two layers (cost), no BatchNorm."""
    return nn.Sequential(conv_bn(rank, 6, 6, 3, 2, 6), conv_bn(rank, 6, 12, 1), nn.GELU())


def learnable_affine(rank: int, act: nn.Module) -> nn.Module:
    """PP-LCNetV3, HGNetV2: `s2 * act(s1 * BN(kxk x) + b1) + b2`, read by an unpadded and by a 1x1 convolution."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.s2 * m.act(m.s1 * m.first(x) + m.b1) + m.b2
        return m.pool(F.relu(m.left(y))) + m.pool(F.relu(m.right(y)))

    numbers = {name: nn.Parameter(torch.randn(1)) for name in ("s1", "b1", "s2", "b2")}
    readers = {"left": conv_bn(rank, 6, 4, 3, padding=0), "right": conv(rank, 6, 4, 1, bias=True)}
    pool = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}[rank](3)
    return Lambda(forward, first=conv_bn(rank, 4, 6, 3), act=act, pool=pool, **numbers, **readers)


_ONE = {"conv": 1, "bn": 0, "linear": 0, "add": 0, "mul": 0}
_TWO = {"conv": 2, "bn": 0}

CASES = [
    *(
        BlockCase(f"dbb{r}d_{i}_{o}_k{k}_s{s}_g{g}", partial(DBB, r, i, o, k, s, g, "value"), shape(r, i, 7), _ONE)
        for r, i, o, k, s, g in ((1, 6, 6, 5, 2, 3), (3, 4, 6, 3, 2, 2), (2, 4, 4, 3, 1, 4))
    ),
    BlockCase("positional_conv3d", partial(PositionalConv, 3, 4), shape(3, 4, 5), _ONE),
    *(
        BlockCase(f"repmixer{r}d_{c}_k{k}", partial(RepMixer, r, c, k), shape(r, c, 7), _ONE)
        for r, c, k in ((1, 4, 7), (3, 3, 5))
    ),
    *(BlockCase(f"gated_mixer{r}d", partial(gated_mixer, r), shape(r, 4), _ONE) for r in (1, 2, 3)),
    BlockCase("conv_ffn_wide", partial(ConvFFN, 8), shape(2, 8), {"conv": 3, "bn": 0, "mul": 0}),
    *(BlockCase(f"repvit{r}d_s2", partial(downsampling_repvit, r), shape(r, 6), _TWO) for r in (1, 2)),
    *(
        BlockCase(f"edge_block_{i}_{o}_s{s}", partial(edge_block, i, o, s), shape(2, i), _ONE)
        for i, o, s in ((4, 6, 1), (6, 4, 2))
    ),
    *(
        BlockCase(
            f"learnable_affine{r}d_{type(act).__name__}",
            partial(learnable_affine, r, act),
            shape(r, 4, 7),
            {"conv": 3, "bn": 0, "mul": 0},
            "3",
        )
        for r, act in ((1, nn.ReLU()), (2, nn.Hardswish()), (3, nn.ReLU()))
    ),
    *(
        BlockCase(f"expandnet{r}d_k{k}_s{s}", partial(ExpandNet, r, 4, 4, k, s), shape(r, 4, 8), _ONE)
        for r, k, s in ((3, 3, 1), (2, 5, 3), (1, 2, 2))
    ),
    BlockCase(
        "low_rank_conv_stays", partial(TwoConvs, conv(2, 16, 2, 1), conv(2, 2, 16, 3, bias=True)), shape(2, 16), _TWO
    ),
    BlockCase("low_rank_tokens_stay", partial(LowRank, 32, 4), (2, 5, 32), {"linear": 2}, flexible=False),
    *(
        BlockCase(
            f"separable{r}d", partial(TwoConvs, conv_bn(r, 8, 8, 5, groups=8), conv_bn(r, 8, 16, 1)), shape(r, 8), _TWO
        )
        for r in (1, 3)
    ),
]
