"""Parallel maps of one input as one map: `[A; B](x) = cat(A(x), B(x))`, along the channels.

    W = [W_1; W_2; ...],    b = [b_1; b_2; ...]

Exact where all maps read the input alike: equal kernel, stride, dilation, padding, padding mode and up-sampling. A map
without a shift gets zeros if another one has a shift. Not handled: maps in groups, whose rows would have to be put in
another order; kernels of different size, which would be padded with zeros and so compute more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from reparam.algebra.affine import AffineMap, Inexact
from reparam.algebra.deferred import Deferred


def stacked(maps: Sequence[AffineMap]) -> AffineMap | Inexact:
    """The map whose channels are those of `maps`, one after the other.

    Raises:
        ValueError: there is no map.
    """
    if not maps:
        raise ValueError("there is no map to stack")
    first = maps[0].geometry
    if any(map_.geometry.groups > 1 for map_ in maps):
        return Inexact("their channels are in groups")
    for map_ in maps[1:]:
        if map_.geometry.in_channels != first.in_channels:
            return Inexact("they read different numbers of channels")
        if replace(map_.geometry, out_channels=first.out_channels) != first:
            return Inexact("they differ in kernel, stride, dilation or padding")
    if len(maps) == 1:
        return maps[0]
    geometry = replace(first, out_channels=sum(map_.geometry.out_channels for map_ in maps))
    weight = Deferred(_rows, *(map_.weight for map_ in maps))
    if all(map_.bias is None for map_ in maps):
        return AffineMap(geometry, weight)
    return AffineMap(geometry, weight, Deferred(_rows, *(map_.bias or _no_shift(map_) for map_ in maps)))


def _no_shift(map_: AffineMap) -> Deferred:
    return Deferred(lambda weight: weight.new_zeros(weight.shape[0], dtype=torch.float64), map_.weight)


def _rows(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.to(torch.float64) for part in parts])
