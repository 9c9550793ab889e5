"""A second look at what fails by little: is it the candidate that is wrong, or the original that is ill-conditioned?

The original's rounding noise is one sample. Where a model amplifies every rounding many thousand times (attention whose
softmax is nearly a decision, say) that sample can be small by luck, and float32 tells little about float64 once its
noise no longer grows in proportion. So before such a case is held against a candidate, the original is run in float64
with every weight moved by up to half a ULP. How far that moves its answer, in units of the roundoff, tells how it is
conditioned. From `ILL_CONDITIONED` on (or if the noise that was measured is as large) its noise is measured again, with
its weights moved, as it is deployed and in float64. No deployment can avoid that noise. This is Monte Carlo arithmetic
(Parker 1997) on the weights alone.

It depends on the original only, so that a candidate cannot excuse itself. Of a well-conditioned original the first
verdict stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import nn

from reparam.equivalence.cases import Case
from reparam.equivalence.comparison import CaseResult
from reparam.equivalence.gather import Ran
from reparam.equivalence.judge import Spread, spread
from reparam.equivalence.measured import Measured
from reparam.equivalence.metrics import relative
from reparam.equivalence.precision import moved
from reparam.equivalence.session import Session

DRAWS = 3
"""How often the weights are moved; the largest answer counts."""
ILL_CONDITIONED = 100.0
"""How many times larger than the roundoff of its weights the RMS error of an output is, over its own RMS, from which on
the noise that was measured is not relied upon. Of 18 models of timm with random weights 13 are at 3 to 90; an
efficientnet_b0 is at 150, levit_128s at 40,000."""
MOST_RATIO = 1e3
"""Errors of more than so many times their bar are faults; they are not looked at again."""


Look: TypeAlias = "tuple[torch.dtype | None, torch.dtype | None]"
"""The dtype in which the original is run (None: as deployed), and that by whose ULP its weights move (None: their own).
"""


def looked_at_again(
    session: Session, original: nn.Module, ran: Sequence[Ran], results: Sequence[CaseResult], cases: Mapping[str, Case]
) -> list[Ran]:
    """`ran`, with the noise of cases that failed by little measured anew where the original is ill-conditioned.

    Args:
        session: counts what it costs.
        original: as deployed, in any dtype.
        ran, results: of the same cases: what was measured, and what came of it.
        cases: by name.
    """
    if session.original64 is None:
        return list(ran)
    pairs = zip(ran, results, strict=True)
    return [
        _told(one, _looked_at(session, original, one, cases[one.result.name])) if _is_near(result) else one
        for one, result in pairs
    ]


def _is_near(result: CaseResult) -> bool:
    ratios = [output.worst_ratio for output in result.outputs]
    return bool(result.failures) and 1.0 < max(ratios, default=0.0) <= MOST_RATIO


def _looked_at(session: Session, original: nn.Module, ran: Ran, case: Case) -> Ran:
    wide = _noises(session, original, ran, case, (torch.float64, None))
    ill = {one.figures.name for one in ran.measured if _is_ill_conditioned(one, wide.get(one.figures.name, []))}
    if not ill:
        return ran
    narrow: dict[str, list[Spread]] = {}
    if session.rules.dtype != torch.float64:
        narrow = _noises(session, original, ran, case, (None, None))
    if session.rounded64 is not None and not session.exact:  # the candidate's weights were rounded, in float64 as well
        for name, noises in _noises(session, original, ran, case, (torch.float64, session.rules.dtype)).items():
            wide.setdefault(name, []).extend(noises)
    measured = []
    for one in ran.measured:
        name = one.figures.name
        if name in ill:
            one = replace(
                one, numeric=_larger(one.numeric, narrow.get(name, [])), algebra=_larger(one.algebra, wide[name])
            )
        measured.append(one)
    return replace(ran, measured=tuple(measured))


def _is_ill_conditioned(one: Measured, noises: Sequence[Spread]) -> bool:
    if one.truth is None or not noises:
        return False
    amplified = max(relative(noise.rms, one.truth.rms) for noise in noises) / torch.finfo(torch.float64).eps
    if one.numeric is not None:
        amplified = max(amplified, relative(one.numeric[1].rms, one.truth.rms) / torch.finfo(one.dtype).eps)
    return amplified >= ILL_CONDITIONED


def _noises(session: Session, original: nn.Module, ran: Ran, case: Case, look: Look) -> dict[str, list[Spread]]:
    """By output, the errors that the original shows with its weights moved, once for each draw."""
    found: dict[str, list[Spread]] = {}
    dtype, ulp_of = look
    for draw in range(DRAWS):
        try:
            answer = session.call(moved(original, dtype, ulp_of, session.seed + draw), case, dtype)
        except Exception:  # weights that must be what they are: nothing is known then
            return {}
        for one in ran.measured:
            assert ran.truth is not None
            truth, other = (flat.leaves.get(one.figures.name) for flat in (ran.truth, answer))
            if isinstance(truth, torch.Tensor) and isinstance(other, torch.Tensor) and other.shape == truth.shape:
                found.setdefault(one.figures.name, []).append(_noise(_double(truth), _double(other)))
    return found


def _noise(truth: torch.Tensor, answer: torch.Tensor) -> Spread:
    """Of the error, in units of the largest value of the truth, as all spreads of a `Measured` are."""
    usable = truth.isfinite() & answer.isfinite()
    unit = float(truth[usable].abs().max()) if bool(usable.any()) else 0.0
    return spread(torch.where(usable, answer - truth, 0.0) / (unit or 1.0))


def _larger(pair: tuple[Spread, Spread] | None, noises: Sequence[Spread]) -> tuple[Spread, Spread] | None:
    if pair is None:
        return None
    error, noise = pair
    for other in noises:
        noise = noise.larger(other)
    return error, noise


def _told(before: Ran, after: Ran) -> Ran:
    """`after`, with the noise that was found among the figures, and in a note."""
    pairs = zip(before.measured, after.measured, strict=True)
    return replace(after, measured=tuple(_output_told(old, new) for old, new in pairs))


def _output_told(before: Measured, after: Measured) -> Measured:
    if after is before or after.truth is None:
        return after
    figures, found = after.figures, []
    for dtype, old, new in (
        (figures.dtype, before.numeric, after.numeric),
        ("float64", before.algebra, after.algebra),
    ):
        if old is not None and new is not None and new[1].rms > old[1].rms:
            noise = relative(new[1].rms, after.truth.rms)
            found.append(f"{noise:.2g} in {dtype} (allowed for was {relative(old[1].rms, after.truth.rms):.2g})")
    if not found:
        return after
    if before.numeric is not None and after.numeric is not None:
        figures = replace(
            figures, original_noise=max(figures.original_noise, relative(after.numeric[1].rms, after.truth.rms))
        )
    note = (
        f"{figures.name}: the original is ill-conditioned, so its noise was measured with its weights moved by half a "
        f"ULP, too: {' and '.join(found)}"
    )
    return replace(after, figures=replace(figures, notes=(*figures.notes, note)))


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float64)
