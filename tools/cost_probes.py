"""What `tools/measure_costs.py` measures: single layers that set the constants, and pairs of alternatives to rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Make = Callable[[], nn.Module]

SIZES = {"small": (16, 8), "medium": (64, 28), "large": (128, 56)}
"""Channels and image size of the pairs."""
PROBED = ((16, 8), (16, 56), (64, 14), (64, 56), (256, 14), (512, 7))
"""Channels and image sizes of the layers that set the constants."""


@dataclass(frozen=True)
class Probe:
    """A layer whose output has the shape of its input, so that it can be repeated."""

    name: str
    make: Make
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Two ways to compute a region; whether their weights agree makes no difference to the clock."""

    name: str
    first: Make
    second: Make
    shape: tuple[int, ...]


class Sum(nn.Module):
    """Branches of one source, added; without a branch the source itself counts as one."""

    def __init__(self, *branches: nn.Module, skip: bool = False) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.skip = skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum."""
        total = x if self.skip else None
        for branch in self.branches:
            total = branch(x) if total is None else total + branch(x)
        assert total is not None
        return total


class Scale(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        return x * self.factor


class Double(nn.Module):
    """A tensor added to a tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum."""
        return x + x


class Mixed(nn.Module):
    """An average pooling in place of a part of its input: `x + gamma * (pool(x) - x)`."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.pool = pool(kernel)
        self.factor = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum."""
        return x + self.factor * (self.pool(x) - x)


class PadInFront(nn.Module):
    """Zero padding as an operation of its own, then a layer."""

    def __init__(self, layer: nn.Module, pads: list[int]) -> None:
        super().__init__()
        self.layer = layer
        self.pads = pads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's value on the padded input."""
        return self.layer(F.pad(x, self.pads))  # type: ignore[no-any-return]


def conv(channels: int, kernel: int | tuple[int, int], groups: int = 1, to: int | None = None) -> nn.Conv2d:
    """A convolution that keeps the image size."""
    sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (sizes[0] // 2, sizes[1] // 2)
    return nn.Conv2d(channels, to or channels, sizes, padding=padding, groups=groups)


def pool(kernel: int) -> nn.AvgPool2d:
    """An average pooling that keeps the image size and counts its padding."""
    return nn.AvgPool2d(kernel, 1, kernel // 2)


def probes() -> Iterator[Probe]:
    """The layers that set the constants."""
    for c, size in PROBED:
        shape = (1, c, size, size)
        for k in (1, 3, 5, 7):
            yield Probe(f"conv {k}x{k}", lambda c=c, k=k: conv(c, k), shape)  # type: ignore[misc]
        for k in (3, 5, 7, 11):
            yield Probe(f"depthwise {k}x{k}", lambda c=c, k=k: conv(c, k, c), shape)  # type: ignore[misc]
        for g in (2, 4, 8):
            yield Probe(f"conv 3x3, {g} groups", lambda c=c, g=g: conv(c, 3, g), shape)  # type: ignore[misc]
        for k in (3, 5, 7, 11):
            yield Probe(f"average pool {k}x{k}", lambda k=k: pool(k), shape)  # type: ignore[misc]
        yield Probe("add", Double, shape)
        yield Probe("scale", lambda c=c: Scale(c), shape)  # type: ignore[misc]
    for c, rows in ((64, 1), (512, 1), (512, 64), (64, 4096)):
        yield Probe("linear", lambda c=c: nn.Linear(c, c), (rows, c))  # type: ignore[misc]


def pairs() -> Iterator[Pair]:
    """The pairs of alternatives, at each size."""
    for label, (channels, size) in SIZES.items():
        for name, first, second in _of_images(channels):
            yield Pair(f"{name}, {label}", first, second, (1, channels, size, size))
        for rows in (1, 64):
            for name, first, second in _of_rows(8 * channels):
                yield Pair(f"{name}, {label}, {rows} rows", first, second, (rows, 8 * channels))


def _of_images(c: int) -> list[tuple[str, Make, Make]]:
    def two(first: Make, second: Make) -> Make:
        return lambda: nn.Sequential(first(), second())

    return [
        ("3x3 + 1x1 + identity | 3x3", lambda: Sum(conv(c, 3), conv(c, 1), skip=True), lambda: conv(c, 3)),
        ("three 3x3 in parallel | 3x3", lambda: Sum(conv(c, 3), conv(c, 3), conv(c, 3)), lambda: conv(c, 3)),
        ("3x3 + identity | 3x3", lambda: Sum(conv(c, 3), skip=True), lambda: conv(c, 3)),
        ("1x1 + identity | 1x1", lambda: Sum(conv(c, 1), skip=True), lambda: conv(c, 1)),
        ("depthwise 3x3 + identity | depthwise 3x3", lambda: Sum(conv(c, 3, c), skip=True), lambda: conv(c, 3, c)),
        ("depthwise 7x7 + 3x3 | depthwise 7x7", lambda: Sum(conv(c, 7, c), conv(c, 3, c)), lambda: conv(c, 7, c)),
        ("1x3 + 3x1 | 3x3", lambda: Sum(conv(c, (1, 3)), conv(c, (3, 1))), lambda: conv(c, 3)),
        ("3x3, BatchNorm | 3x3", two(lambda: conv(c, 3), lambda: nn.BatchNorm2d(c)), lambda: conv(c, 3)),
        ("BatchNorm | scale", lambda: nn.BatchNorm2d(c), lambda: Scale(c)),
        ("1x1, scale | 1x1", two(lambda: conv(c, 1), lambda: Scale(c)), lambda: conv(c, 1)),
        ("1x1, 3x3 | 3x3", two(lambda: conv(c, 1), lambda: conv(c, 3)), lambda: conv(c, 3)),
        ("1x1, depthwise 3x3 | 3x3", two(lambda: conv(c, 1), lambda: conv(c, 3, c)), lambda: conv(c, 3)),
        ("3x3, 3x3 | 5x5", two(lambda: conv(c, 3), lambda: conv(c, 3)), lambda: conv(c, 5)),
        ("1x1 to a quarter and back | 1x1", _through(c, c // 4), lambda: conv(c, 1)),
        ("1x1 to half and back | 1x1", _through(c, c // 2), lambda: conv(c, 1)),
        ("1x1 to twice and back | 1x1", _through(c, 2 * c), lambda: conv(c, 1)),
        ("3x3, 4 groups | 3x3", lambda: conv(c, 3, 4), lambda: conv(c, 3)),
        ("3x3, groups of 4 | depthwise 3x3", lambda: conv(c, 3, c // 4), lambda: conv(c, 3, c)),
        ("3x3, groups of 8 | depthwise 3x3", lambda: conv(c, 3, c // 8), lambda: conv(c, 3, c)),
        ("average pool 3x3, 1x1 | 3x3", two(lambda: pool(3), lambda: conv(c, 1)), lambda: conv(c, 3)),
        ("average pool 7x7, scale | depthwise 7x7", two(lambda: pool(7), lambda: Scale(c)), lambda: conv(c, 7, c)),
        (
            "average pool 11x11, scale | depthwise 11x11",
            two(lambda: pool(11), lambda: Scale(c)),
            lambda: conv(c, 11, c),
        ),
        ("average pool 3x3 for a part | depthwise 3x3", lambda: Mixed(c, 3), lambda: conv(c, 3, c)),
        (
            "pad, 3x3 | 3x3",
            lambda: PadInFront(nn.Conv2d(c, c, 3), [1, 1, 1, 1]),
            lambda: conv(c, 3),
        ),
    ]


def _through(c: int, inner: int) -> Make:
    return lambda: nn.Sequential(conv(c, 1, to=inner), conv(inner, 1, to=c))


def _of_rows(c: int) -> list[tuple[str, Make, Make]]:
    def through(inner: int) -> Make:
        return lambda: nn.Sequential(nn.Linear(c, inner), nn.Linear(inner, c))

    return [
        ("linear to an eighth and back | linear", through(c // 8), lambda: nn.Linear(c, c)),
        ("linear to half and back | linear", through(c // 2), lambda: nn.Linear(c, c)),
        ("two linears | linear", through(c), lambda: nn.Linear(c, c)),
        ("linear + linear to an eighth and back | linear", _adapted(c), lambda: nn.Linear(c, c)),
    ]


def _adapted(c: int) -> Make:
    low_rank: Make = lambda: nn.Sequential(nn.Linear(c, c // 8), nn.Linear(c // 8, c))  # noqa: E731
    return lambda: Sum(nn.Linear(c, c), low_rank())
