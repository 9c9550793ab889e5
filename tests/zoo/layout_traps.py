"""Traps of layout: reshapes that mix axes, transposes of equal sizes, means and pools that are not over the space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.aliases import c
from tests.zoo.case import bn
from tests.zoo.trap import Lambda, Trap

Forward = Callable[[Any, torch.Tensor], Any]


def tokens(forward: Forward) -> Callable[[], nn.Module]:
    """Layers `fc`, `after`, `conv`, `pointwise` (6 to 6), a norm `n` and a constant `g` on 6; for equal axes."""

    def build() -> nn.Module:
        layers: dict[str, Any] = {"fc": nn.Linear(6, 6), "after": nn.Linear(6, 6), "n": nn.BatchNorm1d(6)}
        convs = {"conv": nn.Conv1d(6, 6, 1, groups=2), "pointwise": nn.Conv1d(6, 6, 1, bias=False)}
        return Lambda(forward, **layers, g=torch.randn(6, 1) + 2, **convs)

    return build


def image(forward: Forward) -> Callable[[], nn.Module]:
    """A padded 3x3 `a`, a 1x1 `b`, BatchNorms `n`, `n1` on 4, `m16` on 16, a linear layer `fc` (4 to 4), `g` on 4."""

    def build() -> nn.Module:
        layers: dict[str, Any] = {"a": c(padding=1), "b": c(k=1), "n": bn(2, 4), "n1": bn(1, 4), "m16": bn(2, 16)}
        return Lambda(forward, **layers, fc=nn.Linear(4, 4), f16=nn.Linear(16, 3), g=torch.randn(4) + 2)

    return build


def batch_in_channels(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A kernel for each example by groups: the batch is folded into the channels."""
    n, channels, h, w = x.shape
    weight = m.b.weight.repeat(n, 1, 1, 1)
    y = F.conv2d(m.a(x).view(1, n * channels, h, w), weight, groups=n)
    return F.relu(m.n(y.view(n, channels, h, w)))


def windows(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Window partition of a transformer: space moves into the batch, channels go last, and back."""
    n, channels, h, w = x.shape
    y = m.a(x).view(n, channels, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, channels)
    y = m.fc(y).view(n, h // 2, w // 2, 2, 2, channels).permute(0, 5, 1, 3, 2, 4).reshape(n, channels, h, w)
    return F.relu(m.n(y))


def two_axes(m: Any, x: torch.Tensor) -> torch.Tensor:
    """A sum whose first branch mixes the last axis and whose other branches mix the one before it."""
    p, q = m.fc(x).chunk(2, -1)
    y = p * 2 + torch.sigmoid(q)
    return torch.tanh(y + 0.5 * (m.n(m.conv(y)) - m.pointwise(y)))


TOKENS: dict[str, tuple[Forward, tuple[int, ...]]] = {
    "norm_on_tokens_of_equal_size": (lambda m, x: F.relu(m.n(m.fc(x))), (2, 6, 6)),
    "norm_between_linears_of_equal_size": (lambda m, x: m.after(m.n(m.fc(x))), (2, 6, 6)),
    "norm_in_front_of_tokens": (lambda m, x: torch.tanh(m.fc(m.n(x))), (2, 6, 6)),
    "norm_behind_swapped_tokens": (lambda m, x: torch.tanh(m.fc(m.n(x.transpose(1, 2)))), (2, 6, 6)),
    "scale_of_rows_behind_linear": (lambda m, x: torch.tanh(m.fc(x) * m.g), (2, 6, 6)),
    "scale_of_rows_between_linears": (lambda m, x: torch.tanh(m.after(m.fc(x) * m.g)), (2, 6, 6)),
    "linear_over_rows_then_columns": (lambda m, x: torch.tanh(m.after(m.fc(x).transpose(1, 2))), (2, 6, 6)),
    "sum_with_own_transpose": (lambda m, x: torch.tanh(m.fc(x) + m.fc(x).transpose(1, 2)), (2, 6, 6)),
    "sum_of_linears_of_transposes": (lambda m, x: torch.tanh(m.fc(x) + m.after(x.transpose(1, 2))), (2, 6, 6)),
    "sum_over_two_axes": (two_axes, (2, 6, 6)),
    "sum_over_another_axis": (
        lambda m, x: (lambda y: torch.tanh(y + m.n(m.conv(y)) - m.pointwise(y)))(m.fc(x)),
        (2, 6, 6),
    ),
    "cube_permuted": (lambda m, x: torch.tanh(m.after(m.fc(x).permute(2, 0, 1))), (6, 6, 6)),
    "flatten_of_batch_and_rows": (lambda m, x: torch.tanh(m.n(m.fc(x).flatten(0, 1))), (6, 6, 6)),
    "flatten_with_batch_equal_to_channels": (lambda m, x: torch.tanh(m.fc(m.n(x).flatten(0, 1))), (6, 6, 6)),
    "view_that_swaps_by_size": (lambda m, x: torch.tanh(m.n(m.fc(x).view(x.shape[0], 6, -1))), (2, 6, 6)),
    "reshape_across_rows": (lambda m, x: torch.tanh(m.n(m.fc(x).reshape(-1, 6, 2))), (4, 4, 6)),
    "reshape_that_keeps_no_axis": (lambda m, x: torch.tanh(m.after(m.fc(x).reshape(x.shape[0], -1, 6))), (2, 3, 4, 6)),
    "heads_split_and_swapped": (
        lambda m, x: torch.tanh(m.after(m.fc(x).view(*x.shape[:2], 2, 3).transpose(2, 3).flatten(2))),
        (2, 5, 6),
    ),
    "mean_over_tokens_then_norm": (lambda m, x: torch.tanh(m.n(m.fc(x).mean(1))), (3, 6, 6)),
    "mean_over_features": (lambda m, x: torch.tanh(m.n(m.fc(x).mean(2))), (3, 6, 6)),
    "mean_over_the_batch": (lambda m, x: torch.tanh(m.n(m.fc(x).mean(0))), (3, 6, 6)),
    "sum_over_tokens": (lambda m, x: torch.tanh(m.n(m.fc(x).sum(1))), (3, 6, 6)),
    "pool_over_features": (lambda m, x: torch.tanh(F.avg_pool1d(m.fc(x), 3, 1, 1) * m.g), (3, 6, 6)),
    "norm_of_unbatched": (lambda m, x: torch.tanh(m.fc(x) + m.g[:, 0]), (6,)),
}

IMAGES: dict[str, Forward] = {
    "reshape_mixes_channels_and_space": lambda m, x: m.n(m.a(x).reshape(x.shape[0], 4, x.shape[3], x.shape[2])),
    "reshape_mixes_channels_and_width": lambda m, x: m.n(m.a(x).view(x.shape[0], x.shape[2], 4, -1)),
    "reshape_of_a_permuted": lambda m, x: m.n(m.a(x).permute(0, 2, 3, 1).reshape(x.shape)),
    "transpose_of_equal_axes": lambda m, x: F.relu(m.n(m.a(x).transpose(1, 3))),
    "transpose_in_front_of_conv": lambda m, x: F.relu(m.b(m.n(x).transpose(1, 2))),
    "transpose_of_batch_and_channels": lambda m, x: F.relu(m.n(m.a(x).transpose(0, 1))),
    "transpose_of_a_matrix": lambda m, x: torch.tanh(m.n1((lambda y: y.t())(m.fc(x.mean((2, 3)))))),
    "permute_to_width_then_linear": lambda m, x: torch.tanh(m.fc(m.a(x).permute(0, 1, 3, 2))),
    "linear_on_the_width": lambda m, x: torch.tanh(m.fc(m.a(x))),
    "linear_on_the_width_then_norm": lambda m, x: F.relu(m.n(m.fc(x))),
    "flatten_everything": lambda m, x: torch.tanh(m.a(x).flatten() * 2).view(x.shape) * m.g,
    "flatten_batch_and_channels": lambda m, x: F.relu(m.n1(m.a(x).flatten(0, 1).mT)),
    "flatten_channels_and_height": lambda m, x: torch.tanh(m.n(m.a(x)).flatten(1, 2)),
    "channels_halved_into_space": lambda m, x: F.relu(m.m16(m.a(x).reshape(x.shape[0], 16, x.shape[2], -1))),
    "batch_folded_into_channels": batch_in_channels,
    "channels_folded_into_batch": lambda m, x: F.relu(m.n(m.a(x).view(-1, 1, *x.shape[2:]).expand(-1, 4, -1, -1))),
    "windows": windows,
    "mean_over_channels": lambda m, x: F.relu(m.n(m.a(x).mean(1, keepdim=True) * m.g.view(4, 1, 1))),
    "mean_over_channels_dropped": lambda m, x: F.relu(m.n1(m.a(x).mean(1))),
    "mean_over_the_width": lambda m, x: F.relu(m.n1(m.a(x).mean(3))),
    "mean_over_everything": lambda m, x: F.relu(m.n(m.a(x)) - m.n(m.a(x)).mean()),
    "mean_over_batch_and_space": lambda m, x: F.relu(m.n(m.a(x)) - m.b(x).mean((0, 2, 3), keepdim=True)),
    "mean_added_to_the_image": lambda m, x: F.relu(m.n(m.a(x) + m.b(x).mean((2, 3), keepdim=True))),
    "sum_over_the_image": lambda m, x: torch.tanh(m.fc(m.n(m.b(x)).sum((2, 3)))),
    "variance_over_the_image": lambda m, x: torch.tanh(m.fc(m.n(m.b(x)).var((2, 3)))),
    "maximum_over_the_image": lambda m, x: torch.tanh(m.fc(m.n(m.b(x)).amax((2, 3)))),
    "pooled_padded_conv": lambda m, x: torch.tanh(m.fc(F.adaptive_avg_pool2d(m.a(m.n(x)), 1).flatten(1))),
    "adaptive_pool_to_the_same_size": lambda m, x: F.relu(m.n(F.adaptive_avg_pool2d(m.a(x), 4))),
    "adaptive_pool_of_one_axis": lambda m, x: F.relu(m.n(F.adaptive_avg_pool2d(m.a(x), (None, 1)))),
    "adaptive_pool_overlapping": lambda m, x: F.relu(m.n(F.adaptive_avg_pool2d(m.a(x), 3))),
    "adaptive_pool_larger": lambda m, x: F.relu(m.n(F.adaptive_avg_pool2d(m.a(x), 7))),
    "adaptive_pool_in_front_of_conv": lambda m, x: F.relu(m.a(F.adaptive_avg_pool2d(m.n(x), 2))),
    "adaptive_max_pool": lambda m, x: F.relu(m.n(F.adaptive_max_pool2d(m.a(x), 2))),
    "one_cell_then_padded_conv": lambda m, x: F.relu(m.a(m.n(x).mean((2, 3), keepdim=True))),
    "power_average_pool": lambda m, x: F.relu(m.n(F.lp_pool2d(m.a(x).abs(), 2, 2))),
    "interpolated": lambda m, x: F.relu(m.n(F.interpolate(m.a(x), scale_factor=2))),
    "unfolded": lambda m, x: torch.tanh(F.unfold(m.n(m.a(x)), 2)),
    "diagonal": lambda m, x: torch.tanh(m.n(m.a(x)).diagonal(0, 1, 2) * m.g),
    "scale_below_zero_behind_relu": lambda m, x: torch.tanh(F.relu(m.a(x)) * -2),
    "scale_zero_behind_relu": lambda m, x: torch.tanh(F.relu(m.a(x)) * 0 + m.b(x)),
    "scale_of_mixed_sign_behind_max_pool": lambda m, x: F.max_pool2d(m.a(x), 2) * m.signs,
    "scale_behind_relu6": lambda m, x: torch.tanh(F.relu6(m.a(x)) * 3),
    "scale_behind_gelu": lambda m, x: torch.tanh(F.gelu(m.a(x)) * 3),
    "scale_behind_negative_leaky_relu": lambda m, x: torch.tanh(F.leaky_relu(m.a(x), -0.5) * -1.5),
    "shift_behind_relu": lambda m, x: torch.tanh(F.relu(m.a(x)) + 1),
    "relu_read_twice_scaled_once": lambda m, x: (lambda y: (y.sigmoid(), torch.tanh(y * 3)))(F.relu(m.a(x))),
    "conv_read_twice_scaled_behind_relu": lambda m, x: (lambda y: (y.sigmoid(), F.relu(y) * 3))(m.a(x)),
}


def with_signs(forward: Forward) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = image(forward)()
        model.register_buffer("signs", torch.tensor([1.5, -2.0, 0.5, 0.0]).view(4, 1, 1))
        return model

    return build


_ONE_SIZE = (
    "permute",
    "linear_on_the_width",
    "mean_over_channels_dropped",
    "windows",
    "transpose_",
    "reshape_",
    "channels_halved",
)

LAYOUTS = [
    *(
        Trap(name, tokens(forward), sizes, batches=() if "batch" in name or "cube" in name or sizes == (6,) else (1, 5))
        for name, (forward, sizes) in TOKENS.items()
    ),
    *(
        Trap(
            name,
            with_signs(forward),
            (4, 4, 4, 4),
            batches=()
            if "transpose_of" in name or name in ("flatten_batch_and_channels", "flatten_everything")
            else (1, 5),
            flexible=not name.startswith((*_ONE_SIZE, "flatten_")),
        )
        for name, forward in IMAGES.items()
    ),
]
