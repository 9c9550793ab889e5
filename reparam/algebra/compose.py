"""Composition and addition of affine maps. Each returns a map, or the `Inexact` reason why there is none.

`then(f, g)`, from the definition of `f` (kernel `k1`, stride `s1`, dilation `d1`, padding `p1`) and `g`:

    g(f(x))[i] = sum_{k2, k1} W2[k2] W1[k1] X[s1*s2*i + (s1*d2*k2 + d1*k1) - (s1*p2 + p1)] + b2 + sum_{k2} W2[k2] b1

so strides multiply, paddings add as `s1*p2 + p1` on both sides (which keeps the output size for *every* input size,
since `floor(floor(a/s1)/s2) = floor(a/(s1*s2))`), and the taps lie on a lattice of pitch `gcd(s1*d2, d1)`.

`plus(f, g)` needs equal strides and output sizes; kernels are aligned by their offset `-p_low` and embedded in the
smallest enclosing window. Groups become `gcd` of both and no coarser.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from math import gcd

import torch

from reparam.algebra.affine import AffineMap, Geometry, Inexact
from reparam.algebra.borders import crossing
from reparam.algebra.deferred import Deferred, RowWise, scaled_rows
from reparam.lazy import row_blocks, widened


def then(f: AffineMap, g: AffineMap) -> AffineMap | Inexact:
    """The map `x -> g(f(x))`.

    Raises:
        ValueError: `g` does not take as many channels as `f` gives, or the ranks differ and neither is 0.
    """
    if f.geometry.out_channels != g.geometry.in_channels:
        raise ValueError(f"{f.geometry.out_channels} channels do not fit a map of {g.geometry.in_channels}")
    if f.is_identity:
        return g
    if g.is_identity:
        return f
    rank = max(f.geometry.rank, g.geometry.rank)
    f, g = f.with_rank(rank), g.with_rank(rank)
    inexact = crossing(f, g)
    if inexact is not None:
        return inexact
    geometry = _then_geometry(f.geometry, g.geometry)
    first, second = f.geometry, g.geometry
    if second.groups == second.in_channels == second.out_channels and second.weight_shape[1:] == (1,) * (rank + 1):
        return AffineMap(geometry, scaled_rows(f.weight, g.weight, geometry.weight_shape), carried_bias(f.bias, g))
    if f.geometry.groups == f.geometry.in_channels == f.geometry.out_channels == math.prod(f.geometry.weight_shape):
        return AffineMap(geometry, _scaled_columns(g, f.weight), carried_bias(f.bias, g))
    weight = Deferred(lambda w1, w2: _then_weight(first, second, geometry, w1, w2), f.weight, g.weight)
    return AffineMap(geometry, weight, carried_bias(f.bias, g))


def plus(f: AffineMap, g: AffineMap) -> AffineMap | Inexact:
    """The map `x -> f(x) + g(x)`.

    Raises:
        ValueError: the channel counts differ, or the ranks differ and neither is 0.
    """
    channels = (f.geometry.in_channels, f.geometry.out_channels)
    if channels != (g.geometry.in_channels, g.geometry.out_channels):
        raise ValueError(f"maps of {f.geometry} and {g.geometry} cannot be added")
    rank = max(f.geometry.rank, g.geometry.rank)
    f, g = f.with_rank(rank), g.with_rank(rank)
    geometry = _plus_geometry(f.geometry, g.geometry)
    if isinstance(geometry, Inexact):
        return geometry
    first, second = f.geometry, g.geometry

    def added(w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return _embedded(first, geometry, w1) + _embedded(second, geometry, w2)

    weight = RowWise(added, geometry.weight_shape, (_in_groups(f, geometry.groups), _in_groups(g, geometry.groups)))
    return AffineMap(geometry, weight, added_bias(f.bias, g.bias))


def regrouped(f: AffineMap, groups: int) -> AffineMap:
    """The same map with coarser groups; `groups` must divide its own."""
    return AffineMap(replace(f.geometry, groups=groups), _in_groups(f, groups), f.bias)


def _in_groups(f: AffineMap, groups: int) -> Deferred:
    """The weight of `f`, spread over blocks of `groups` groups."""
    before = f.geometry.groups
    return f.weight if groups == before else Deferred(lambda w: _regrouped_weight(w, before, groups), f.weight)


def added_bias(a: Deferred | None, b: Deferred | None) -> Deferred | None:
    """The sum of two biases, None standing for zero."""
    if a is None or b is None:
        return b if a is None else a
    return Deferred(_cancelled_sum, a, b)


def _cancelled_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a + b`, exactly zero where nothing but rounding is left: `y - c` and `y` with the shift `c` are such a pair."""
    total = a.to(torch.float64) + b
    noise = 8 * torch.finfo(torch.float64).eps * torch.maximum(a.abs(), b.abs())
    return torch.where(total.abs() <= noise, 0.0, total)


def _then_geometry(first: Geometry, second: Geometry) -> Geometry:
    kernel, dilation = [], []
    for axis in range(first.rank):
        outer = first.stride[axis] * second.dilation[axis]
        inner = first.dilation[axis]
        reach = outer * (second.kernel[axis] - 1) + inner * (first.kernel[axis] - 1)
        pitch = gcd(outer if second.kernel[axis] > 1 else 0, inner if first.kernel[axis] > 1 else 0) or 1
        kernel.append(reach // pitch + 1)
        dilation.append(pitch)
    padding = tuple(
        (s * low2 + low1, s * high2 + high1)
        for s, (low1, high1), (low2, high2) in zip(first.stride, first.padding, second.padding, strict=True)
    )
    return Geometry(
        first.in_channels,
        second.out_channels,
        gcd(first.groups, second.groups),
        tuple(kernel),
        tuple(s1 * s2 for s1, s2 in zip(first.stride, second.stride, strict=True)),
        tuple(dilation),
        tuple(u1 * u2 for u1, u2 in zip(first.upsampling, second.upsampling, strict=True)),
        padding,
        second.padding_mode if second.is_padded else first.padding_mode,
    )


def _then_weight(
    first: Geometry, second: Geometry, result: Geometry, w1: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """`W[o, c, s1*d2*k2 + d1*k1] += sum_m W2[o, m, k2] W1[m, c, k1]`, blockwise over the groups."""
    groups = result.groups
    w1, w2 = w1.to(torch.float64), w2.to(torch.float64)
    w1 = _blocks(_regrouped_weight(w1, first.groups, groups), groups)
    w2 = _blocks(_regrouped_weight(w2, second.groups, groups), groups)
    flat = w1.reshape(*w1.shape[:3], -1)
    if w2[0, 0, 0].numel() == 1:
        product = torch.einsum("gom,gmck->gock", w2.reshape(w2.shape[:3]), flat)
        return product.reshape(result.weight_shape)
    out = w1.new_zeros((*w2.shape[:2], w1.shape[2], *result.kernel))
    # The pitch divides a step or a dilation only where its kernel has more than one tap; elsewhere neither matters.
    steps = [s * d // pitch for s, d, pitch in zip(first.stride, second.dilation, result.dilation, strict=True)]
    inner = [max(d // pitch, 1) for d, pitch in zip(first.dilation, result.dilation, strict=True)]
    for tap in itertools.product(*map(range, second.kernel)):
        window = tuple(
            slice(step * k2, step * k2 + pitch * (k1 - 1) + 1, pitch)
            for step, k2, pitch, k1 in zip(steps, tap, inner, first.kernel, strict=True)
        )
        term = torch.einsum("gom,gmck->gock", w2[(slice(None),) * 3 + tap], flat)
        out[(slice(None),) * 3 + window] += term.reshape((*out.shape[:3], *first.kernel))
    return out.reshape(result.weight_shape)


def carried_bias(bias: Deferred | None, g: AffineMap) -> Deferred | None:
    """The shift behind `g` of what had the shift `bias` in front of it, where that is one shift for all positions."""
    if bias is None:
        return g.bias
    groups = g.geometry.groups

    def carried(b1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        b1 = b1.to(torch.float64).reshape(groups, -1)
        sums = _blocks(w2, groups)
        out = b1.new_empty(sums.shape[:2])
        for block in row_blocks((sums.shape[1], groups, *sums.shape[2:])):
            part = widened(sums[:, block], torch.float64)
            out[:, block] = torch.einsum("gom,gm->go", part.reshape(*part.shape[:3], -1).sum(-1), b1)
        return out.reshape(-1)

    return added_bias(Deferred(carried, bias, g.weight), g.bias)


def _plus_geometry(first: Geometry, second: Geometry) -> Geometry | Inexact:
    if first.stride != second.stride or first.upsampling != second.upsampling:
        return Inexact("the branches differ in stride")
    if any(first.size_offset(axis) != second.size_offset(axis) for axis in range(first.rank)):
        return Inexact("the branches' output sizes agree for some input sizes only")
    modes = {geometry.padding_mode for geometry in (first, second) if geometry.is_padded}
    if len(modes) > 1:
        return Inexact(f"the branches pad differently ({' and '.join(sorted(modes))})")
    kernel, dilation, padding = [], [], []
    for axis in range(first.rank):
        lows = [geometry.padding[axis][0] for geometry in (first, second)]
        reaches = [geometry.dilation[axis] * (geometry.kernel[axis] - 1) for geometry in (first, second)]
        low = max(lows)
        reach = max(r - p for r, p in zip(reaches, lows, strict=True)) + low
        pitch = gcd(lows[0] - lows[1], *(g.dilation[axis] for g in (first, second) if g.kernel[axis] > 1)) or 1
        kernel.append(reach // pitch + 1)
        dilation.append(pitch)
        padding.append((low, first.size_offset(axis) + reach - low))
    return Geometry(
        first.in_channels,
        first.out_channels,
        gcd(first.groups, second.groups),
        tuple(kernel),
        first.stride,
        tuple(dilation),
        first.upsampling,
        tuple(padding),
        modes.pop() if modes else "zeros",
    )


def _embedded(source: Geometry, target: Geometry, weight: torch.Tensor) -> torch.Tensor:
    """The kernel of `source`, or some of its rows, at its place in the window of `target`, zero elsewhere."""
    weight = weight.to(torch.float64)
    if source.kernel == target.kernel and source.padding == target.padding:
        return weight
    window = [slice(None), slice(None)]
    for axis in range(target.rank):
        start = (target.padding[axis][0] - source.padding[axis][0]) // target.dilation[axis]
        pitch = source.dilation[axis] // target.dilation[axis] if source.kernel[axis] > 1 else 1
        window.append(slice(start, start + pitch * (source.kernel[axis] - 1) + 1, pitch))
    out = weight.new_zeros((*weight.shape[:2], *target.kernel))
    out[tuple(window)] = weight
    return out


def _blocks(weight: torch.Tensor, groups: int) -> torch.Tensor:
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])


def _scaled_columns(g: AffineMap, scale: Deferred) -> Deferred:
    """The weight of `g` behind a scale of its input channels."""
    groups, shape = g.geometry.groups, g.geometry.weight_shape

    def scaled(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        blocks = _blocks(weight, groups)
        return _product(blocks, scale.reshape(groups, 1, -1, *(1,) * (weight.ndim - 2))).reshape(weight.shape)

    return RowWise(scaled, shape, (g.weight,), (scale,)) if groups == 1 else Deferred(scaled, g.weight, scale)


def _product(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """In float64; a weight in a narrower type is promoted as it is read, without a float64 copy of it."""
    return torch.mul(weight, scale.to(torch.float64))


def _regrouped_weight(weight: torch.Tensor, groups: int, coarser: int) -> torch.Tensor:
    """Spreads a weight of `groups` groups over blocks of `coarser` ones, with zeros between the old blocks."""
    if groups == coarser:
        return weight
    merged = groups // coarser
    out, inner, *kernel = weight.shape
    blocks = weight.reshape(coarser, merged, out // groups, inner, *kernel)
    wide = weight.new_zeros((coarser, merged, out // groups, merged, inner, *kernel))
    index = torch.arange(merged, device=weight.device)
    wide[:, index, :, index] = blocks.transpose(0, 1)
    return wide.reshape(out, merged * inner, *kernel)
