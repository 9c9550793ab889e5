"""Traps of the dropout family: what looks idle at inference and is not, and what draws although it should not."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tests.zoo.aliases import IMAGE, ONE, c
from tests.zoo.case import bn
from tests.zoo.trap import Lambda, Trap


class Scaling(nn.Identity):
    """A subclass of the identity that is none."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * input


class Halving(nn.Dropout):
    """Classical dropout as a subclass: it keeps its factor for inference."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.dropout(input, self.p, True) * (1 - self.p) if self.training else input * (1 - self.p)


@fx.wrap
def damped(x: torch.Tensor) -> torch.Tensor:
    """Returns what it is given, as long as that is small."""
    return x if float(x.abs().max()) < 1.0 else x / 2


@fx.wrap
def grown(x: torch.Tensor) -> torch.Tensor:
    """Writes into what it is given and returns it."""
    x.add_(1.0)
    return x


@fx.wrap
def idle(x: torch.Tensor, training: bool) -> torch.Tensor:
    """Does nothing but look at sizes."""
    if x.ndim != 4 or x.shape[1] == 0:
        raise ValueError("no image")
    return x + torch.randn_like(x) if training else x


def after(module: nn.Module) -> nn.Module:
    return nn.Sequential(c(), module, bn(2, 4), nn.ReLU())


def drop_block_always(m: Any, x: torch.Tensor) -> torch.Tensor:
    mask = 1 - F.max_pool2d((torch.rand_like(x) < 0.1).to(x.dtype), 3, 1, 1)
    return x * mask * mask.numel() / mask.sum()


def cutout_always(m: Any, x: torch.Tensor) -> torch.Tensor:
    mask, row = torch.ones_like(x), random.randrange(x.shape[2])
    mask[:, :, row : row + 2] = 0
    return x * mask


def layer_skipped_always(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x if torch.rand(()) < 0.5 else 2 * x


def seeded_noise(m: Any, x: torch.Tensor) -> torch.Tensor:
    """It answers the same each time, and changes the random state of the whole process for that."""
    torch.manual_seed(0)
    return x + torch.randn(4, 1, 1, dtype=x.dtype)


ALWAYS = {
    "noise": lambda m, x: x + 0.1 * torch.randn_like(x),
    "monte_carlo_dropout": lambda m, x: F.dropout(x, 0.5, True),
    "drop_block": drop_block_always,
    "cutout": cutout_always,
    "layer_skipped": layer_skipped_always,
    "seeded_noise": seeded_noise,
}

CHANCE = [
    Trap("identity_subclass", lambda: after(Scaling()), IMAGE, {**ONE, "mul": 0}),
    Trap("classical_dropout_subclass", lambda: after(Halving(0.3)), IMAGE, {**ONE, "mul": 0, "dropout": 0}),
    Trap("dropout_of_everything", lambda: after(Lambda(lambda m, x: x + F.dropout(x, 1.0, True))), IMAGE),
    Trap("idle_function_kept_whole", lambda: after(Lambda(lambda m, x: idle(x, m.training))), IMAGE, ONE),
    Trap("idle_by_values_only", lambda: after(Lambda(lambda m, x: damped(x))), IMAGE, {"conv": 1, "bn": 1}),
    Trap("idle_in_name_only", lambda: after(Lambda(lambda m, x: grown(x))), IMAGE),
    Trap(
        "random_numbers_nobody_reads",
        lambda: after(Lambda(lambda m, x: (torch.rand_like(x), torch.rand(3), x)[2])),
        IMAGE,
        {**ONE, "dropout": 0},
    ),
    *(Trap(f"{name}_always", lambda f=f: after(Lambda(f)), IMAGE, may_refuse=True) for name, f in ALWAYS.items()),
]
