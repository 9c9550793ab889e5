"""Are two float64 tensors one, computed in two ways? The judge of a rewrite where it stands.

The bar is that of the algebra, `ALGEBRA_TOLERANCE` of the scale of the whole and of every slice. Where a difference
exceeds it, the tensor may be the small rest of large terms that cancel; so what float64 rounding does to it is measured
then, and allowed besides, by the rule in `judge.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from reparam.equivalence import metrics
from reparam.equivalence.comparison import Location
from reparam.equivalence.judge import judge, spread
from reparam.equivalence.measured import ALGEBRA_TOLERANCE, NOISE_FACTOR
from reparam.equivalence.nonfinite import same_nonfinite

# More than this share of a tensor is no rounding of float64 that any model could be deployed with.
_MOST_ROUNDING = 1e-3

Noise = Callable[[], "torch.Tensor | None"]


@dataclass(frozen=True)
class Difference:
    """How two values differ that should be one.

    Attributes:
        error: the largest difference over the largest value of the tensor; infinite where that cannot be said.
        shape: of the tensor.
        worst_index: of the element with the largest difference.
        worst_location: whether that lies at a border of the dims behind batch and channel.
        what: the same in words.
    """

    error: float
    shape: tuple[int, ...] = ()
    worst_index: tuple[int, ...] = ()
    worst_location: Location = "no spatial dims"
    what: str = ""


def difference(before: Any, after: Any, noise: Noise = lambda: None) -> Difference | None:
    """How `after` differs from `before`; None if they are one, but for rounding.

    Args:
        before, after: tensors in float64 (or of integers or booleans, which must be equal), other values, or any
            nesting of these.
        noise: called if need be: what a rounding of float64, once in each operation, does to `before`; None if that
            is not known. Of a nesting, to its only tensor.
    """
    ours, spec = pytree.tree_flatten(before)
    theirs, other = pytree.tree_flatten(after)
    if spec != other:
        return Difference(float("inf"), what="it has another structure")
    noise = noise if len(ours) == 1 else lambda: None
    found = (_of_leaves(a, b, noise) for a, b in zip(ours, theirs, strict=True))
    return next((one for one in found if one is not None), None)


def _of_leaves(a: Any, b: Any, noise: Noise) -> Difference | None:
    if a is b:
        return None
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return _of_tensors(a.detach(), b.detach(), noise)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return Difference(float("inf"), what="one is a tensor and the other is none")
    if isinstance(a, float) and isinstance(b, (int, float)):
        mine, theirs = torch.tensor((a, b), dtype=torch.float64, device="cpu")
        return _of_tensors(mine, theirs, noise)
    return None if a == b else Difference(float("inf"), what=f"{a!r:.60} is {b!r:.60}")


def _of_tensors(a: torch.Tensor, b: torch.Tensor, noise: Noise) -> Difference | None:
    if a.shape != b.shape:
        return Difference(float("inf"), tuple(a.shape), what=f"{list(a.shape)} has shape {list(b.shape)}")
    if a.is_floating_point() != b.is_floating_point() or a.is_complex() != b.is_complex():
        return Difference(float("inf"), tuple(a.shape), what=f"{a.dtype} is {b.dtype}")
    if a.is_complex():
        return _of_tensors(torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj()), lambda: None)
    if not a.numel() or torch.equal(a, b):
        return None
    if not a.is_floating_point():
        count = int((a != b).sum())
        return _named(a, (a != b).double(), float(count), f"{count} of {a.numel()} values differ")
    a, b = a.double(), b.double()
    odd = ~same_nonfinite(a, b)
    if bool(odd.any()):
        return _named(a, odd.double(), float("inf"), f"{int(odd.sum())} elements are not finite in one of both only")
    usable = a.isfinite()
    a, b = torch.where(usable, a, 0.0), torch.where(usable, b, 0.0)
    # Dividing by the scale first keeps squares in range; ratios do not notice.
    unit = float(a.abs().max()) or 1.0
    error, truth = spread((b - a) / unit), spread(a / unit)
    rules = {"factor": NOISE_FACTOR, "floor": ALGEBRA_TOLERANCE, "samples": a.numel()}
    if judge(error, error.scaled(0.0), truth, **rules).passed:  # type: ignore[arg-type]
        return None
    relative = metrics.relative(error.peak, truth.peak)
    rounding = noise() if relative <= _MOST_ROUNDING else None
    if rounding is not None and rounding.shape == a.shape:
        rounding = torch.where(usable & rounding.isfinite(), rounding / unit, 0.0)
        if judge(error, spread(rounding), truth, **rules).passed:  # type: ignore[arg-type]
            return None
    return _named(a, (b - a).abs(), relative, f"it differs by {relative:.2g} of its largest value")


def _named(like: torch.Tensor, size: torch.Tensor, error: float, what: str) -> Difference:
    index = tuple(int(i) for i in torch.unravel_index(size.argmax().cpu(), like.shape)) if like.dim() else ()
    return Difference(error, tuple(like.shape), index, metrics.location(index, tuple(like.shape)), what)
