"""Each row of the list of models on which other tools are silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.branches import RepVGG
from tests.zoo.case import bn, conv, conv_bn
from tests.zoo.trap import Lambda, Trap

IMAGE = (2, 4, 7, 8)


def _c(c_in: int = 4, c_out: int = 4, k: int = 3, bias: bool = True, groups: int = 1) -> nn.Module:
    return conv(2, c_in, c_out, k, bias=bias, groups=groups)


def _up(c_in: int, c_out: int, groups: int = 1, bias: bool = True) -> nn.Module:
    return nn.ConvTranspose2d(c_in, c_out, 3, stride=2, padding=1, groups=groups, bias=bias)


def own_norms() -> nn.Module:
    return Lambda(lambda m, x: m.b(m.conv(F.relu(m.a(m.conv(x))))), conv=_c(), a=bn(2, 4), b=bn(2, 4))


def one_norm() -> nn.Module:
    return Lambda(lambda m, x: (m.conv(x).sigmoid(), F.relu(m.norm(m.conv(x.cos())))), conv=_c(), norm=bn(2, 4))


def block_twice() -> nn.Module:
    return Lambda(lambda m, x: m.block(F.relu(m.block(x))), block=conv_bn(2, 4, 4, 3))


def linear_on_tokens() -> nn.Module:
    """`(N, C, L)` through Linear(L, C): the BatchNorm's channels are axis 1, the linear layer's are the last axis."""
    return Lambda(lambda m, x: m.norm(m.fc(x)), fc=nn.Linear(7, 5), norm=nn.BatchNorm1d(5))


def second_consumer() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return torch.sigmoid(y) * F.relu(m.norm(y))

    return Lambda(forward, conv=_c(), norm=bn(2, 4))


def transposed(groups: int, c_out: int = 4) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(_up(4, c_out, groups), bn(2, c_out))


def transposed_times_constant() -> nn.Module:
    return Lambda(lambda m, x: F.relu(m.up(x) * m.gamma), up=_up(4, 4), gamma=nn.Parameter(torch.randn(4, 1, 1)))


def biased() -> nn.Module:
    return nn.Sequential(_c(bias=True), bn(2, 4))


def without_affine() -> nn.Module:
    return nn.Sequential(_c(), nn.BatchNorm2d(4, affine=False))


class OtherOrder(nn.Module):
    """Registered as conv1, conv2, norm2, norm1; called as conv2, norm1, relu, conv1, norm2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm2, self.norm1 = _c(), _c(), bn(2, 4), bn(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm2(self.conv1(F.relu(self.norm1(self.conv2(x)))))


def norm_first() -> nn.Module:
    return nn.Sequential(bn(2, 4), _c())


def relu_between() -> nn.Module:
    return nn.Sequential(_c(), nn.ReLU(), bn(2, 4))


class StochasticDepth(nn.Module):
    """Drops the whole branch at training time."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return x
        keep = x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


def dropouts_between() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.plane(m.drop(m.conv(x)))
        y = F.dropout2d(F.dropout(m.alpha(m.depth(y)), 0.5, m.training), 0.5, m.training)
        return F.relu(m.norm(y))

    drops = {"drop": nn.Dropout(), "plane": nn.Dropout2d(), "alpha": nn.AlphaDropout(), "depth": StochasticDepth(0.2)}
    return Lambda(forward, conv=_c(), norm=bn(2, 4), **drops)


_ONE = {"conv": 1, "bn": 0}

PEERS = [
    Trap("conv_called_twice_each_with_its_norm", own_norms, IMAGE),
    Trap("conv_called_twice_once_with_norm", one_norm, IMAGE),
    Trap("block_called_twice", block_twice, IMAGE, {"conv": 2, "bn": 0}),
    Trap("linear_then_norm_over_tokens", linear_on_tokens, (2, 5, 7), {"bn": 1, "linear": 1}, ("axis", "channel")),
    Trap("second_consumer_besides_the_norm", second_consumer, IMAGE),
    Trap("conv_transpose_norm_same_channels", transposed(1), IMAGE, _ONE),
    Trap("conv_transpose_times_constant", transposed_times_constant, IMAGE, {"conv": 1, "mul": 0}),
    Trap("grouped_conv_transpose_norm", transposed(2), IMAGE, _ONE),
    Trap("grouped_conv_transpose_norm_wider", transposed(4, 8), IMAGE, _ONE),
    Trap("biased_conv_norm", biased, IMAGE, _ONE),
    Trap("norm_without_affine", without_affine, IMAGE, _ONE),
    Trap("registered_in_another_order", OtherOrder, IMAGE, {"conv": 2, "bn": 0}),
    Trap("norm_before_padded_conv", norm_first, IMAGE),
    Trap("relu_between_conv_and_norm", relu_between, IMAGE, {"conv": 1, "bn": 1}, ("relu", "linear", "affine")),
    Trap("three_branches", lambda: RepVGG(2, 4, 4), IMAGE, _ONE),
    Trap("grouped_branches_with_identity", lambda: RepVGG(2, 6, 6, groups=3), (2, 6, 7, 8), _ONE),
    Trap(
        "norm_that_cannot_be_fused", lambda: nn.Sequential(nn.ReLU(), bn(2, 4), nn.ReLU()), IMAGE, {"bn": 1}, ("norm",)
    ),
    Trap("all_dropouts", dropouts_between, IMAGE, {**_ONE, "dropout": 0, "mul": 0}),
]
