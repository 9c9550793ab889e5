"""The laws of the algebra, on random ranks, groups, strides, dilations, paddings and padding modes."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reparam.algebra import AffineMap, Geometry, Inexact, identity, plus, regrouped, then

SETTINGS = settings(max_examples=150, deadline=None, derandomize=True)


def numbers(geometry: Geometry, seed: int, bias: bool) -> AffineMap:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(geometry.weight_shape, generator=generator, dtype=torch.float64)
    shift = torch.randn(geometry.out_channels, generator=generator, dtype=torch.float64)
    return AffineMap.of(geometry, weight, shift if bias else None)


@st.composite
def maps(draw: st.DrawFn, rank: int, in_channels: int, pointwise: bool | None = None) -> AffineMap:
    out_channels = draw(st.sampled_from([2, 4, 6]))
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
    if any(u > 1 for u in geometry.upsampling) and geometry.padding_mode != "zeros":
        geometry = Geometry(**{**geometry.__dict__, "padding_mode": "zeros"})
    return numbers(geometry, seed, bias)


@st.composite
def chains(draw: st.DrawFn, length: int) -> tuple[list[AffineMap], torch.Tensor]:
    rank = draw(st.integers(1, 3 if length == 2 else 2))
    channels = draw(st.sampled_from([2, 4, 6]))
    size = [draw(st.integers(7, 10)) for _ in range(rank)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    x = torch.randn(1, channels, *size, generator=generator, dtype=torch.float64)
    found = []
    for _ in range(length):
        found.append(draw(maps(rank, channels)))
        channels = found[-1].geometry.out_channels
    return found, x


def runs(f: AffineMap, x: torch.Tensor) -> torch.Tensor:
    """The map's value; examples whose sizes do not work out (empty outputs, too much reflection) are dropped."""
    try:
        return f.apply(x)
    except RuntimeError:
        assume(False)
        raise


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(b.abs().max()))


@SETTINGS
@given(chains(2))
def test_then_agrees_with_running_the_two_maps(case: tuple[list[AffineMap], torch.Tensor]) -> None:
    (f, g), x = case
    expected = runs(g, runs(f, x))
    merged = then(f, g)
    assume(not isinstance(merged, Inexact))
    assert isinstance(merged, AffineMap)
    assert merged.geometry.weight_shape == tuple(merged.tensors()[0].shape)
    assert_same(merged.apply(x), expected)


@SETTINGS
@given(chains(3))
def test_then_is_associative(case: tuple[list[AffineMap], torch.Tensor]) -> None:
    (f, g, h), x = case
    left, right = then(f, g), then(g, h)
    assume(isinstance(left, AffineMap) and isinstance(right, AffineMap))
    one, other = then(left, h), then(f, right)
    assume(isinstance(one, AffineMap) and isinstance(other, AffineMap))
    assert_same(runs(one, x), runs(other, x))


@st.composite
def branches(draw: st.DrawFn) -> tuple[AffineMap, AffineMap, torch.Tensor]:
    """Two branches of one source whose output sizes agree for every input size."""
    rank = draw(st.integers(1, 3))
    f = draw(maps(rank, 4, pointwise=False))
    geometry = f.geometry
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilation = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    lows = [draw(st.integers(-1, 2)) for _ in range(rank)]
    highs = [geometry.size_offset(axis) - lows[axis] + dilation[axis] * (kernel[axis] - 1) for axis in range(rank)]
    groups = draw(st.sampled_from([g for g in (1, 2, 4) if 4 % g == 0 and geometry.out_channels % g == 0]))
    second = Geometry(
        4,
        geometry.out_channels,
        groups,
        kernel,
        geometry.stride,
        dilation,
        geometry.upsampling,
        tuple(zip(lows, highs, strict=True)),
        draw(st.sampled_from(["zeros", geometry.padding_mode])),
    )
    g = numbers(second, draw(st.integers(0, 2**20)), draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    size = [draw(st.integers(7, 9)) for _ in range(rank)]
    return f, g, torch.randn(1, 4, *size, generator=generator, dtype=torch.float64)


@SETTINGS
@given(branches())
def test_plus_agrees_with_adding_and_commutes(case: tuple[AffineMap, AffineMap, torch.Tensor]) -> None:
    f, g, x = case
    expected = runs(f, x) + runs(g, x)
    merged, swapped = plus(f, g), plus(g, f)
    assert isinstance(merged, Inexact) == isinstance(swapped, Inexact)
    assume(isinstance(merged, AffineMap) and isinstance(swapped, AffineMap))
    assert_same(merged.apply(x), expected)
    assert_same(swapped.apply(x), expected)
    assert merged.geometry.groups == swapped.geometry.groups


@SETTINGS
@given(chains(1))
def test_identity_is_neutral_and_zero_adds_nothing(case: tuple[list[AffineMap], torch.Tensor]) -> None:
    (f,), x = case
    expected = runs(f, x)
    before, after = identity(f.geometry.in_channels), identity(f.geometry.out_channels)
    assert_same(then(before, f).apply(x), expected)
    assert_same(then(f, after).apply(x), expected)
    zero = AffineMap.of(f.geometry, torch.zeros(f.geometry.weight_shape, dtype=torch.float64))
    assert_same(plus(f, zero).apply(x), expected)
    assert_same(regrouped(f, 1).apply(x), expected)


@SETTINGS
@given(st.integers(1, 3), st.integers(1, 2), st.integers(2, 12))
def test_size_formula_is_the_size(rank: int, stride: int, size: int) -> None:
    geometry = Geometry(2, 2, 1, (3,) * rank, (stride,) * rank, (1,) * rank, (1,) * rank, ((1, 0),) * rank)
    x = torch.zeros(1, 2, *(size,) * rank, dtype=torch.float64)
    assert numbers(geometry, 0, False).apply(x).shape[2:] == geometry.output_size((size,) * rank)
