"""Modules of the deep-learning notes: attention, non-local blocks, dropouts, normalisations, residual orders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import BlockCase, bn, conv, conv_bn, shape
from tests.zoo.trap import Lambda


class CBAM(nn.Module):
    """Channel attention `sigmoid(mlp(mean) + mlp(max))`, then spatial attention `sigmoid(BN(7x7 cat(mean, max)))`."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.block = conv_bn(2, c, c, 3)
        self.mlp = nn.Sequential(conv(2, c, 3, 1), nn.ReLU(), conv(2, 3, c, 1))
        self.spatial = conv_bn(2, 2, 1, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        y = y * torch.sigmoid(self.mlp(F.adaptive_avg_pool2d(y, 1)) + self.mlp(F.adaptive_max_pool2d(y, 1)))
        maps = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], dim=1)
        return F.relu(y * torch.sigmoid(self.spatial(maps)) + x)


class NonLocal(nn.Module):
    """`x + BN(W softmax(theta(x)^T phi(x)) g(x))`; `grouped` is CGNL's trilinear form with its scaled product.

    CGNL: `z = BN(W (theta * scale * sum(phi * g)))` within each of `groups` groups of channels; W is grouped.
    """

    def __init__(self, c: int, inner: int, groups: int = 0) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (conv(2, c, inner, 1, bias=not groups) for _ in range(3))
        self.last, self.groups = conv_bn(2, inner, c, 1, groups=groups or 1), groups

    def mixed(self, theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        n, _, h, w = theta.shape
        if self.groups:
            theta, phi, g = (y.reshape(n, self.groups, -1) for y in (theta, phi, g))
            scaled = (phi * g).sum(-1, keepdim=True) / (phi.shape[-1] ** 0.5)
            return (scaled * theta).reshape(n, -1, h, w)
        weights = torch.softmax(theta.flatten(2).transpose(1, 2) @ phi.flatten(2), dim=-1)
        return (weights @ g.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, -1, h, w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.last(self.mixed(self.theta(x), self.phi(x), self.g(x)))


class CrossLayer(nn.Module):
    """A query from a deep layer, keys and values from an earlier one, brought to one width by 1x1 with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = conv_bn(2, 4, 8, 3, 2)
        self.query, self.key, self.value = conv_bn(2, 8, 6, 1), conv_bn(2, 4, 6, 1), conv_bn(2, 4, 6, 1)
        self.last = conv_bn(2, 6, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(x)
        y = F.relu(self.deep(x))
        q, k, v = self.query(y).flatten(2), self.key(x).flatten(2), self.value(x).flatten(2)
        weights = torch.softmax(q.transpose(1, 2) @ k, -1)
        return y + self.last((v @ weights.transpose(1, 2)).reshape(y.shape[0], 6, *y.shape[2:]))


def fusion(kind: str) -> nn.Module:
    """Two features fused by addition or by concatenation, then a 1x1 with BatchNorm."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = m.a(x), m.b(F.relu(x))
        y = a + b if kind == "add" else torch.cat([F.relu(a), F.relu(b)], 1)
        return F.silu(m.last(F.relu(y)))

    width = 5 if kind == "add" else 10
    layers = {"a": conv_bn(2, 4, 5, 3), "b": conv_bn(2, 4, 5, 1), "last": conv_bn(2, width, 6, 1)}
    return Lambda(forward, **layers)


class Masked(nn.Module):
    """Cutout, DropBlock, spatial dropout or stochastic depth as their authors write them, idle at inference."""

    def __init__(self, kind: str, p: float) -> None:
        super().__init__()
        self.kind, self.p = kind, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "classical" and not self.training:
            return x * (1 - self.p)
        if not self.training or self.p == 0:
            return x
        sizes = (x.shape[0], 1, 1, 1) if self.kind == "depth" else (*x.shape[:2], 1, 1)
        mask = (torch.rand(sizes if self.kind in ("depth", "spatial") else x.shape) > self.p).to(x)
        return x * mask / (1 - self.p) if self.kind == "inverted" else x * mask


class Forgotten(nn.Module):
    """DropBlock (`kind` "blocks") or Cutout whose author forgot to ask whether the model trains."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "blocks":
            mask = 1 - F.max_pool2d((torch.rand_like(x) < 0.02).to(x.dtype), 3, 1, 1)
            return x * mask * (mask.numel() / mask.sum())
        rows = torch.arange(x.shape[2]).view(-1, 1)
        return x * ((rows - torch.randint(x.shape[2], (1,))).abs() > 1)


def forgotten(kind: str) -> nn.Module:
    """A convolution, one of the two, BatchNorm, ReLU: it is refused, unless it is said what that is at inference."""
    return nn.Sequential(conv(2, 4, 6, 3), Forgotten(kind), bn(2, 6), nn.ReLU())


def dropped(kind: str) -> nn.Module:
    """A convolution, one of the dropouts, BatchNorm, ReLU."""
    return nn.Sequential(conv(2, 4, 6, 3), Masked(kind, 0.3), bn(2, 6), nn.ReLU())


def survival() -> nn.Module:
    """Stochastic depth at inference: `x + p * BN(3x3 relu(BN(3x3 x)))`, p the probability of survival."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + 0.8 * m.b(F.relu(m.a(x))))

    return Lambda(forward, a=conv_bn(2, 4, 4, 3), b=conv_bn(2, 4, 4, 3))


ORDERS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "original": lambda m, x: F.relu(x + m.n2(m.c2(F.relu(m.n1(m.c1(x)))))),
    "norm_after_addition": lambda m, x: F.relu(m.n2(x + m.c2(F.relu(m.n1(m.c1(x)))))),
    "relu_before_addition": lambda m, x: x + F.relu(m.n2(m.c2(F.relu(m.n1(m.c1(x)))))),
    "relu_only_pre_activation": lambda m, x: x + m.n2(m.c2(F.relu(m.n1(m.c1(F.relu(x)))))),
    "full_pre_activation": lambda m, x: x + m.c2(F.relu(m.n2(m.c1(F.relu(m.n1(x)))))),
}


def residual(order: str) -> nn.Module:
    """He et al. 2016, "Identity mappings in deep residual networks", figure 4."""
    layers = {"c1": conv(2, 4, 4, 3), "c2": conv(2, 4, 4, 3), "n1": bn(2, 4), "n2": bn(2, 4)}
    return Lambda(ORDERS[order], **layers)


def downsampling(rank: int, point_stride: bool) -> nn.Module:
    """ResNet's first block of a stage: the shortcut is a strided 1x1 with BatchNorm, or an average pool in front."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(m.b(F.relu(m.a(x))) + m.shortcut(x))

    pool = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[rank](2)
    short = conv_bn(rank, 4, 6, 1, 2) if point_stride else nn.Sequential(pool, conv_bn(rank, 4, 6, 1))
    a = conv_bn(rank, 4, 6, 3, 2) if point_stride else conv_bn(rank, 4, 6, 2, 2, padding=0)
    return Lambda(forward, a=a, b=conv_bn(rank, 6, 6, 3), shortcut=short)


def normalised(kind: str) -> nn.Module:
    """A normalisation that depends on its input, between two convolutions: it stays, the BatchNorm behind goes."""
    norm = {
        "layer": lambda: nn.LayerNorm([6, 8, 9]),
        "instance": lambda: nn.InstanceNorm2d(6, affine=True),
        "group": lambda: nn.GroupNorm(3, 6),
    }[kind]()
    return nn.Sequential(conv(2, 4, 6, 3), norm, nn.ReLU(), conv_bn(2, 6, 5, 3))


def temperature(how: str) -> nn.Module:
    """`softmax(fc(x) / T)`: the temperature goes into the linear layer."""
    spellings: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
        "divided": lambda m, x: torch.softmax(m.fc(x) / 2.5, dim=-1),
        "multiplied": lambda m, x: F.log_softmax(0.4 * m.fc(x), -1),
        "buffer": lambda m, x: torch.softmax(m.fc(m.drop(x)).div(m.t), 1),
    }
    return Lambda(spellings[how], fc=nn.Linear(6, 5), drop=nn.Dropout(), t=torch.tensor(2.5))


# In front of a ReLU it stays. Behind the addition it would become a scale of `x` and a folded layer: nothing is saved.
_NORM_STAYS = ("full_pre_activation", "norm_after_addition")

CASES = [
    BlockCase(
        "network_in_network",
        lambda: nn.Sequential(conv_bn(2, 4, 6, 1), nn.ReLU(), conv_bn(2, 6, 5, 1)),
        shape(2, 4),
        {"conv": 2, "bn": 0},
    ),
    # The mlp is called twice: four convolutions run.
    BlockCase("cbam", partial(CBAM, 4), shape(2, 4), {"conv": 6, "bn": 0}),
    # theta, phi and g could be one layer: exact, but a loss in a runtime that copies what it splits.
    BlockCase("non_local", partial(NonLocal, 6, 4), shape(2, 6, 5), {"conv": 4, "bn": 0, "add": 1}, "3"),
    *(BlockCase(f"cgnl_g{g}", partial(NonLocal, 8, 4, g), shape(2, 8, 5), {"conv": 4, "bn": 0}, "3") for g in (1, 2)),
    BlockCase("cross_layer", CrossLayer, shape(2, 4, 6), {"bn": 0}, "3"),
    *(BlockCase(f"fusion_{kind}", partial(fusion, kind), shape(2, 4), {"conv": 3, "bn": 0}) for kind in ("add", "cat")),
    *(
        BlockCase(f"dropout_{kind}", partial(dropped, kind), shape(2, 4), {"conv": 1, "bn": 0, "mul": 0})
        for kind in ("inverted", "classical", "spatial", "depth", "cutout")
    ),
    BlockCase("survival_probability", survival, shape(2, 4), {"conv": 2, "bn": 0, "mul": 0, "add": 1}),
    *(
        BlockCase(
            f"residual_{order}", partial(residual, order), shape(2, 4), {"conv": 2, "bn": int(order in _NORM_STAYS)}
        )
        for order in ORDERS
    ),
    *(
        BlockCase(f"downsampling{r}d", partial(downsampling, r, True), shape(r, 4, 6), {"conv": 3, "bn": 0})
        for r in (1, 2, 3)
    ),
    BlockCase(
        "downsampling_pooled", partial(downsampling, 2, False), (2, 4, 8, 10), {"conv": 3, "bn": 0}, flexible=False
    ),
    *(
        BlockCase(f"normalised_{k}", partial(normalised, k), shape(2, 4), {"conv": 2}, flexible=k != "layer")
        for k in ("layer", "instance", "group")
    ),
    *(
        BlockCase(f"temperature_{how}", partial(temperature, how), (3, 6), {"linear": 1, "mul": 0}, flexible=False)
        for how in ("divided", "multiplied", "buffer")
    ),
]
