"""Traps of sharing and of writing in place: one layer or weight used twice, aliases, views."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import bn
from tests.zoo.trap import Lambda, Trap

IMAGE = (2, 4, 7, 8)
ONE = {"conv": 1, "bn": 0}


def c(c_in: int = 4, c_out: int = 4, k: Any = 3, bias: bool = True, **kwargs: Any) -> nn.Conv2d:
    """A convolution with torch's own arguments."""
    return nn.Conv2d(c_in, c_out, k, bias=bias, **kwargs)


# --- sharing ---


def shared_weight() -> nn.Module:
    model = Lambda(
        lambda m, x: m.nb(m.b(F.relu(m.na(m.a(x))))), a=c(padding=1), b=c(padding=1), na=bn(2, 4), nb=bn(2, 4)
    )
    model.b.weight = model.a.weight
    return model


def shared_norm() -> nn.Module:
    return Lambda(lambda m, x: m.n(m.b(F.relu(m.n(m.a(x))))), a=c(padding=1), b=c(padding=1), n=bn(2, 4))


def weight_read_elsewhere() -> nn.Module:
    return Lambda(lambda m, x: (F.relu(m.n(m.a(x))), m.a.weight.square().sum(), m.a.bias * 2), a=c(), n=bn(2, 4))


def statistics_read_elsewhere() -> nn.Module:
    return Lambda(lambda m, x: (F.relu(m.n(m.a(x))), m.n.running_var + m.n.bias), a=c(), n=bn(2, 4))


def tied_linear() -> nn.Module:
    return Lambda(lambda m, x: F.linear(F.relu(m.n(m.a(x))), m.a.weight.t()), a=nn.Linear(5, 7), n=nn.BatchNorm1d(7))


def inner_returned() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = m.a(x)
        return y, F.relu(m.n(y))

    return Lambda(forward, a=c(), n=bn(2, 4))


def inner_of_a_branch_returned() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = m.a(x)
        return F.relu(m.n(y) + m.b(x)), y

    return Lambda(forward, a=c(padding=1), b=c(k=1), n=bn(2, 4))


# --- in place ---


def plus_equals() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        out = m.n(m.a(x))
        out += m.b(x)
        out += x
        return F.relu(out, inplace=True)

    return Lambda(forward, a=c(padding=1), b=c(k=1), n=bn(2, 4))


def relu_writes_what_a_norm_reads() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        z = m.act(y)
        return z + m.n(y)

    return Lambda(forward, a=c(), n=bn(2, 4), act=nn.ReLU(inplace=True))


def norm_reads_before_relu_writes() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        normed = m.n(y)
        return F.relu_(y) * torch.sigmoid(normed)

    return Lambda(forward, a=c(), n=bn(2, 4))


def relu_writes_the_source_of_branches() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.cos(x)
        first = m.a(y)
        z = F.relu(y, inplace=True)
        return first + m.b(y) + z

    return Lambda(forward, a=c(padding=1), b=c(k=1))


def shared_relu_writes_in_two_places() -> nn.Module:
    """One in-place ReLU at two call sites; what either overwrites is read under its old name."""

    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = m.a(x)
        before = torch.sigmoid(y)
        first = m.act(y)
        z = m.n(y)
        m.act(z)
        return before, first, z + 1

    return Lambda(forward, a=c(), n=bn(2, 4), act=nn.ReLU(inplace=True))


def write_through_a_slice() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        F.relu_(y[:, :2])
        return m.n(y)

    return Lambda(forward, a=c(), n=bn(2, 4))


def write_through_a_view() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        y.flatten(2).mul_(m.g)
        return m.n(y)

    return Lambda(forward, a=c(), n=bn(2, 4), g=torch.randn(4, 1))


def plus_equals_under_an_alias() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = m.n(m.a(x))
        alias = y
        y += m.b(x)
        return F.relu(y), alias * 2

    return Lambda(forward, a=c(padding=1), b=c(k=1), n=bn(2, 4))


def item_assignment() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        y[:, 0] = 1.0
        return m.n(y)

    return Lambda(forward, a=c(), n=bn(2, 4))


def add_with_alpha_in_place() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        y.add_(m.b(x), alpha=-2).sub_(x, alpha=0.5).mul_(3).div_(m.g)
        return F.relu(y)

    return Lambda(forward, a=c(padding=1), b=c(k=1), g=torch.randn(4, 1, 1).abs() + 0.5)


def input_written_to() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        x.mul_(2)
        return y + m.b(x)

    return Lambda(forward, a=c(padding=1), b=c(k=1))


SHARING = [
    Trap("weight_shared_by_two_modules", shared_weight, IMAGE, {"conv": 2, "bn": 0}),
    Trap("norm_shared_by_two_convs", shared_norm, IMAGE, {"conv": 2, "bn": 0}),
    Trap("weight_also_read", weight_read_elsewhere, IMAGE),
    Trap("statistics_also_read", statistics_read_elsewhere, IMAGE),
    Trap("weight_tied_to_a_functional_linear", tied_linear, (3, 5)),
    Trap("inner_tensor_also_returned", inner_returned, IMAGE),
    Trap("inner_tensor_of_a_branch_also_returned", inner_of_a_branch_returned, IMAGE),
]
IN_PLACE = [
    Trap("plus_equals_branches", plus_equals, IMAGE, {**ONE, "add": 0}),
    Trap("relu_writes_what_a_norm_reads", relu_writes_what_a_norm_reads, IMAGE, may_refuse=True),
    Trap("norm_reads_before_relu_writes", norm_reads_before_relu_writes, IMAGE, may_refuse=True),
    Trap("relu_writes_the_source_of_branches", relu_writes_the_source_of_branches, IMAGE, may_refuse=True),
    Trap("shared_relu_writes_in_two_places", shared_relu_writes_in_two_places, IMAGE, may_refuse=True),
    Trap("write_through_a_slice", write_through_a_slice, IMAGE, may_refuse=True),
    Trap("write_through_a_view", write_through_a_view, IMAGE, may_refuse=True),
    Trap("plus_equals_under_an_alias", plus_equals_under_an_alias, IMAGE, may_refuse=True),
    Trap("item_assignment", item_assignment, IMAGE, may_refuse=True),
    Trap("in_place_with_alpha", add_with_alpha_in_place, IMAGE, {"conv": 1, "add": 0, "mul": 0}),
    Trap("input_written_to", input_written_to, IMAGE, may_refuse=True),
]
