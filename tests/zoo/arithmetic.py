"""Traps in arithmetic, broadcasting and borders: operations that look affine and are not, or not along the channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.aliases import IMAGE, ONE, c
from tests.zoo.case import bn, conv_bn
from tests.zoo.trap import Lambda, Trap

Forward = Callable[..., Any]


def one(forward: Forward, **more: Any) -> Callable[[], nn.Module]:
    """A model with a 3x3 `a`, a 1x1 `b`, a BatchNorm `n` and a per-channel constant `g`, all on four channels."""

    def build() -> nn.Module:
        layers: dict[str, Any] = {"a": c(padding=1), "b": c(k=1), "n": bn(2, 4), "g": torch.randn(4, 1, 1) + 3}
        layers.update({name: make() for name, make in more.items()})
        return Lambda(forward, **layers)

    return build


def same_conv_bn(kernel: Any, mode: str = "zeros", dilation: int = 1) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        c(4, 6, kernel, padding="same", padding_mode=mode, dilation=dilation), bn(2, 6), nn.ReLU()
    )


def padded_conv_bn(mode: str, padding: Any, stride: int = 1, groups: int = 1) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        c(4, 6, 3, padding=padding, padding_mode=mode, stride=stride, groups=groups), bn(2, 6), nn.ReLU()
    )


def modes(first: str, second: str, kernel: int = 5) -> Callable[[], nn.Module]:
    """Parallel branches with padding modes of their own, a 1x1 and the identity."""
    return one(
        lambda m, x: F.relu(m.p(x) + m.q(x) + m.b(x) + m.n(x)),
        p=lambda: c(k=3, padding=1, padding_mode=first),
        q=lambda: c(k=kernel, padding=kernel // 2, padding_mode=second),
    )


def shape_branch(m: Any, x: torch.Tensor) -> torch.Tensor:
    if x.shape[-1] > 8:
        return F.relu(m.n(m.a(x)))
    return torch.sigmoid(m.n(m.b(x)))


def value_branch(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.relu(m.n(m.a(x))) if x.sum() > 0 else torch.sigmoid(m.n(m.b(x)))


def _linear_cases() -> list[Trap]:
    folds: dict[str, Forward] = {
        "sub_with_alpha": lambda m, x: F.relu(torch.sub(m.a(x), m.b(x), alpha=2)),
        "add_with_alpha": lambda m, x: F.relu(torch.add(m.a(x), x, alpha=-3)),
        "rsub": lambda m, x: F.relu(torch.rsub(m.a(x), 2.0, alpha=3)),
        "int_minus_tensor": lambda m, x: F.relu(1 - m.a(x)),
        "negated_branch": lambda m, x: F.relu(m.b(x) - m.n(m.a(x))),
        "same_tensor_twice": lambda m, x: F.relu((lambda y: y + y)(m.n(m.a(x)))),
        "divided_by_constant": lambda m, x: F.relu(m.a(x) / m.g),
        "keywords": lambda m, x: F.relu(torch.add(input=m.n(input=m.a(input=x)), other=m.b(input=x), alpha=2)),
        "functional_positional": lambda m, x: m.n(F.conv2d(x, m.a.weight, m.a.bias, (1, 1), (1, 1), (1, 1), 1)),
        "functional_same": lambda m, x: m.n(F.conv2d(x, m.a.weight, bias=m.a.bias, padding="same")),
    }
    return [Trap(name, one(forward), IMAGE, {"conv": 1, "bn": 0}) for name, forward in folds.items()]


def _not_linear_cases() -> list[Trap]:
    stays: dict[str, Forward] = {
        "constant_over_tensor": lambda m, x: 2 / (m.a(x).abs() + 1) + m.n(m.b(x)),
        "tensor_over_tensor": lambda m, x: m.n(m.a(x)) / (3 + torch.sigmoid(m.b(x))),
        "product_of_branches": lambda m, x: m.n(m.a(x)) * m.b(x),
        "square": lambda m, x: (lambda y: y * y)(m.n(m.a(x))),
        "floor_division": lambda m, x: torch.div(m.n(m.a(x)), 0.5, rounding_mode="floor"),
        "floor_operator": lambda m, x: m.n(m.a(x)) // 0.5,
        "power": lambda m, x: m.n(m.a(x)) ** 2,
        "remainder": lambda m, x: m.n(m.a(x)) % 1.0,
        "difference_with_itself": lambda m, x: m.a(x) - m.a(x) + x.sigmoid(),
        "minimum_of_branches": lambda m, x: torch.minimum(m.n(m.a(x)), m.b(x)),
        "scaled_by_a_mean": lambda m, x: m.n(m.a(x)) * x.mean((2, 3), keepdim=True),
        "scaled_by_the_batch_size": lambda m, x: F.relu(m.n(m.a(x)) * x.shape[0]),
        "scaled_by_the_image_size": lambda m, x: F.relu(m.n(m.a(x)) / x.shape[-1]),
        "softmax_of_scaled": lambda m, x: torch.softmax(m.n(m.a(x)) * 2, 1),
    }
    return [Trap(name, one(forward), IMAGE) for name, forward in stays.items()]


def _broadcast_cases() -> list[Trap]:
    square = (2, 4, 4, 4)
    return [
        Trap("constant_over_the_width", one(lambda m, x: F.relu(m.a(x) * m.w), w=lambda: torch.randn(4)), square),
        Trap("constant_over_the_height", one(lambda m, x: m.n(m.a(x) * m.w), w=lambda: torch.randn(4, 1)), square),
        Trap("constant_over_the_image", one(lambda m, x: m.n(m.a(x) + m.w), w=lambda: torch.randn(1, 1, 4, 4)), square),
        Trap(
            "constant_over_the_batch",
            one(lambda m, x: m.n(m.a(x) * m.w), w=lambda: torch.randn(2, 1, 1, 1)),
            square,
            batches=(),
        ),
        Trap("constant_that_widens", one(lambda m, x: F.relu(m.p(x) * m.g), p=lambda: c(4, 1)), IMAGE),
        Trap("constant_that_adds_a_batch", one(lambda m, x: m.a(x) * m.w, w=lambda: torch.randn(3, 1, 4, 1, 1)), IMAGE),
        Trap("one_channel_plus_four", one(lambda m, x: F.relu(m.p(x) + m.a(x)), p=lambda: c(4, 1, padding=1)), IMAGE),
        Trap("one_channel_plus_the_input", one(lambda m, x: F.relu(m.p(x) + x), p=lambda: c(4, 1, padding=1)), IMAGE),
        Trap("one_pixel_plus_the_image", one(lambda m, x: F.relu(m.p(x) + m.b(x)), p=lambda: c(k=4)), square),
        Trap("one_column_plus_the_image", one(lambda m, x: F.relu(m.p(x) + m.b(x)), p=lambda: c(k=(1, 4))), square),
        Trap(
            "linear_on_the_last_axis_times_columns",
            lambda: Lambda(lambda m, x: m.fc(x) * m.g, fc=nn.Linear(6, 6), g=torch.randn(6, 1)),
            (2, 6, 6),
        ),
        Trap(
            "linear_times_features",
            lambda: Lambda(lambda m, x: F.relu(m.fc(x) * m.g), fc=nn.Linear(6, 5), g=torch.randn(5)),
            (2, 3, 6),
            {"linear": 1},
        ),
        Trap(
            "transposed_before_the_norm",
            lambda: Lambda(lambda m, x: m.n(m.fc(x).transpose(1, 2)), fc=nn.Linear(6, 6), n=nn.BatchNorm1d(6)),
            (2, 6, 6),
        ),
        Trap(
            "norm_of_swapped_axes",
            lambda: Lambda(lambda m, x: m.n(m.a(x).transpose(1, 2)), a=c(padding=1), n=bn(2, 4)),
            square,
        ),
    ]


def _border_cases() -> list[Trap]:
    cases = [
        *(Trap(f"same_padding_{k}", same_conv_bn(k), (2, 4, 9, 10), ONE) for k in (2, 4, (2, 3), (3, 4))),
        Trap("same_padding_dilated", same_conv_bn((2, 3), dilation=2), (2, 4, 9, 10), ONE),
        *(
            Trap(f"{mode}_padding_{'x'.join(map(str, padding))}", padded_conv_bn(mode, padding), IMAGE, ONE)
            for mode in ("zeros", "reflect", "replicate", "circular")
            for padding in ((1, 1), (2, 0))
        ),
        *(Trap(f"same_padding_{mode}", same_conv_bn(4, mode), (2, 4, 9, 10), ONE) for mode in ("reflect", "circular")),
        Trap("reflect_strided_grouped", padded_conv_bn("reflect", 1, 2, 2), IMAGE, ONE),
        *(Trap(f"branches_all_{mode}", modes(mode, mode), IMAGE) for mode in ("reflect", "replicate", "circular")),
        Trap("branches_zeros_and_reflect", modes("zeros", "reflect"), IMAGE),
        Trap("branches_reflect_and_circular", modes("reflect", "circular", 3), IMAGE),
        Trap(
            "branches_same_even",
            one(lambda m, x: F.relu(m.p(x) + m.b(x) + m.n(x)), p=lambda: c(k=(4, 2), padding="same")),
            IMAGE,
            ONE,
        ),
        Trap(
            "branches_of_different_stride_phase",
            one(lambda m, x: m.p(x) + m.q(x), p=lambda: c(k=3, stride=2, padding=1), q=lambda: c(k=1, stride=2)),
            (2, 4, 8, 8),
        ),
        Trap(
            "branches_off_by_one",
            one(lambda m, x: m.p(x) + m.q(x)[:, :, 1:, 1:], p=lambda: c(k=2), q=lambda: c(k=1)),
            IMAGE,
        ),
        Trap("crop_in_a_branch", one(lambda m, x: m.p(x) + m.b(x[:, :, 1:-1, 1:-1]), p=lambda: c(k=3)), IMAGE),
        Trap(
            "reflection_pad_in_front",
            one(lambda m, x: m.n(m.p(F.pad(x, (1, 1, 1, 1), mode="reflect"))), p=c),
            IMAGE,
            ONE,
        ),
        Trap("constant_pad_in_front", one(lambda m, x: m.n(m.p(F.pad(x, (1, 2, 0, 1), value=0.5))), p=c), IMAGE, ONE),
        Trap(
            "transposed_with_output_size",
            one(lambda m, x: m.n(m.p(x, output_size=[16, 17])), p=lambda: nn.ConvTranspose2d(4, 4, 3, 2, 1)),
            (2, 4, 8, 9),
            may_refuse=True,
        ),
        Trap(
            "pool_not_counting_its_padding",
            one(lambda m, x: m.a(x) + m.p(x), p=lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
            IMAGE,
        ),
        Trap(
            "pool_with_divisor",
            one(lambda m, x: m.n(m.a(x) + m.p(x)), p=lambda: nn.AvgPool2d(3, 1, 1, divisor_override=2)),
            IMAGE,
        ),
        Trap(
            "pool_with_ceil_mode",
            one(
                lambda m, x: m.n(m.p(x) + m.q(x)),
                p=lambda: nn.AvgPool2d(3, 2, ceil_mode=True),
                q=lambda: c(k=3, stride=2),
            ),
            (2, 4, 9, 11),
        ),
        Trap("swapped_axes_pooled", one(lambda m, x: F.avg_pool2d(3 * m.a(x).transpose(1, 2), 3, 1, 1)), IMAGE),
        Trap("norm_before_max_pool", lambda: nn.Sequential(c(), bn(2, 4), nn.MaxPool2d(2)), IMAGE, ONE),
        Trap("norm_behind_max_pool", lambda: nn.Sequential(c(), nn.MaxPool2d(2), bn(2, 4)), IMAGE),
        Trap("leaky_relu_with_slope_one", lambda: nn.Sequential(c(), nn.LeakyReLU(1.0), bn(2, 4)), IMAGE),
        Trap("branch_on_the_size", one(shape_branch), IMAGE, may_refuse=True),
        Trap("branch_on_a_value", one(value_branch), IMAGE, may_refuse=True),
        Trap("chain_of_blocks", lambda: nn.Sequential(*(conv_bn(2, 4, 4, 3) for _ in range(3))), IMAGE, {"bn": 0}),
    ]
    return cases


ARITHMETIC = [*_linear_cases(), *_not_linear_cases(), *_broadcast_cases(), *_border_cases()]
