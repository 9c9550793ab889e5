"""Maps of a part of the channels: what concatenating, slicing and permuting channels do to affine maps.

With `E` the embedding of some channels into more, and `S` the selection of some channels out of more:

    cat(A(x), B(y)) = E_1 A(x) + E_2 B(y)        S(A(x)) = A'(x), A' = the selected rows of W and b
    B(E_1 y) = B'(y), B' = the columns of W that y stands in        P(A(x)) = A'(x), rows permuted

Rows and columns of a grouped map are taken without filling in zeros: the result is again grouped, and reads (or writes)
only the channels of the groups that it touches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from reparam.algebra.affine import AffineMap, Geometry, Inexact
from reparam.algebra.compose import regrouped
from reparam.algebra.deferred import Deferred
from reparam.algebra.sources import identity

Window = tuple[int, int]
"""Channels `start` up to, not including, `stop`."""

_ACROSS = Inexact("the channels are divided in the middle of a group")


@dataclass(frozen=True)
class Part:
    """Some rows or columns of a map.

    Attributes:
        map: what remains of the map.
        other: the window of channels that remain on its other side.
    """

    map: AffineMap
    other: Window


def rows(f: AffineMap, window: Window) -> Part | Inexact:
    """The outputs `window` of `f`; `other` are the inputs they depend on."""
    return _part(f, window, out=True)


def columns(f: AffineMap, window: Window) -> Part | Inexact:
    """`f` of inputs that are zero outside of `window`; `other` are the outputs that can differ from the bias."""
    return _part(f.linear_part if f.bias is not None else f, window, out=False)


def sliced_bias(bias: Deferred | None, window: Window) -> Deferred | None:
    """The entries `window` of a bias."""
    return None if bias is None else Deferred(lambda b: b[window[0] : window[1]], bias)


def _part(f: AffineMap, window: Window, out: bool) -> Part | Inexact:
    before = f.geometry
    this, that = (before.out_channels, before.in_channels) if out else (before.in_channels, before.out_channels)
    if window == (0, this):
        return Part(f, (0, that))
    start, stop = window
    mine, other = this // before.groups, that // before.groups
    first, last = start // mine, (stop - 1) // mine
    groups = last - first + 1
    if groups > 1 and (start % mine or stop % mine):
        return _ACROSS
    found = (first * other, (last + 1) * other)
    size = (stop - start, found[1] - found[0])
    if f.is_identity:
        return Part(_identity_like(f, stop - start), found)
    geometry = replace(before, out_channels=size[0 if out else 1], in_channels=size[1 if out else 0], groups=groups)
    wanted = (start, stop) if out else (first * other, (last + 1) * other)
    inner = None if out or groups > 1 else (start - first * mine, stop - first * mine)

    def taken(weight: torch.Tensor) -> torch.Tensor:
        weight = weight[wanted[0] : wanted[1]]
        return weight if inner is None else weight[:, inner[0] : inner[1]]

    bias = sliced_bias(f.bias, wanted)
    return Part(replace(f, geometry=geometry, weight=Deferred(taken, f.weight), bias=bias), found)


def placed(f: AffineMap, row: int, out_channels: int, column: int, in_channels: int) -> AffineMap:
    """`f` as a map of `in_channels` to `out_channels` channels, its own from `column` and `row` on; bias dropped."""
    if (out_channels, in_channels) == (f.geometry.out_channels, f.geometry.in_channels):
        return f.linear_part if f.bias is not None else f
    dense = regrouped(f, 1)
    geometry = replace(dense.geometry, out_channels=out_channels, in_channels=in_channels)
    out, inner = dense.geometry.out_channels, dense.geometry.in_channels

    def wide(weight: torch.Tensor) -> torch.Tensor:
        full = weight.new_zeros(geometry.weight_shape, dtype=torch.float64)
        full[row : row + out, column : column + inner] = weight
        return full

    return AffineMap(geometry, Deferred(wide, dense.weight), has_weights=f.has_weights)


def side_by_side(maps: Sequence[AffineMap]) -> AffineMap | Inexact:
    """`cat(f_1(x_1), f_2(x_2), ...)` as one grouped map of `cat(x_1, x_2, ...)`; biases dropped.

    Every group of every map must be of one shape, and the maps of one geometry otherwise.
    """
    first = maps[0].geometry
    inner = (first.in_channels // first.groups, first.out_channels // first.groups)
    for other in (map_.geometry for map_ in maps):
        if replace(other, in_channels=1, out_channels=1, groups=1) != replace(
            first, in_channels=1, out_channels=1, groups=1
        ) or inner != (other.in_channels // other.groups, other.out_channels // other.groups):
            return Inexact("the parts differ in shape, so that no grouped layer is all of them")
    groups = sum(map_.geometry.groups for map_ in maps)
    if all(map_.is_identity for map_ in maps):
        return _identity_like(maps[0], groups)
    geometry = replace(first, in_channels=groups * inner[0], out_channels=groups * inner[1], groups=groups)
    weight = Deferred(lambda *weights: torch.cat(weights), *(map_.weight for map_ in maps))
    return AffineMap(geometry, weight, has_weights=any(map_.has_weights for map_ in maps))


def from_selection(index: Sequence[int], in_channels: int, device: torch.device | str = "cpu") -> AffineMap:
    """Output channel `i` is input channel `index[i]`: a permutation, a repetition, every second channel.

    Raises:
        ValueError: an index is out of range.
    """
    if not index or not all(0 <= i < in_channels for i in index):
        raise ValueError(f"channels {list(index)} are not all in 0 .. {in_channels - 1}")

    def weight() -> torch.Tensor:
        chosen = torch.zeros(len(index), in_channels, dtype=torch.float64, device=device)
        chosen[torch.arange(len(index), device="cpu"), torch.tensor(index, device="cpu")] = 1
        return chosen

    return AffineMap(Geometry(in_channels, len(index)), Deferred(weight), has_weights=False)


def repeated(f: AffineMap, times: int) -> AffineMap:
    """A map that scales each channel alone, for channels that each became `times` neighbouring ones; bias dropped.

    Raises:
        ValueError: `f` mixes channels or positions.
    """
    if times == 1:
        return f
    if not f.geometry.is_diagonal:
        raise ValueError("only a map that scales each channel alone can be repeated")
    channels = f.geometry.in_channels * times
    if f.is_identity:
        return _identity_like(f, channels)
    weight = Deferred(lambda w: w.repeat_interleave(times, 0), f.weight)
    return AffineMap(Geometry(channels, channels, channels), weight, has_weights=f.has_weights)


def _identity_like(f: AffineMap, channels: int) -> AffineMap:
    ones = Deferred(lambda w: torch.ones(channels, 1, dtype=torch.float64, device=w.device), f.weight)
    return replace(identity(channels), weight=ones)
