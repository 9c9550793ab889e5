"""Models whose scales and shifts move to a layer that absorbs them, and models whose must not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import BATCH_NORM, CONV_TRANSPOSE, conv, in_dtype
from tests.zoo.trap import Lambda

MAX_POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
SIZES = {1: (23,), 2: (13, 17), 3: (7, 9, 8)}


@torch.no_grad()
def norm(channels: int, rank: int = 2, *, shift: bool = True, negative: int = 0, zero: int = 0) -> nn.Module:
    """A BatchNorm with random statistics whose first scales are negative, or zero."""
    made = BATCH_NORM[rank](channels)
    made.weight.uniform_(0.4, 1.6)
    made.weight[:negative] *= -1
    made.weight[:zero] = 0
    made.running_var.uniform_(0.3, 2.0)
    if shift:
        made.running_mean.normal_(0, 0.5)
        made.bias.normal_(0, 0.5)
    return made


def channels(count: int, rank: int = 2, sign: float = 1.0) -> nn.Parameter:
    """A scale for each channel, between 0.5 and 1.5, broadcast over `rank` spatial axes."""
    return nn.Parameter(sign * (torch.rand(count, *(1,) * rank) + 0.5))


class Scaled(nn.Module):
    """`x * scale + shift`, as two operations."""

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.detach().clone())
        self.shift = None if shift is None else nn.Parameter(shift.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        return x if self.shift is None else x + self.shift


@dataclass(frozen=True)
class Case:
    """A model, the shape of its input, and what is left.

    Attributes:
        left: operations by kind that must be left; kinds not named are free.
        moves: how many moves are made.
        reason: what some refusal must say; empty if none is due.
        fixed: the model takes the example's size only.
    """

    name: str
    build: Callable[[], nn.Module]
    left: dict[str, int]
    moves: int = 1
    reason: str = ""
    shape: tuple[int, ...] = (2, 3, 13, 17)
    fixed: bool = False

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
        with torch.no_grad():
            return in_dtype(model, dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        """The example, another batch size, another image size."""
        grown = (1, self.shape[1], *(size + 5 for size in self.shape[2:]))
        shapes = [self.shape, (5, *self.shape[1:]), *([] if self.fixed else [grown])]
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(copy.deepcopy(layer) for layer in layers))


def net(function: Callable[..., Any], make: Callable[[], dict[str, Any]]) -> Callable[[], nn.Module]:
    return lambda: Lambda(function, **make())


CONV_ONLY = {"conv": 1, "bn": 0, "mul": 0, "add": 0}
TWO_CONVS = {**CONV_ONLY, "conv": 2}
SHIFT_LEFT = {**CONV_ONLY, "add": 1}


def by_rank(rank: int) -> list[Case]:
    shape = (2, 3, *SIZES[rank])
    pool = MAX_POOL[rank]

    def case(name: str, left: dict[str, int], *layers: Callable[[], nn.Module]) -> Case:
        return Case(f"{name}, rank {rank}", lambda: nn.Sequential(*(make() for make in layers)), left, shape=shape)

    def make(c_in: int, c_out: int, **options: Any) -> Callable[[], nn.Module]:
        return lambda: conv(rank, c_in, c_out, 3, **options)

    return [
        case("conv, ReLU, norm", CONV_ONLY, make(3, 8), nn.ReLU, lambda: norm(8, rank, shift=False), nn.Sigmoid),
        case("conv, pool, norm", CONV_ONLY, make(3, 8), lambda: pool(2), lambda: norm(8, rank), nn.ReLU),
        case(
            "norm, pool, conv",
            CONV_ONLY,
            nn.Sigmoid,
            lambda: norm(3, rank),
            lambda: pool(3, 2, 1),
            make(3, 8, padding=0),
        ),
        case("ReLU, norm, conv", SHIFT_LEFT, nn.ReLU, lambda: norm(3, rank, negative=2), make(3, 8)),
        case("norm, pool, padded conv", SHIFT_LEFT, nn.Tanh, lambda: norm(3, rank), lambda: pool(2), make(3, 8)),
        case(
            "transposed conv, ReLU, scale",
            CONV_ONLY,
            lambda: CONV_TRANSPOSE[rank](3, 8, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU,
            lambda: Scaled(channels(8, rank)),
            nn.Sigmoid,
        ),
        case(
            "sigmoid, norm, transposed conv",
            SHIFT_LEFT,
            nn.Sigmoid,
            lambda: norm(3, rank, negative=1),
            lambda: CONV_TRANSPOSE[rank](3, 8, 3, stride=2),
        ),
    ]


def crossing(name: str, function: Callable[..., Any], **layers: Any) -> Case:
    """Backwards through one spelling of one operation."""
    return Case(
        f"conv, {name}, scale",
        net(
            lambda self, x: torch.sigmoid(function(self, self.conv(x)) * self.scale),
            lambda: {"conv": conv(2, 3, 8, 3, bias=True), "scale": channels(8), **copy.deepcopy(layers)},
        ),
        CONV_ONLY,
    )


ACCEPT = [
    *by_rank(1),
    *by_rank(2),
    *by_rank(3),
    crossing("F.relu", lambda self, x: F.relu(x)),
    crossing("F.relu inplace", lambda self, x: F.relu(x, inplace=True)),
    crossing("relu_", lambda self, x: x.relu_()),
    crossing("ReLU module inplace", lambda self, x: self.act(x), act=nn.ReLU(inplace=True)),
    crossing("clamp", lambda self, x: x.clamp(min=0)),
    crossing("clamp_min", lambda self, x: torch.clamp_min(x, 0.0)),
    crossing("abs", lambda self, x: abs(x)),
    crossing("leaky ReLU", lambda self, x: F.leaky_relu(x, 0.2)),
    crossing("leaky ReLU module", lambda self, x: self.act(x), act=nn.LeakyReLU(0.2, inplace=True)),
    crossing("leaky ReLU that is not monotone", lambda self, x: F.leaky_relu(x, -0.5)),
    crossing("randomised leaky ReLU", lambda self, x: self.act(x), act=nn.RReLU()),
    crossing("PReLU", lambda self, x: self.act(x), act=nn.PReLU()),
    crossing("PReLU by channel", lambda self, x: self.act(x), act=nn.PReLU(8)),
    crossing("F.prelu", lambda self, x: F.prelu(x, self.slope), slope=nn.Parameter(torch.linspace(-1, 2, 8))),
    crossing("F.max_pool2d", lambda self, x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
    crossing("torch.max_pool2d", lambda self, x: torch.max_pool2d(x, 3, dilation=2)),
    crossing("adaptive max pooling", lambda self, x: F.adaptive_max_pool2d(x, (3, 1))),
    crossing("amax", lambda self, x: x.amax((-1, 2), keepdim=True)),
    crossing("several", lambda self, x: F.max_pool2d(F.relu(F.max_pool2d(x, 2).abs()), 2)),
    Case(
        "maximum that drops an axis",
        net(
            lambda self, x: torch.relu(self.norm(self.conv(x).amax(2))),
            lambda: {"conv": conv(2, 3, 8, 3), "norm": norm(8, 1)},
        ),
        CONV_ONLY,
    ),
    Case(
        "forwards through a maximum that drops axes",
        net(
            lambda self, x: self.head(self.norm(torch.tanh(x)).amax((2, 3))),
            lambda: {"norm": norm(3), "head": nn.Linear(3, 4)},
        ),
        {"linear": 1, "bn": 0, "add": 0, "mul": 0},
    ),
    Case(
        "linear, ReLU, norm",
        chain(nn.Linear(6, 8), nn.ReLU(), norm(8, 1, shift=False), nn.Sigmoid()),
        {"linear": 1, "bn": 0, "mul": 0},
        shape=(4, 6),
        fixed=True,
    ),
    Case(
        "one number over the channels' maximum",
        net(lambda self, x: torch.tanh(self.conv(x).amax(1) * 0.3 - 1.7), lambda: {"conv": conv(2, 3, 8, 3)}),
        CONV_ONLY,
    ),
    Case(
        "two negative scales are a positive one",
        net(
            lambda self, x: torch.sigmoid(F.relu(self.conv(x)) * self.a / self.b),
            lambda: {"conv": conv(2, 3, 8, 3), "a": channels(8, sign=-1), "b": channels(8, sign=-1)},
        ),
        CONV_ONLY,
    ),
    Case(
        "into both branches of a sum",
        net(
            lambda self, x: torch.sigmoid(self.norm(F.relu(self.a(x) + self.b(x.tanh())))),
            lambda: {"a": conv(2, 3, 8, 3), "b": conv(2, 3, 8, 1), "norm": norm(8, shift=False)},
        ),
        {"conv": 2, "bn": 0, "mul": 0, "add": 1},
    ),
    Case(
        "into a norm that stays",
        chain(nn.Sigmoid(), norm(3), nn.ReLU(), Scaled(channels(3)), nn.Sigmoid()),
        {"bn": 0, "mul": 0, "add": 0},  # the two are one multiply-add
    ),
    Case(
        "two norms, one behind the other's pooling",
        chain(conv(2, 3, 8, 3), nn.ReLU(), norm(8, shift=False), nn.MaxPool2d(2), norm(8), nn.Sigmoid()),
        {"conv": 1, "bn": 1},  # the shift stops at the ReLU, so the second goes no further than the pooling
        moves=1,
        reason="",
    ),
    Case(
        "forwards into two readers",
        net(
            lambda self, x: self.a(y := F.relu(torch.tanh(x) * self.scale)) + self.b(y),
            lambda: {"a": conv(2, 3, 8, 3), "b": conv(2, 3, 8, 1, bias=True), "scale": channels(3)},
        ),
        {"mul": 0, "bn": 0},
    ),
    Case(
        "one layer called twice",
        net(
            lambda self, x: self.conv(F.relu(torch.tanh(x) * self.scale)).sin() + self.conv(x).cos(),
            lambda: {"conv": conv(2, 3, 8, 3), "scale": channels(3)},
        ),
        {"conv": 2, "mul": 0},
    ),
    Case(
        "one PReLU called twice",
        net(
            lambda self, x: torch.sigmoid(self.act(self.conv(x)) * self.scale) + self.act(x).sum(1, keepdim=True),
            lambda: {"conv": conv(2, 3, 8, 3), "scale": channels(8), "act": nn.PReLU()},
        ),
        {"conv": 1, "mul": 0},
    ),
    Case(
        "scale only, padding apart",
        chain(nn.GELU(), norm(3, negative=1), nn.ZeroPad2d((1, 0, 2, 1)), conv(2, 3, 8, 3, padding=0), nn.ReLU()),
        SHIFT_LEFT,
    ),
    Case(
        "scale only, grouped, with norms behind",
        chain(nn.GELU(), norm(8), conv(2, 8, 8, 3, groups=4), norm(8), nn.GELU(), norm(8), conv(2, 8, 8, 5, groups=8)),
        {"conv": 2, "bn": 0, "mul": 0, "add": 2},
        moves=2,
        shape=(2, 8, 13, 17),
    ),
    Case(
        "scale only, two readers",
        net(
            lambda self, x: self.a(y := self.norm(torch.tanh(x))).relu() + self.b(y).sigmoid(),
            lambda: {"a": conv(2, 3, 8, 3), "b": conv(2, 3, 8, 1, stride=1), "norm": norm(3)},
        ),
        {"conv": 2, "bn": 0, "mul": 0, "add": 2},
    ),
    Case(
        "scale and shift in two operations",
        chain(nn.ReLU(), Scaled(torch.tensor([-1.3]), torch.tensor([0.4])), conv(2, 3, 8, 3)),
        SHIFT_LEFT,
    ),
    Case(
        "shift alone through pooling",
        chain(nn.ReLU(), Scaled(torch.ones(1), channels(3)), nn.MaxPool2d(2), conv(2, 3, 8, 1)),
        CONV_ONLY,
    ),
]

# What the collapse makes one layer is what the scale can move to: found in a second round.
ROUNDS = [
    Case(
        "behind branches that become one layer",
        net(
            lambda self, x: torch.sigmoid(F.relu(self.conv(x) + self.skip(x)) * self.scale),
            lambda: {"conv": conv(2, 3, 3, 3), "skip": norm(3, negative=1), "scale": channels(3)},
        ),
        CONV_ONLY,
    ),
    Case(
        "in front of branches that become one layer",
        net(
            lambda self, x: self.conv(y := self.norm(x.tanh())) + y,
            lambda: {"conv": conv(2, 3, 3, 3), "norm": norm(3, negative=1)},
        ),
        SHIFT_LEFT,
    ),
    Case(
        "a shift that first stayed",
        net(
            lambda self, x: self.last(self.norm(F.max_pool2d(self.conv(x) + self.skip(x), 2))),
            lambda: {"conv": conv(2, 3, 3, 3), "skip": norm(3), "norm": norm(3), "last": conv(2, 3, 8, 3)},
        ),
        {"conv": 2, "bn": 0, "add": 0},
        moves=2,
    ),
]
ACCEPT += ROUNDS

REFUSE = [
    Case(
        "negative, ReLU",
        chain(conv(2, 3, 8, 3), nn.ReLU(), norm(8, shift=False, negative=3), nn.Sigmoid()),
        {"bn": 1},
        0,
        "its scale is negative in 3 of 8 channels, and ReLU commutes with positive scales only",
    ),
    Case(
        "negative, max pooling",
        chain(conv(2, 3, 8, 3), nn.MaxPool2d(2), norm(8, negative=1), nn.Sigmoid()),
        {"bn": 1},
        0,
        "its scale is negative in 1 of 8 channels, and max pooling commutes with positive scales only",
    ),
    Case(
        "negative, forwards",
        chain(nn.Tanh(), norm(3, negative=1), nn.MaxPool2d(2), conv(2, 3, 8, 1)),
        {"bn": 1},
        0,
        "negative in 1 of 3 channels",
    ),
    Case(
        "negative number",
        net(lambda self, x: torch.sigmoid(self.conv(x).abs() * -2.0), lambda: {"conv": conv(2, 3, 8, 3)}),
        {"mul": 1},
        0,
        "its scale is negative, and abs commutes",
    ),
    Case(
        "zero",
        chain(conv(2, 3, 8, 3), nn.ReLU(), norm(8, shift=False, zero=2), nn.Sigmoid()),
        {"bn": 1},
        0,
        "its scale is zero in 2 of 8 channels",
    ),
    Case(
        "zero, scale only",
        chain(nn.Tanh(), norm(3, zero=1), conv(2, 3, 8, 3)),
        {"bn": 1},
        0,
        "cannot cross the zero padding",
    ),
    Case(
        "shift, ReLU",
        chain(conv(2, 3, 8, 3), nn.ReLU(), norm(8), nn.Sigmoid()),
        {"bn": 1},
        0,
        "its shift cannot cross ReLU",
    ),
    Case(
        "shift, ReLU then pooling",
        chain(conv(2, 3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), norm(8), nn.Sigmoid()),
        {"bn": 1},
        0,
        "its shift cannot cross ReLU",
    ),
    Case(
        "shift, forwards",
        chain(nn.Tanh(), norm(3), nn.ReLU(), conv(2, 3, 8, 1)),
        {"bn": 1},
        0,
        "its shift cannot cross ReLU",
    ),
]

TRAPS = [
    Case(
        "a summand that is no layer",
        net(
            lambda self, x: torch.sigmoid(F.relu(self.conv(x) + x.tanh()) * self.scale),
            lambda: {"conv": conv(2, 3, 3, 3), "scale": channels(3)},
        ),
        {"conv": 1, "mul": 1, "add": 1},
        0,
    ),
    Case(
        "a summand that is only scaled",
        net(
            lambda self, x: torch.sigmoid(F.relu(self.conv(x) + x.tanh() * self.inner) * self.scale),
            lambda: {"conv": conv(2, 3, 3, 3), "scale": channels(3), "inner": channels(3)},
        ),
        {"conv": 1, "mul": 2, "add": 1},
        0,
    ),
    Case(
        "the layer has another reader",
        net(
            lambda self, x: (y := self.conv(x)).tanh() + self.norm(F.relu(y)).sigmoid(),
            lambda: {"conv": conv(2, 3, 8, 3), "norm": norm(8, shift=False)},
        ),
        {"bn": 1},
        0,
    ),
    Case(
        "the operation has another reader",
        net(
            lambda self, x: (self.norm(y := F.relu(self.conv(x))).sigmoid(), y),
            lambda: {"conv": conv(2, 3, 8, 3), "norm": norm(8, shift=False)},
        ),
        {"bn": 1},
        0,
    ),
    Case(
        "the scale has another reader, forwards",
        net(
            lambda self, x: (self.conv(F.relu(y := x.tanh() * self.scale)), y),
            lambda: {"conv": conv(2, 3, 8, 3), "scale": channels(3)},
        ),
        {"mul": 1},
        0,
    ),
    Case(
        "one reader does not absorb",
        net(
            lambda self, x: self.conv(y := self.norm(x.tanh())) + y.sigmoid().sum(1, keepdim=True),
            lambda: {"conv": conv(2, 3, 8, 3), "norm": norm(3)},
        ),
        {"bn": 1},
        0,
    ),
    Case(
        "ReLU6 is not homogeneous",
        chain(conv(2, 3, 8, 3), nn.ReLU6(), Scaled(channels(8)), nn.Sigmoid()),
        {"mul": 1},
        0,
    ),
    Case(
        "clamp with two ends",
        net(
            lambda self, x: torch.sigmoid(self.conv(x).clamp(0, 1) * self.scale),
            lambda: {"conv": conv(2, 3, 8, 3), "scale": channels(8)},
        ),
        {"mul": 1},
        0,
    ),
    Case(
        "clamp at one",
        net(
            lambda self, x: torch.sigmoid(self.conv(x).clamp(min=1) * self.scale),
            lambda: {"conv": conv(2, 3, 8, 3), "scale": channels(8)},
        ),
        {"mul": 1},
        0,
    ),
    Case(
        "GELU is not homogeneous", chain(conv(2, 3, 8, 3), nn.GELU(), Scaled(channels(8)), nn.Sigmoid()), {"mul": 1}, 0
    ),
    Case(
        "the maximum is over the scale's axis",
        net(
            lambda self, x: self.conv(F.max_pool2d((x.tanh() * self.scale).transpose(1, 2), 2)),
            lambda: {"conv": conv(2, 4, 8, 3), "scale": nn.Parameter(torch.rand(1, 1, 1, 4) + 0.5)},
        ),
        {"mul": 1},
        0,
        shape=(2, 3, 4, 4),
        fixed=True,
    ),
    Case(
        "channels of the linear layer are not the norm's",
        chain(nn.Linear(6, 6), nn.MaxPool1d(2), norm(6, 1), nn.Sigmoid()),
        {"bn": 1, "linear": 1},
        0,
        shape=(2, 6, 6),
        fixed=True,
    ),
    Case(
        "channels of the linear layer are not the scale's, forwards",
        chain(nn.Tanh(), norm(6, 1, shift=False), nn.ReLU(), nn.Linear(6, 6)),
        {"bn": 1, "linear": 1},
        0,
        shape=(2, 6, 6),
        fixed=True,
    ),
    Case(
        "a maximum over channels, a scale by channel",
        net(
            lambda self, x: self.head((x.tanh() * self.scale).amax(1)),
            lambda: {"head": nn.Linear(17, 4), "scale": channels(3)},
        ),
        {"mul": 1},
        0,
        fixed=True,
    ),
    Case(
        "indices of a pooling",
        net(
            lambda self, x: (y := F.max_pool2d(self.conv(x), 2, return_indices=True), torch.sigmoid(y[0] * self.scale))[
                1
            ],
            lambda: {"conv": conv(2, 3, 8, 3), "scale": channels(8)},
        ),
        {"mul": 1},
        0,
    ),
    Case(
        "a scale computed from the input",
        net(
            lambda self, x: torch.sigmoid(
                F.relu(self.conv(x)) * x.mean((2, 3), keepdim=True).exp().amax(1, keepdim=True)
            ),
            lambda: {"conv": conv(2, 3, 8, 3)},
        ),
        {"mul": 1},
        0,
    ),
    Case(
        "a scale by position",
        net(
            lambda self, x: torch.sigmoid(F.relu(self.conv(x)) * self.scale),
            lambda: {"conv": conv(2, 3, 8, 3), "scale": nn.Parameter(torch.rand(8, 13, 1) + 0.5)},
        ),
        {"mul": 1},
        0,
        fixed=True,
    ),
    Case(
        "slopes computed from the input",
        net(
            lambda self, x: torch.sigmoid(F.prelu(y := self.conv(x), y.mean((0, 2, 3))) * self.scale),
            lambda: {"conv": conv(2, 3, 8, 3), "scale": channels(8)},
        ),
        {"mul": 1},
        0,
    ),
    Case(
        "a shift far larger than its scale",
        chain(nn.Tanh(), Scaled(torch.full((1,), 1e-9), channels(3)), conv(2, 3, 8, 3)),
        {"conv": 1},
        0,
    ),
    Case(
        "batch statistics",
        net(
            lambda self, x: self.conv(F.max_pool2d(F.batch_norm(x.tanh(), None, None, training=True), 2)),
            lambda: {"conv": conv(2, 3, 8, 1)},
        ),
        {"bn": 1},
        0,
        "statistics of its batch",
    ),
    Case(
        "the shift in front of a padded conv belongs to a shared layer",
        net(
            lambda self, x: self.a(y := self.norm(self.first(x))) + self.b(y.sigmoid()),
            lambda: {"first": conv(2, 3, 8, 3), "norm": norm(8), "a": conv(2, 8, 8, 3), "b": conv(2, 8, 8, 3)},
        ),
        {"bn": 0},
        0,
    ),
]

ALL = [*ACCEPT, *REFUSE, *TRAPS]


def by_name(case: Case) -> str:
    return case.name
