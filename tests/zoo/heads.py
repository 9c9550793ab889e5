"""Classifier heads: BatchNorm, convolutions and linear layers around pooling and flattening; scales through ReLU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import BlockCase, bn, channel_parameter, conv, conv_bn, shape
from tests.zoo.trap import Lambda

ADAPTIVE = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
FUNCTION = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def space(x: torch.Tensor) -> tuple[int, ...]:
    """The spatial axes of `(N, C, *space)`."""
    return tuple(range(2, x.ndim))


POOLS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "module": lambda m, y: m.pool(y).flatten(1),
    "function": lambda m, y: torch.flatten(FUNCTION[y.ndim - 2](y, 1), 1),
    "mean": lambda m, y: y.mean(space(y)),
    "mean_keepdim": lambda m, y: torch.mean(y, space(y), keepdim=True).flatten(1),
    "mean_of_flat": lambda m, y: y.flatten(2).mean(-1),
    "mean_view": lambda m, y: m.pool(y).view(y.shape[0], -1),
    "mean_squeeze": lambda m, y: y.mean(space(y)[0], keepdim=True).mean(space(y)[1:] or (2,)).reshape(y.shape[0], -1),
    "means": lambda m, y: y.mean(-1).mean(-1) if y.ndim == 4 else y.mean(-1),
    "tokens": lambda m, y: y.flatten(2).transpose(1, 2).mean(1),
}


def norm_head(rank: int, pool: str) -> nn.Module:
    """`fc(flatten(pool(BN(relu(3x3 x)))))`."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.fc(POOLS[pool](m, m.norm(F.relu(m.conv(x)))))

    layers = {"conv": conv_bn(rank, 4, 6, 3), "norm": bn(rank, 6), "fc": nn.Linear(6, 5)}
    return Lambda(forward, **layers, pool=ADAPTIVE[rank](1))


def conv_head(rank: int, k: int, classes: int) -> nn.Module:
    """`fc(pool(BN(kxk relu(x))))`: the mean commutes with the 1x1, and the linear layer with the mean."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.fc(m.pool(m.conv(F.relu(x))).flatten(1))

    return Lambda(forward, conv=conv_bn(rank, 4, 8, k), pool=ADAPTIVE[rank](1), fc=nn.Linear(8, classes))


def flat_head(rank: int, layers: str) -> nn.Module:
    """`fc(flatten(BN(relu(3x3 x))))` on one image size; `layers` also scales in front of, or puts BN behind, the fc."""
    sizes = {1: (9,), 2: (5, 6), 3: (3, 4, 5)}[rank]
    features = 6 * int(torch.tensor(sizes).prod())

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(F.relu(m.conv(x))) * m.g
        y = y.view(y.shape[0], -1) if layers == "view" else torch.flatten(y, 1)
        return F.relu(m.after(m.fc(m.drop(y))))

    after = nn.BatchNorm1d(4) if layers == "norm behind" else nn.Identity()
    parts = {"conv": conv_bn(rank, 4, 6, 3), "norm": bn(rank, 6), "fc": nn.Linear(features, 4), "after": after}
    return Lambda(forward, **parts, drop=nn.Dropout(0.2), g=channel_parameter(6, rank))


def averaged_heads(rank: int, norms: str) -> nn.Module:
    """RepViT, EfficientFormer: two linear layers behind a pooled BatchNorm, averaged; BatchNorms in each too."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(F.gelu(m.conv(x))).mean(space(x))
        return (m.first(y) + m.second(y)) / 2

    def head() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5)) if norms == "each" else nn.Linear(6, 5)

    return Lambda(forward, conv=conv(rank, 4, 6, 3, bias=True), norm=bn(rank, 6), first=head(), second=head())


def pooled_to(rank: int, size: Any) -> nn.Module:
    """BatchNorm, adaptive average pool to a fixed grid, flatten, linear."""
    cells = size**rank if isinstance(size, int) else int(torch.tensor(size).prod())

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.fc(m.pool(m.norm(F.relu(m.conv(x)))).flatten(1))

    return Lambda(
        forward, conv=conv(rank, 4, 6, 3), norm=bn(rank, 6), pool=ADAPTIVE[rank](size), fc=nn.Linear(6 * cells, 5)
    )


def residual_head(rank: int) -> nn.Module:
    """A residual sum with a layer, averaged, then BatchNorm and a linear layer: no scale is left on either summand."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(m.stem(x))
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[rank - 1]
        return m.fc(m.norm(pool(x + m.out(F.relu(m.inner(x))), 1).flatten(1)))

    layers = {"stem": conv_bn(rank, 4, 8, 1), "inner": conv_bn(rank, 8, 16, 1), "out": conv_bn(rank, 16, 8, 1)}
    return Lambda(forward, **layers, norm=nn.BatchNorm1d(8), fc=nn.Linear(8, 12))


def pooled_first(order: str) -> nn.Module:
    """Layers behind the mean: BN1d and linear, linear and BN1d, or an attention branch of 1x1 convolutions with BN."""
    orders: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
        "norm first": lambda m, x: m.fc(m.norm(F.relu(x).mean((2, 3)))),
        "norm last": lambda m, x: F.relu(m.after(m.fc(F.relu(x).mean((2, 3))))),
        "norm2d": lambda m, x: F.relu(m.point(m.norm2d(F.relu(x).mean((2, 3), keepdim=True)))),
        "twice": lambda m, x: m.fc(m.norm(m.norm2d(F.relu(x)).mean((2, 3)))),
    }
    fc, point = nn.Linear(4, 5), conv_bn(2, 4, 5, 1)
    layers = {"norm": nn.BatchNorm1d(4), "norm2d": bn(2, 4), "fc": fc, "after": nn.BatchNorm1d(5), "point": point}
    return Lambda(orders[order], **layers)


def average_pool_between(rank: int) -> nn.Module:
    """`BN(avg_pool(BN(relu(x))))` then 1x1: two BatchNorms go into the 1x1 through the pool."""
    pool = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[rank](2)
    layers = {"a": bn(rank, 4), "pool": pool, "b": bn(rank, 4), "c": conv(rank, 4, 6, 1)}
    return Lambda(lambda m, x: F.relu(m.c(m.b(m.pool(m.a(F.relu(x)))))), **layers)


def positive(rank: int, through: str) -> nn.Module:
    """A positive scale behind ReLU, leaky ReLU or max-pool, before a nonlinearity: it goes into the convolution."""
    steps: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
        "relu": lambda m, y: F.relu(y) * m.g,
        "leaky_relu": lambda m, y: m.g * F.leaky_relu(y, 0.1),
        "relu_scalar": lambda m, y: 1.7 * F.relu(y),
        "max_pool": lambda m, y: m.norm(m.pool(y)),
        "relu_max_pool": lambda m, y: m.pool(F.relu(y)) / m.g,
    }
    # Without learned scales those of the BatchNorm are positive.
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank](6, affine=False)
    pool = MAX_POOL[rank](3, 2, 1)
    g = torch.rand(6, *(1,) * rank) + 0.4
    return Lambda(
        lambda m, x: torch.tanh(steps[through](m, m.conv(x))), conv=conv_bn(rank, 4, 6, 3), norm=norm, pool=pool, g=g
    )


def bias_map() -> nn.Module:
    """`relu(3x3 BN(x) + 3x3 BN(x))`, padded with zeros, on an image size that the last layer fixes."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.fc(F.relu(m.a(m.na(x)) + m.b(m.nb(x))).flatten(1))

    convs = {"a": conv(2, 4, 6, 3), "b": conv(2, 4, 6, 3, bias=True)}
    return Lambda(forward, **convs, na=bn(2, 4), nb=bn(2, 4), fc=nn.Linear(6 * 72, 5))


_HEAD = {"conv": 1, "bn": 0, "linear": 1}
_RESIDUAL_HEAD = {"conv+linear": 4, "bn": 0, "mul": 0}
_ONE = {"conv+linear": 1, "bn": 0}

CASES = [
    *(BlockCase(f"norm_head_{pool}", partial(norm_head, 2, pool), shape(2, 4), _HEAD, "3") for pool in POOLS),
    *(
        BlockCase(f"norm_head_{p}_{r}d", partial(norm_head, r, p), shape(r, 4, 6), _HEAD, "3")
        for r, p in ((1, "module"), (1, "mean"), (3, "function"), (3, "mean"))
    ),
    # The mean first, then both layers as one: less of everything, whatever the number of classes.
    *(BlockCase(f"conv1x1_head{r}d", partial(conv_head, r, 1, 12), shape(r, 4, 6), _ONE, "3") for r in (1, 2, 3)),
    # With more classes than channels the linear layer is cheapest behind the mean; with fewer, inside the convolution.
    BlockCase("conv3x3_head_wide", partial(conv_head, 2, 3, 12), shape(2, 4), _HEAD),
    BlockCase("conv3x3_head_narrow", partial(conv_head, 2, 3, 3), shape(2, 4), _ONE, "3"),
    *(
        BlockCase(
            f"flat_head{r}d_{kind.replace(' ', '_')}",
            partial(flat_head, r, kind),
            (2, 4, *{1: (9,), 2: (5, 6), 3: (3, 4, 5)}[r]),
            {**_HEAD, "mul": 0},
            "3",
            False,
        )
        for r, kind in ((2, "plain"), (2, "view"), (2, "norm behind"), (1, "plain"), (3, "plain"))
    ),
    *(
        BlockCase(f"averaged_heads{r}d_{norms}", partial(averaged_heads, r, norms), shape(r, 4), _HEAD, "3")
        for r, norms in ((2, "each"), (2, "none"), (1, "each"))
    ),
    *(
        BlockCase(
            f"pooled_to{r}d_{'x'.join(map(str, s)) if isinstance(s, tuple) else s}",
            partial(pooled_to, r, s),
            shape(r, 4),
            _HEAD,
            "3",
        )
        for r, s in ((2, (2, 2)), (2, 2), (2, (1, 3)), (1, 2))
    ),
    *(
        BlockCase(f"pooled_{o.replace(' ', '_')}", partial(pooled_first, o), shape(2, 4), _ONE, since)
        for o, since in (("norm first", "2"), ("norm last", "2"), ("norm2d", "2"), ("twice", "3"))
    ),
    *(
        BlockCase(f"residual_head{r}d", partial(residual_head, r), shape(r, 4, 12), _RESIDUAL_HEAD, "3")
        for r in (1, 2, 3)
    ),
    # The pool could become part of the kernel, at four times the arithmetic: it stays a pool.
    *(
        BlockCase(f"average_pool_between{r}d", partial(average_pool_between, r), shape(r, 4), {"conv": 1, "bn": 0}, "3")
        for r in (1, 2, 3)
    ),
    *(
        BlockCase(f"positive_{t}_{r}d", partial(positive, r, t), shape(r, 4, 6), {"conv": 1, "bn": 0, "mul": 0}, "3")
        for r, t in (
            (2, "relu"),
            (2, "leaky_relu"),
            (2, "relu_scalar"),
            (2, "max_pool"),
            (2, "relu_max_pool"),
            (1, "relu"),
            (3, "max_pool"),
        )
    ),
    # One layer and an addition of a constant map would do; the map would fix the image size, and is not made.
    BlockCase("bias_map", bias_map, shape(2, 4), {"conv": 2, "linear": 1, "bn": 0}, "3", False),
]
