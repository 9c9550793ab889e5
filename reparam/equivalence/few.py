"""How the noise of an original is spread over slices of a few elements each.

The noise of a slice is what the original was seen to err by there: of one feature of a flattened map, in a batch of
two, that is two samples. Of thousands of such slices some are small by luck and nearly zero by cancellation at once,
and where channels differ in scale the median of all says nothing of theirs. So before an error in such a slice is held
against a candidate, the original is run again as it is deployed, each time with other roundings, and the slice is
granted the noise that these runs show there. It lends nothing to other slices.

How large the noise is as a whole stays what the output is allowed: the noise of the further runs is scaled down to
that, so that only its distribution comes from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from reparam.equivalence.comparison import CaseResult
from reparam.equivalence.gather import Ran
from reparam.equivalence.judge import FEW_ELEMENTS, Spread
from reparam.equivalence.measured import Measured
from reparam.equivalence.metrics import relative
from reparam.equivalence.precision import PrivateCopy, first_line
from reparam.equivalence.redrawn import DEPLOYED_DRAWS, noises_of, root_mean_square
from reparam.equivalence.session import Noises, Session

FARTHEST = 64.0
"""How many times its bar an error may be that is looked at again."""
MANY = 64
"""So many slices there are at least: of fewer, chance makes one seem wrong that rarely that the first verdict stands,
which is the sharper one."""


def with_few_redrawn(
    session: Session, deployed: nn.Module, ran: Sequence[Ran], results: Sequence[CaseResult]
) -> list[Ran]:
    """`ran`, with the noise in slices of few elements measured anew, in the cases where an error exceeds its bar there.

    Args:
        session: counts what it costs.
        deployed: the original as it is deployed.
        ran, results: of the same cases: what was measured, and what came of it.
    """
    if session.original64 is None or session.rules.dtype == torch.float64:
        return list(ran)
    return [_looked_at(session, deployed, one, result) for one, result in zip(ran, results, strict=True)]


def _looked_at(session: Session, deployed: nn.Module, ran: Ran, result: CaseResult) -> Ran:
    over = {one.name for one in result.outputs if 1.0 < (one.numeric_ratio or 0.0) <= FARTHEST}
    asked = {one.figures.name for one in ran.measured if one.figures.name in over and _has_few(one)}
    if ran.case is None or ran.truth is None or not asked:
        return ran
    try:
        copy = PrivateCopy(deployed, "original")
        noises = noises_of(session, copy, None, ran, ran.case, ran.truth, DEPLOYED_DRAWS)
    except Exception as error:  # operators that cannot be watched
        why = first_line(error)
        session.notes.append(f"{ran.case.name}: the original could not be run with other roundings ({why})")
        return ran
    measured = [_with(one, noises) if one.figures.name in asked else one for one in ran.measured]
    return replace(ran, measured=tuple(measured))


def _has_few(one: Measured) -> bool:
    return one.numeric is not None and one.truth is not None and any(_few(one.truth))


def _few(whole: Spread) -> list[bool]:
    """For each axis, whether it has many slices of few elements."""
    sizes = [rms.numel() for rms, _ in whole.slices]
    return [size >= MANY and math.prod(sizes) // size < FEW_ELEMENTS for size in sizes]


def _with(one: Measured, noises: Noises) -> Measured:
    name = one.figures.name
    if one.numeric is None or not noises.get(name):
        return one
    known = one.numeric[1]
    found = root_mean_square(noises[name])
    found = found.scaled(min(1.0, relative(known.rms, found.rms)))
    none = found.scaled(0.0)
    axes = zip(_few(known), found.slices, none.slices, strict=True)
    note = (
        f"{name}: how the original's noise is spread over slices of fewer than {FEW_ELEMENTS} elements was measured "
        f"with {DEPLOYED_DRAWS} runs of it with other roundings"
    )
    return replace(
        one,
        redrawn=replace(found, slices=tuple(drawn if few else nothing for few, drawn, nothing in axes)),
        figures=replace(one.figures, notes=(*one.figures.notes, note)),
    )
