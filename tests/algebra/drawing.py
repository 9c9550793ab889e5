"""Random affine maps and images for the laws."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import Phase, assume, settings
from hypothesis import strategies as st

from reparam.algebra import AffineMap, Geometry

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True, database=None, report_multiple_bugs=False)
FIRST_FAILURE = settings(SETTINGS, phases=(Phase.explicit, Phase.generate))
"""Without shrinking: for laws that are meant to fail."""


def random(seed: int, *shape: int) -> torch.Tensor:
    """Normal numbers in float64 that depend on nothing but the seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(geometry: Geometry, seed: int, bias: bool) -> AffineMap:
    """A map of that geometry with random numbers."""
    weight, shift = random(seed, *geometry.weight_shape), random(seed + 1, geometry.out_channels)
    return AffineMap.of(geometry, weight, shift if bias else None)


@st.composite
def maps(
    draw: st.DrawFn, rank: int, in_channels: int, pointwise: bool | None = None, outputs: int | None = None
) -> AffineMap:
    """A map of rank 0 or `rank`, of any groups, stride, dilation, up-sampling, padding and padding mode."""
    out_channels = outputs or draw(st.sampled_from([2, 4, 6]))
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4, 6) if in_channels % g == 0 and out_channels % g == 0]))
    bias = draw(st.booleans())
    seed = draw(st.integers(0, 2**20))
    if pointwise or (pointwise is None and draw(st.booleans())):
        return numbers(Geometry(in_channels, out_channels, groups), seed, bias)
    axes = range(rank)
    side = st.integers(-1, 2)
    geometry = Geometry(
        in_channels,
        out_channels,
        groups,
        tuple(draw(st.integers(1, 3)) for _ in axes),
        tuple(draw(st.integers(1, 2)) for _ in axes),
        tuple(draw(st.integers(1, 2)) for _ in axes),
        tuple(draw(st.sampled_from([1, 1, 1, 2])) for _ in axes),
        tuple((draw(side), draw(side)) for _ in axes),
        draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])),
    )
    if geometry.is_transposed:
        geometry = replace(geometry, padding_mode="zeros")
    return numbers(geometry, seed, bias)


@st.composite
def chains(draw: st.DrawFn, length: int) -> tuple[list[AffineMap], torch.Tensor]:
    """Maps that follow one another, and an input of the first."""
    rank = draw(st.integers(1, 3 if length == 2 else 2))
    channels = draw(st.sampled_from([2, 4, 6]))
    size = [draw(st.integers(7, 10)) for _ in range(rank)]
    x = random(draw(st.integers(0, 2**20)), 1, channels, *size)
    found: list[AffineMap] = []
    for _ in range(length):
        found.append(draw(maps(rank, channels)))
        channels = found[-1].geometry.out_channels
    return found, x


def beside(draw: st.DrawFn, geometry: Geometry) -> AffineMap:
    """A map whose output size agrees with that of `geometry` for every input size; its kernel and groups are free."""
    axes = range(geometry.rank)
    kernel = tuple(draw(st.integers(1, 3)) for _ in axes)
    dilation = tuple(draw(st.integers(1, 3)) for _ in axes)
    lows = [draw(st.integers(-1, 2)) for _ in axes]
    highs = [geometry.size_offset(axis) - lows[axis] + dilation[axis] * (kernel[axis] - 1) for axis in axes]
    channels = (geometry.in_channels, geometry.out_channels)
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if all(c % g == 0 for c in channels)]))
    made = Geometry(
        *channels,
        groups,
        kernel,
        geometry.stride,
        dilation,
        geometry.upsampling,
        tuple(zip(lows, highs, strict=True)),
        draw(st.sampled_from(["zeros", geometry.padding_mode])),
    )
    return numbers(made, draw(st.integers(0, 2**20)), draw(st.booleans()))


@st.composite
def branches(draw: st.DrawFn, count: int) -> tuple[list[AffineMap], torch.Tensor]:
    """Branches of one source whose output sizes agree for every input size."""
    rank = draw(st.integers(1, 3))
    first = draw(maps(rank, 4, pointwise=False))
    rest = [beside(draw, first.geometry) for _ in range(count - 1)]
    size = [draw(st.integers(7, 9)) for _ in range(rank)]
    return [first, *rest], random(draw(st.integers(0, 2**20)), 1, 4, *size)


def runs(f: AffineMap, x: torch.Tensor) -> torch.Tensor:
    """The map's value; examples whose sizes do not work out (empty outputs, too much reflection) are dropped."""
    try:
        return f.apply(x)
    except RuntimeError:
        assume(False)
        raise


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to rounding in float64."""
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(b.abs().max()))
