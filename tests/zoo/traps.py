"""Traps around layers: hooks, parametrisations, subclasses, statistics, kinds of inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tests.zoo.aliases import IMAGE, IN_PLACE, ONE, SHARING, c
from tests.zoo.case import bn, conv_bn
from tests.zoo.trap import Lambda, Trap, Two

# --- hooks, parametrisations, subclasses ---


def double_output(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output + 1


def double_input(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(2 * x + 1 for x in args)


def hooked(which: str, pre: bool = False) -> nn.Module:
    model = nn.Sequential(conv_bn(2, 4, 4, 3), nn.Dropout(), nn.Identity(), nn.ReLU())
    target = model.get_submodule(which)
    if pre:
        target.register_forward_pre_hook(double_input)
    else:
        target.register_forward_hook(double_output)
    return model


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x.abs()


def parametrised(which: str) -> nn.Module:
    layer, norm = c(), bn(2, 4)
    if which == "weight_norm":
        layer = parametrizations.weight_norm(layer)
    elif which == "spectral_norm":
        layer = parametrizations.spectral_norm(layer)
    elif which == "bias":
        parametrize.register_parametrization(layer, "bias", Doubled())
    else:
        parametrize.register_parametrization(norm, "weight", Doubled())
    return nn.Sequential(layer, norm, nn.ReLU())


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with its activation inside, as model zoos write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return F.relu(y)


class SuperNormAct(nn.BatchNorm2d):
    """The same by `super()`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(super().forward(x), 0.2)


class ScaledConv(nn.Conv2d):
    """A convolution that does more than its base class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.abs()) * 2


class ScaledLinear(nn.Linear):
    """A linear layer that does more than its base class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x))


class BlindDropout(nn.Dropout):
    """A subclass of dropout that is no dropout."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * x


def pruned_by_forward() -> nn.Module:
    """An instance whose `forward` was replaced."""
    layer = c()
    layer.forward = lambda x: F.conv2d(x.abs(), layer.weight, layer.bias)  # type: ignore[method-assign]
    return nn.Sequential(layer, bn(2, 4))


# --- statistics ---


def functional_training_norm() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(m.a(x), None, None, m.g, None, training=True)

    return Lambda(forward, a=c(), g=nn.Parameter(torch.randn(4)))


def tiny_variance() -> nn.Module:
    norm = bn(2, 4, eps=1e-8)
    model = nn.Sequential(c(), norm, nn.ReLU())
    norm.register_buffer("running_var", norm.running_var)
    return model


def norm_without_momentum() -> nn.Module:
    return nn.Sequential(c(), nn.BatchNorm2d(4, momentum=None, eps=0.01))


# --- outputs and inputs ---


def dict_output() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> dict[str, Any]:
        y = F.relu(m.block(x))
        return {"out": y, "aux": [m.other(y), (y.mean(), None)], "name": "head", "count": 3}

    return Lambda(forward, block=conv_bn(2, 4, 4, 3), other=conv_bn(2, 4, 2, 1))


def two_inputs() -> nn.Module:
    return Two(
        lambda m, x, y: (F.relu(m.a(x) + m.b(y)), m.n(y)), a=conv_bn(2, 4, 4, 3), b=conv_bn(2, 4, 4, 1), n=bn(2, 4)
    )


def same_branches_of_different_inputs() -> nn.Module:
    return Two(lambda m, x, y: F.relu(m.a(x) + m.b(x) + m.a(y)), a=conv_bn(2, 4, 4, 3), b=conv_bn(2, 4, 4, 1))


def unbatched() -> nn.Module:
    return Lambda(
        lambda m, x: F.relu(m.a(x) * m.g.view(-1, 1, 1)), a=c(4, 6, padding=1), g=nn.Parameter(torch.randn(6))
    )


WRAPPED = [
    *(
        Trap(f"forward_hook_on_{w}", lambda w=w: hooked(w), IMAGE, may_refuse=True)
        for w in ("0.0", "0.1", "0", "1", "2")
    ),
    *(
        Trap(f"pre_hook_on_{w}", lambda w=w: hooked(w, True), IMAGE, may_refuse=True)
        for w in ("0.0", "0.1", "0", "1", "2")
    ),
    Trap("forward_hook_on_the_root", lambda: hooked(""), IMAGE, may_refuse=True),
    Trap("pre_hook_on_the_root", lambda: hooked("", True), IMAGE, may_refuse=True),
    *(
        Trap(f"parametrised_{w}", lambda w=w: parametrised(w), IMAGE, may_refuse=True)
        for w in ("weight_norm", "spectral_norm", "bias", "norm")
    ),
    Trap(
        "norm_subclass_with_activation",
        lambda: nn.Sequential(c(), NormAct(4), c(), NormAct(4)),
        IMAGE,
        {"conv": 2, "bn": 0},
    ),
    Trap("norm_subclass_calling_super", lambda: nn.Sequential(c(), SuperNormAct(4)), IMAGE, ONE),
    Trap("conv_subclass", lambda: nn.Sequential(ScaledConv(4, 4, 3), bn(2, 4)), IMAGE, ONE),
    Trap("linear_subclass", lambda: nn.Sequential(ScaledLinear(5, 6), nn.BatchNorm1d(6)), (3, 5)),
    Trap("dropout_subclass", lambda: nn.Sequential(c(), BlindDropout(), bn(2, 4)), IMAGE, {**ONE, "mul": 0}),
    Trap("forward_replaced_on_the_instance", pruned_by_forward, IMAGE, may_refuse=True),
    Trap("sync_batch_norm", lambda: nn.Sequential(c(), nn.SyncBatchNorm(4), nn.ReLU()), IMAGE, ONE),
]
STATISTICS = [
    Trap(
        "norm_without_running_statistics",
        lambda: nn.Sequential(c(), nn.BatchNorm2d(4, track_running_stats=False)),
        IMAGE,
        {"conv": 1, "bn": 1},
        ("running", "statistic"),
    ),
    Trap(
        "functional_norm_in_training_mode",
        functional_training_norm,
        IMAGE,
        {"conv": 1, "bn": 1},
        ("training", "statistic"),
    ),
    Trap("norm_without_momentum", norm_without_momentum, IMAGE, ONE),
    Trap("norm_with_tiny_eps", tiny_variance, IMAGE, ONE),
    Trap(
        "linear_norm_without_affine",
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False)),
        (3, 5),
        {"linear": 1, "bn": 0},
    ),
    Trap("instance_norm_is_no_batch_norm", lambda: nn.Sequential(c(), nn.InstanceNorm2d(4, affine=True)), IMAGE),
    Trap(
        "instance_norm_with_statistics",
        lambda: nn.Sequential(c(), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        IMAGE,
    ),
    Trap("group_norm", lambda: nn.Sequential(c(), nn.GroupNorm(2, 4)), IMAGE),
]
CALLS = [
    Trap("nested_dict_output", dict_output, IMAGE, {"conv": 2, "bn": 0}),
    Trap("two_inputs", two_inputs, (IMAGE, IMAGE)),
    Trap("two_inputs_by_keyword", two_inputs, {"y": IMAGE, "x": IMAGE}),
    Trap("branches_of_different_inputs", same_branches_of_different_inputs, (IMAGE, IMAGE), {"bn": 0}),
    Trap("unbatched_image", unbatched, (4, 7, 8), batches=()),
]
TRAPS = [*SHARING, *IN_PLACE, *WRAPPED, *STATISTICS, *CALLS]
