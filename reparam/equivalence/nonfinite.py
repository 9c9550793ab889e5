"""NaN and infinity: new ones are failures, shared ones are no evidence."""

from __future__ import annotations

import torch


def nonfinite(
    name: str, t: torch.Tensor, o: torch.Tensor, c: torch.Tensor
) -> tuple[list[str], list[str], torch.Tensor, bool]:
    """Holds a candidate's NaN and infinities against the original's.

    Args:
        name: of the output.
        t, o, c: truth, original and candidate, float64 tensors of one shape.

    Returns:
        Failures, notes, the mask of the elements that can be compared, and whether the original has any that cannot.
    """
    failures, notes = [], []
    new = ~c.isfinite() & o.isfinite()
    if bool(new.any()):
        what = "NaN" if bool(c[new].isnan().any()) else "infinity"
        failures.append(f"{name}: {what} in {count(new)} where the original is finite")
    differing = ~o.isfinite() & ~c.isfinite() & ~same_nonfinite(o, c)
    if bool(differing.any()):
        failures.append(f"{name}: {count(differing)} infinite or NaN in both models, but not the same")
    shared = ~o.isfinite() & same_nonfinite(o, c) & ~c.isfinite()
    if bool(shared.any()):
        overflow = (
            ", though they are in float64: the original itself overflows" if bool(t[shared].isfinite().all()) else ""
        )
        notes.append(f"{name}: {count(shared)} not finite in both models, and not compared{overflow}")
    rescued = ~o.isfinite() & c.isfinite()
    if bool(rescued.any()):
        notes.append(f"{name}: {count(rescued)} not finite in the original only, and not compared")
    unusable = bool((~o.isfinite()).any())
    return failures, notes, t.isfinite() & o.isfinite() & c.isfinite(), unusable


def same_nonfinite(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where both are finite, or both the same infinity, or both NaN."""
    return (a.isfinite() & b.isfinite()) | (a == b) | (a.isnan() & b.isnan())


def count(mask: torch.Tensor) -> str:
    total = int(mask.sum())
    first = [int(i) for i in mask.nonzero()[0]]
    return f"{total} of {mask.numel()} elements (first {first})"
