"""The dropout family, each from its formula: nothing is left of it at inference but a factor, where it has one.

Inverted forms scale while they train and are idle at inference; classical forms keep a factor for inference. With `m` a
mask that is 1 with probability `q = 1 - p`:

    inverted dropout (Srivastava et al. 2014)     m * x / q                          x
    classical dropout                             m * x                              q * x
    spatial dropout (Tompson et al. 2015)         one m for each channel             x
    DropBlock (Ghiasi et al. 2018)                m = 0 on squares, renormalised     x
    Cutout (DeVries and Taylor 2017)              m = 0 on one square                x
    DropConnect (Wan et al. 2013)                 (m * W) x                          (q * W) x
    Gaussian dropout                              x * N(1, p / q)                    x
    stochastic depth (Huang et al. 2016)          x + m * f(x)                       x + q * f(x)
    the same, inverted (drop path)                x + m * f(x) / q                   x + f(x)
    shake-shake (Gastaldi 2017)                   a * f(x) + (1 - a) * g(x)          (f(x) + g(x)) / 2
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tests.zoo.case import BlockCase, bn, conv, conv_bn, shape
from tests.zoo.trap import Lambda

P = 0.3


def keep(x: torch.Tensor, sizes: tuple[int, ...], p: float = P) -> torch.Tensor:
    """A mask of these sizes that is 1 with probability `1 - p`."""
    return (torch.rand(sizes, device=x.device) >= p).to(x.dtype)


def inverted(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * keep(x, x.shape) / (1 - P) if m.training else x


def classical(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * keep(x, x.shape) if m.training else x * (1 - P)


def spatial(m: Any, x: torch.Tensor) -> torch.Tensor:
    if not m.training:
        return x
    return x * keep(x, (*x.shape[:2], *(1 for _ in x.shape[2:]))) / (1 - P)


def drop_block(m: Any, x: torch.Tensor) -> torch.Tensor:
    if not m.training or P == 0.0:
        return x
    gamma = P / 9 * (x.shape[2] * x.shape[3]) / ((x.shape[2] - 2) * (x.shape[3] - 2))
    mask = 1 - F.max_pool2d((torch.rand_like(x) < gamma).to(x.dtype), 3, 1, 1)
    return x * mask * (mask.numel() / mask.sum())


def cutout(m: Any, x: torch.Tensor) -> torch.Tensor:
    if m.training:
        row, column = int(torch.randint(x.shape[2], ())), int(torch.randint(x.shape[3], ()))
        mask = torch.ones_like(x)
        mask[..., max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 0
        x = x * mask
    return x


def gaussian(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.randn_like(x) * (P / (1 - P)) ** 0.5) if m.training else x


def by_branch(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A multiplication that is there in both modes; the factor is decided by the mode."""
    factor = keep(x, (x.shape[0], 1, 1, 1)) if m.training else 1.0
    return x * factor


def noisy(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x + 0.1 * torch.randn_like(x) * float(m.training) if m.training else x


@fx.wrap
def kept_whole(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """As torchvision has its drop path: a function that tracing does not look into by itself."""
    if p < 0.0 or p > 1.0:
        raise ValueError("no probability")
    if x.ndim < 2 or not training or p == 0.0:
        return x
    return x * x.new_empty(x.shape[0], *(1,) * (x.ndim - 1)).bernoulli_(1 - p) / (1 - p)


BETWEEN: dict[str, Callable[[], nn.Module]] = {
    **{
        f.__name__: partial(Lambda, f)
        for f in (inverted, classical, spatial, drop_block, cutout, gaussian, by_branch, noisy)
    },
    "kept_whole": lambda: Lambda(lambda m, x: kept_whole(x, P, m.training)),
    "module": lambda: nn.Dropout(P),
    "module_in_place": lambda: nn.Dropout(P, inplace=True),
    "module_2d": lambda: nn.Dropout2d(P),
    "module_alpha": lambda: nn.AlphaDropout(P),
    "module_feature_alpha": lambda: nn.FeatureAlphaDropout(P),
    "module_p_zero": lambda: nn.Dropout(0.0),
    "identities": lambda: nn.Sequential(nn.Identity(54, unused=0.1), nn.Sequential(), nn.Identity()),
    "F.dropout": lambda: Lambda(lambda m, x: F.dropout(x, P, m.training)),
    "F.dropout_keywords": lambda: Lambda(lambda m, x: F.dropout(input=x, training=m.training, p=P)),
    "F.dropout_in_place": lambda: Lambda(lambda m, x: F.dropout(x, P, m.training, True)),
    "F.dropout_p_zero": lambda: Lambda(lambda m, x: F.dropout(x, 0.0, True)),
    "F.dropout2d": lambda: Lambda(lambda m, x: F.dropout2d(x, P, m.training)),
    "F.alpha_dropout": lambda: Lambda(lambda m, x: F.alpha_dropout(x, P, m.training)),
    "F.feature_alpha_dropout": lambda: Lambda(lambda m, x: F.feature_alpha_dropout(x, P, m.training)),
    **{
        f"torch.{name}": partial(Lambda, lambda m, x, name=name: getattr(torch, name)(x, P, m.training))
        for base in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
        for name in (base, f"{base}_")
    },
    "torch.native_dropout": lambda: Lambda(lambda m, x: torch.native_dropout(x, P, m.training)[0]),
    "aten.dropout": lambda: Lambda(lambda m, x: torch.ops.aten.dropout(x, P, m.training)),
}


def between(kind: str) -> nn.Module:
    """A convolution, one of the family, BatchNorm, ReLU."""
    return nn.Sequential(conv(2, 4, 6, 3), BETWEEN[kind](), bn(2, 6), nn.ReLU())


def of_rank(rank: int) -> nn.Module:
    """The dropout of whole channels in each rank."""
    drop = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}[rank](P)
    return nn.Sequential(conv(rank, 4, 6, 3), drop, bn(rank, 6), nn.ReLU())


def channels_last() -> nn.Module:
    """Spatial dropout of a sequence, by way of a permutation and back."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x).permute(0, 2, 1)
        return F.relu(m.n(m.drop(y).permute(0, 2, 1)))

    return Lambda(forward, a=conv(1, 4, 6, 3), drop=nn.Dropout(P), n=bn(1, 6))


class DropConnect(nn.Module):
    """A layer whose weights are dropped: `(m * W) x`, and `(q * W) x` at inference (inverted: `W x`)."""

    def __init__(self, layer: nn.Module, q: float) -> None:
        super().__init__()
        self.layer, self.q = layer, q

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.layer.weight
        weight = weight * keep(weight, weight.shape) if self.training else weight * self.q
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return F.conv2d(x, weight, self.layer.bias, padding=1)  # type: ignore[arg-type]


def stochastic_depth(kind: str) -> nn.Module:
    """A residual block whose branch survives with probability 0.8."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        branch = m.b(F.relu(m.a(x)))
        if kind == "classical":
            factor = keep(x, (x.shape[0], 1, 1, 1), 0.2) if m.training else 0.8
            return F.relu(x + factor * branch)
        if kind == "drop_path" and not (0.2 == 0.0 or not m.training):
            branch = branch / 0.8 * (0.8 + torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype)).floor_()
        elif kind == "skipped" and m.training and torch.rand(()) < 0.2:
            return F.relu(x)
        return F.relu(x + branch)

    return Lambda(forward, a=conv_bn(2, 4, 4, 3), b=conv_bn(2, 4, 4, 3))


def shake_shake() -> nn.Module:
    """Two branches, mixed at random while training and averaged at inference."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        share = torch.rand((x.shape[0], 1, 1, 1)) if m.training else 0.5
        return F.relu(share * m.a(x) + (1 - share) * m.b(x))

    return Lambda(forward, a=conv_bn(2, 4, 6, 3), b=conv_bn(2, 4, 6, 1))


ONE = {"conv": 1, "bn": 0, "mul": 0, "add": 0, "dropout": 0, "identity": 0}
TWO = {**ONE, "conv": 2, "add": 1}

CASES = [
    *(BlockCase(f"drop_{kind}", partial(between, kind), shape(2, 4), ONE) for kind in BETWEEN),
    *(BlockCase(f"drop_channels{r}d", partial(of_rank, r), shape(r, 4), ONE) for r in (1, 2, 3)),
    BlockCase("drop_channels_last", channels_last, shape(1, 4), ONE),
    *(
        BlockCase(
            f"drop_connect_{name}",
            lambda q=q: nn.Sequential(DropConnect(nn.Conv2d(4, 6, 3), q), bn(2, 6), nn.ReLU()),
            shape(2, 4),
            ONE,
        )
        for name, q in (("classical", 1 - P), ("inverted", 1.0))
    ),
    BlockCase(
        "drop_connect_linear",
        lambda: nn.Sequential(DropConnect(nn.Linear(6, 5), 1 - P), nn.BatchNorm1d(5), nn.ReLU()),
        (3, 6),
        {"linear": 1, "bn": 0, "mul": 0, "dropout": 0},
        flexible=False,
    ),
    *(
        BlockCase(f"stochastic_depth_{kind}", partial(stochastic_depth, kind), shape(2, 4), TWO)
        for kind in ("classical", "drop_path", "skipped")
    ),
    BlockCase("shake_shake", shake_shake, shape(2, 4), ONE),
]
