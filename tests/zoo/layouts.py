"""Affine layers across permute, transpose, reshape, flatten: the channel axis moves, the layers merge all the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import BlockCase, bn, conv, conv_bn, shape
from tests.zoo.trap import Lambda

Forward = Callable[[Any, torch.Tensor], torch.Tensor]


def to_last(x: torch.Tensor) -> torch.Tensor:
    """`(N, C, *space)` to `(N, *space, C)`."""
    return x.permute(0, *range(2, x.ndim), 1)


def to_first(x: torch.Tensor) -> torch.Tensor:
    """`(N, *space, C)` to `(N, C, *space)`."""
    return x.permute(0, x.ndim - 1, *range(1, x.ndim - 1))


def conv_then_linear(rank: int, k: int, stride: int, move: str) -> nn.Module:
    """A convolution with BatchNorm, its channels moved to the last axis, a linear layer."""
    moves: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "permute": to_last,
        "movedim": lambda y: y.movedim(1, -1),
        "tokens": lambda y: y.flatten(2).transpose(1, 2),
        "reshape": lambda y: y.reshape(y.shape[0], y.shape[1], -1).permute(0, 2, 1),
        "swap": lambda y: y.view(*y.shape[:2], -1).swapaxes(-2, -1).contiguous(),
    }
    layers = {"conv": conv_bn(rank, 4, 8, k, stride, padding=0), "fc": nn.Linear(8, 6)}
    return Lambda(lambda m, x: F.relu(m.fc(moves[move](m.conv(x)))), **layers)


def linear_then(rank: int, forward: Forward, norm: nn.Module | None = None) -> nn.Module:
    """A linear layer `fc` on the last axis (6 to 5 features) and a BatchNorm of that rank on 5 channels."""
    return Lambda(forward, fc=nn.Linear(6, 5), norm=norm or bn(rank, 5), g=torch.randn(5) + 0.2)


LINEAR_NORM: dict[str, tuple[int, tuple[int, ...], Forward]] = {
    "permute_norm2d": (2, (2, 4, 7, 6), lambda m, x: F.relu(m.norm(m.fc(x).permute(0, 3, 1, 2)))),
    "permute_norm2d_back": (2, (2, 4, 7, 6), lambda m, x: F.relu(to_last(m.norm(to_first(m.fc(x)))))),
    "transpose_norm1d": (1, (2, 7, 6), lambda m, x: F.relu(m.norm(m.fc(x).transpose(1, 2)))),
    "transpose_norm1d_back": (1, (2, 7, 6), lambda m, x: F.relu(m.norm(m.fc(x).mT).transpose(-2, -1))),
    "permute_norm3d": (3, (2, 3, 4, 2, 6), lambda m, x: F.relu(m.norm(m.fc(x).permute(0, 4, 1, 2, 3)))),
    "flatten_norm_view": (
        1,
        (2, 7, 6),
        lambda m, x: F.relu(m.norm(m.fc(x).flatten(0, 1)).view(x.shape[0], x.shape[1], -1)),
    ),
    "reshape_norm_reshape": (
        1,
        (2, 3, 4, 6),
        lambda m, x: F.relu(m.norm(m.fc(x).reshape(-1, 5)).reshape(*x.shape[:-1], 5)),
    ),
    "flatten_norm_unflatten": (
        1,
        (2, 7, 6),
        lambda m, x: F.relu(m.norm(m.fc(x).flatten(0, 1)).unflatten(0, x.shape[:2])),
    ),
    "flatten_in_front": (1, (2, 7, 6), lambda m, x: F.relu(m.norm(m.fc(x.flatten(0, 1))).view(-1, 7, 5))),
    "transpose_twice_norm": (1, (2, 7, 6), lambda m, x: F.relu(m.norm(m.fc(x).transpose(1, 2)).transpose(1, 2) * m.g)),
    "tokens_as_image": (
        2,
        (2, 12, 6),
        lambda m, x: F.relu(m.norm(m.fc(x).transpose(1, 2).reshape(x.shape[0], 5, 3, 4))),
    ),
    "column_norm2d": (2, (3, 6), lambda m, x: F.relu(m.norm(m.fc(x)[:, :, None, None])).flatten(1)),
}


def conv_space(rank: int, forward: Forward, norm_rank: int) -> nn.Module:
    """A convolution whose output is reshaped in its space only, a BatchNorm `norm` of another rank behind."""
    return Lambda(forward, conv=conv(rank, 4, 6, 3, bias=True), norm=bn(norm_rank, 6))


CONV_NORM: dict[str, tuple[int, int, Forward]] = {
    "flatten_norm1d": (2, 1, lambda m, x: F.relu(m.norm(m.conv(x).flatten(2)))),
    "flatten_norm1d_view": (2, 1, lambda m, x: (lambda y: F.relu(m.norm(y.flatten(2)).view_as(y)))(m.conv(x))),
    "swap_space_norm": (2, 2, lambda m, x: F.relu(m.norm(m.conv(x).transpose(2, 3)))),
    "unsqueeze_norm2d": (1, 2, lambda m, x: F.relu(m.norm(m.conv(x).unsqueeze(-1)).squeeze(-1))),
    "flatten_norm3d": (3, 2, lambda m, x: F.relu(m.norm(m.conv(x).flatten(2, 3)))),
    "there_and_back": (2, 2, lambda m, x: F.relu(m.norm(to_first(to_last(m.conv(x)) * 2)))),
}


def norm_then_linear(rank: int, tokens: bool) -> nn.Module:
    """BatchNorm on `(N, C, *space)`, channels moved to the last axis, a linear layer."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(F.relu(x))
        return torch.tanh(m.fc(y.flatten(2).transpose(1, 2) if tokens else to_last(y)))

    return Lambda(forward, norm=bn(rank, 4), fc=nn.Linear(4, 6))


class ScaleBehindPermute(nn.Module):
    """ConvNeXt, EdgeNeXt: `x + gamma * permute(fc2(gelu(fc1(permute(dw x)))))`, gamma on either side.

    `mlp` is "linear" or "conv" (1x1); `where` is "last" (channels last, `(C,)`) or "first" (`(C, 1, 1)`).
    """

    def __init__(self, rank: int, c: int, mlp: str, where: str) -> None:
        super().__init__()
        self.rank, self.mlp, self.where = rank, mlp, where
        self.depthwise = conv_bn(rank, c, c, 5, groups=c)
        if mlp == "linear":
            self.fc1, self.fc2 = nn.Linear(c, 3 * c), nn.Linear(3 * c, c)
        else:
            self.fc1, self.fc2 = conv(rank, c, 3 * c, 1, bias=True), conv(rank, 3 * c, c, 1, bias=True)
        self.gamma, self.drop = nn.Parameter(torch.randn(c)), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(x)
        y = to_last(y) if self.mlp == "linear" else y
        y = self.fc2(F.gelu(self.fc1(y)))
        if self.where == "last":
            y = self.gamma * (y if self.mlp == "linear" else to_last(y))
            return x + self.drop(to_first(y))
        y = to_first(y) if self.mlp == "linear" else y
        return x + self.drop(y * self.gamma.reshape(1, -1, *(1,) * self.rank))


class Attention(nn.Module):
    """LeViT-like: `x + gamma * proj(softmax(q k^T / T) v)`, BatchNorm in front, q, k, v of one source."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = bn(2, c)
        self.q, self.k, self.v = nn.Linear(c, c), nn.Linear(c, c, bias=False), nn.Linear(c, c)
        self.proj, self.after = nn.Linear(c, c, bias=False), nn.BatchNorm1d(c)
        self.gamma = nn.Parameter(torch.randn(c))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.q(tokens), self.k(tokens), self.v(tokens)
        y = self.proj(F.hardswish(torch.softmax(q @ k.transpose(1, 2) / 2.5, -1) @ v))
        y = self.gamma * self.after(y.flatten(0, 1)).reshape(y.shape)
        return x + y.transpose(1, 2).reshape(x.shape)


def residual_behind_permute(rank: int) -> nn.Module:
    """`x + permute(g * (fc(permute x) - h * permute x))`: one pointwise layer (transform M across a permute)."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = to_last(x)
        return F.relu(x + to_first(m.g * (m.fc(y) - m.h * y)))

    return Lambda(forward, fc=nn.Linear(6, 6, bias=False), g=torch.randn(6), h=torch.randn(6))


_ANY = {"conv+linear": 1, "bn": 0}
_LINEAR = {"linear": 1, "bn": 0, "conv": 0, "mul": 0}

CASES = [
    # A 1x1 convolution and a linear layer are the same map; which of the two is left is a question of memory layout.
    *(
        BlockCase(f"conv1x1_{move}_linear{r}d", partial(conv_then_linear, r, 1, 1, move), shape(r, 4, 5), _ANY, "3")
        for r, move in ((2, "permute"), (2, "movedim"), (2, "tokens"), (1, "permute"), (3, "permute"), (3, "tokens"))
    ),
    *(
        BlockCase(
            f"conv{k}_s{s}_{move}_linear{r}d", partial(conv_then_linear, r, k, s, move), shape(r, 4, 8), _ANY, "3"
        )
        for r, k, s, move in (
            (2, 3, 1, "tokens"),
            (2, 4, 4, "tokens"),
            (2, 2, 2, "permute"),
            (2, 3, 2, "reshape"),
            (1, 3, 1, "swap"),
            (1, 4, 2, "permute"),
            (3, 2, 2, "tokens"),
        )
    ),
    *(
        BlockCase(f"linear_{name}", partial(linear_then, rank, forward), sizes, _LINEAR, "3", False)
        for name, (rank, sizes, forward) in LINEAR_NORM.items()
    ),
    *(
        BlockCase(
            f"conv_{name}", partial(conv_space, r, forward, n), shape(r, 4, 5), {"conv": 1, "bn": 0, "mul": 0}, "3"
        )
        for name, (r, n, forward) in CONV_NORM.items()
    ),
    *(
        BlockCase(
            f"norm_{'tokens' if t else 'permute'}_linear{r}d",
            partial(norm_then_linear, r, t),
            shape(r, 4, 5),
            _ANY,
            "3",
        )
        for r, t in ((1, False), (2, True), (2, False), (3, True))
    ),
    *(
        BlockCase(
            f"layer_scale{r}d_{mlp}_{where}",
            partial(ScaleBehindPermute, r, 4, mlp, where),
            shape(r, 4, 6),
            {"conv": 1, "linear": 2, "bn": 0, "mul": 0} if mlp == "linear" else {"conv": 3, "bn": 0, "mul": 0},
            "3",
        )
        for r, mlp, where in (
            (2, "linear", "last"),
            (2, "linear", "first"),
            (2, "conv", "first"),
            (2, "conv", "last"),
            (1, "linear", "first"),
            (3, "linear", "first"),
        )
    ),
    # q, k and v as one layer, its output split: one launch and one pass over the tokens instead of three. The
    # temperature goes into q.
    BlockCase("attention_on_tokens", partial(Attention, 6), (2, 6, 3, 4), {"bn": 0}, "3"),
    *(
        BlockCase(
            f"residual_behind_permute{r}d",
            partial(residual_behind_permute, r),
            shape(r, 6, 4),
            {"conv+linear": 1, "mul": 0, "add": 0},
            "3",
        )
        for r in (1, 2)
    ),
]
