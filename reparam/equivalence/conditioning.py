"""A second look at what fails by little: is it the candidate that is wrong, or the original that is ill-conditioned?

The original's rounding noise is one sample. Where a model amplifies every rounding many thousand times (attention whose
softmax is nearly a decision, say) that sample can be small by luck, and float32 tells little about float64 once its
noise no longer grows in proportion. So before such a case is held against a candidate, the original is run again with
the operands of its products moved as other roundings would move them (`montecarlo.py`), in float64 and as it is
deployed. What that does to its answer is noise that no deployment of it can avoid.

What it excuses is bounded:

* It depends on the original only; a candidate cannot excuse itself. What it is asked besides: `decisions.py`.
* The original must repeat its answer when it is run anew, or its noise is not what was measured.
* What is exact or equal in it stays so where it is multiplied. Where its answer jumps all the same it does so by any
  step: in float64 it must move in proportion to the step, and counts as far as it does (`CERTAIN`).
* It must amplify roundings: those in float64 `ILL_CONDITIONED` times, and those that it was seen to make
  `SEEN_AT_LEAST` times (in half precision, where noise as large as the answers cannot grow, those that float32 makes);
  of a well-conditioned original the first verdict stands.
* What its deployment shows counts as far as float64 lets expect it (`AS_EXPECTED`).
* What does not count, as of an original so chaotic that its answer leaves the range in which it moves in proportion,
  excuses nothing. But where it would explain what the candidate differs by, the verdict is that nothing can be told
  (`OutputComparison.untold`), and not that the candidate is wrong.
* Its noise is raised only in the case that failed, at most `NEAR` times; that in float64, which nothing else bounds,
  `MOST_LUCK` times, or where float32 cannot tell it, to `LOUDEST` of the answer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from reparam.equivalence.cases import Case
from reparam.equivalence.comparison import CaseResult
from reparam.equivalence.decisions import with_decisions
from reparam.equivalence.gather import Ran
from reparam.equivalence.judge import Spread
from reparam.equivalence.measure import AT_ITS_CEILING, FOLD_ROUNDINGS
from reparam.equivalence.measured import Measured
from reparam.equivalence.metrics import relative
from reparam.equivalence.outputs import Flat, identical
from reparam.equivalence.precision import PrivateCopy, first_line
from reparam.equivalence.redrawn import DEPLOYED_DRAWS, DRAWS, noises_of, root_mean_square
from reparam.equivalence.session import Noises, Session

LONGEST, SHORTEST, FURTHEST = 2.0**10, 2.0**6, 1e-2
"""The step, in halves of a unit in the last place, that tells jumps in float64 from what moves in proportion: as long
as may be, but by so much of itself the answer must move at most, or it leaves the range in which it does. One shorter
than the second tells nothing."""
PROPORTION = 2.0 / 3.0
"""By the step to this power the answer must move further, at least. The RMS of so few draws varies by a factor of
four."""
CERTAIN = 2.5
"""How many times the RMS of the deployed runs their noise is, at least; the largest of them counts where that is more.
Where one direction dominates, the noise of a run is a single normal number however many outputs it moves. Such a one is
more than twice another in 30% of all cases, and more than twice 2.5 times the RMS of twenty others in 0.007% (Student's
distribution)."""
AS_EXPECTED = 4.0
"""How many times the noise in float64, in proportion, that in the deployment dtype may be; what is more is no rounding
that is amplified."""
ILL_CONDITIONED, SEEN_AT_LEAST = 100.0, 10.0
"""How many times larger than the roundoff the RMS error of an output is, over its own RMS, from which on the noise that
was measured is not relied upon: in float64, by the largest of several draws; and as the one sample that was seen, which
may be small by luck."""
NEAR = 1024.0
"""How many times its bar an error may be that is looked at again, and how many times its noise is raised at most. A
sample may be small by more than a lucky draw: an original that amplifies roundings a million times, and whose answers
in float32 differ by anything up to a third, was seen to repeat itself to a thousandth on one of its inputs.
What float64 lets expect bounds what is excused."""
MOST_LUCK = 32.0
"""How many times smaller than the noise in float64 a sample of it may have been."""
LOUDEST = 1e-4
"""Up to what part of the answer the noise in float64 is believed where that in float32 cannot grow any more, so that no
bound follows from it: a third of the answer is noise in float32 whether roundings are amplified a million times or a
thousand million times."""


def looked_at_again(
    session: Session,
    original: nn.Module,
    deployed: nn.Module,
    ran: Sequence[Ran],
    results: Sequence[CaseResult],
) -> list[Ran]:
    """`ran`, with the noise of cases that failed by little measured anew where the original is ill-conditioned.

    Args:
        session: counts what it costs.
        original: what the truth is computed with, in any dtype.
        deployed: the original as it is deployed.
        ran, results: of the same cases: what was measured, and what came of it.
    """
    if session.original64 is None:
        return list(ran)
    pairs = zip(ran, results, strict=True)
    return [
        _looked_at(session, original, deployed if _is_noisy(result) else None, one, one.case, one.truth)
        if one.case is not None and one.truth is not None and _is_near(result, one)
        else one
        for one, result in pairs
    ]


def _is_near(result: CaseResult, ran: Ran) -> bool:
    """Whether it failed by little; how far float64 is off counts only where float32 tells what its noise is."""
    loud = {one.figures.name for one in ran.measured if _is_at_its_ceiling(one)}
    ratios = [one.numeric_ratio or 0.0 if one.name in loud else one.worst_ratio for one in result.outputs]
    far = max(ratios, default=0.0) > NEAR
    return bool(result.failures) and not far and any(one.worst_ratio > 1.0 for one in result.outputs)


def _is_at_its_ceiling(one: Measured) -> bool:
    """Whether the answers are noise in float32 already, which then cannot grow in proportion to what is amplified."""
    return one.amplified * torch.finfo(torch.float32).eps >= AT_ITS_CEILING


def _is_noisy(result: CaseResult) -> bool:
    """Whether it failed as deployed, and not in float64 alone."""
    return any((output.numeric_ratio or 0.0) > 1.0 for output in result.outputs)


def _looked_at(
    session: Session, original: nn.Module, deployed: nn.Module | None, ran: Ran, case: Case, truth: Flat
) -> Ran:
    try:
        exact = PrivateCopy(original, "original", torch.float64)
        if not identical(session.call(exact, case, torch.float64), truth):
            return ran
        found = noises_of(session, exact, torch.float64, ran, case, truth, DRAWS)
        ran = replace(ran, measured=tuple(_with_most(one, found.get(one.figures.name, [])) for one in ran.measured))
        seen, wide = _in_proportion(session, exact, ran, case, truth, found)
        ill = {one.figures.name for one in ran.measured if _is_ill_conditioned(one, seen.get(one.figures.name, []))}
        if not ill:
            return ran
        narrow: Noises = {}
        narrowed = None if deployed is None else PrivateCopy(deployed, "original")
        if narrowed is not None and session.rules.dtype != torch.float64:
            narrow = noises_of(session, narrowed, None, ran, case, truth, DEPLOYED_DRAWS)
        measured = [_with(one, narrow, wide) if one.figures.name in ill else one for one in ran.measured]
        return with_decisions(session, narrowed, replace(ran, measured=tuple(measured)), case, truth, narrow, ill)
    except Exception as error:  # operators that cannot be watched, outputs that cannot be compared
        session.notes.append(f"{case.name}: the original's noise could not be measured anew ({first_line(error)})")
        return ran


def _with_most(one: Measured, noises: Sequence[Spread]) -> Measured:
    return replace(one, at_most=functools.reduce(Spread.larger, noises)) if noises else one


def _in_proportion(
    session: Session, exact: PrivateCopy, ran: Ran, case: Case, truth: Flat, found: Noises
) -> tuple[Noises, Noises]:
    """Of `found` in float64, those of the outputs that move in proportion to the step; and what of them counts.

    Those tell how much the roundings of all operations are amplified, of which the operands that move are a part.
    """
    moves = {
        one.figures.name: relative(_rms(found[one.figures.name]), one.truth.rms)
        for one in ran.measured
        if one.truth is not None and one.figures.name in found
    }
    longest = {name: min(LONGEST, FURTHEST / move) for name, move in moves.items() if move > 0.0}
    step = min((step for step in longest.values() if step >= SHORTEST), default=0.0)
    if not step:
        return {}, {}
    further = noises_of(session, exact, torch.float64, ran, case, truth, DRAWS, step)
    seen = {
        name: found[name]
        for name in further
        if longest.get(name, 0.0) >= SHORTEST and _grows(found[name], further[name], step)
    }
    return seen, {name: _without_jumps(noises, further[name], step) for name, noises in seen.items()}


def _grows(found: Sequence[Spread], further: Sequence[Spread], step: float) -> bool:
    """Whether the answer moves by about as many times more as the operands do, and not as far by any step."""
    return math.pow(step, PROPORTION) <= _rms(further) / _rms(found) <= math.pow(step, 1.0 / PROPORTION)


def _without_jumps(found: Sequence[Spread], further: Sequence[Spread], step: float) -> list[Spread]:
    """The noises, no larger than the longer step lets expect: in that a jump is nothing."""
    most = CERTAIN * _rms(further) / step
    return [noise.scaled(min(1.0, relative(most, noise.rms))) for noise in found]


def _rms(noises: Sequence[Spread]) -> float:
    return math.sqrt(sum(noise.rms**2 for noise in noises) / len(noises))


def _is_ill_conditioned(one: Measured, noises: Sequence[Spread]) -> bool:
    """Whether both the roundings in float64 and those that were seen are amplified."""
    if one.truth is None or not noises:
        return False
    amplified = max(relative(noise.rms, one.truth.rms) for noise in noises) / torch.finfo(torch.float64).eps
    return amplified >= ILL_CONDITIONED and one.amplified >= SEEN_AT_LEAST


def _with(before: Measured, narrow: Noises, wide: Noises) -> Measured:
    """The measurement with the larger noise, its figures, and a note on both."""
    name = before.figures.name
    # The weights of a candidate in float64 were rounded more than once, and the factor of a channel coherently.
    folded = [noise.scaled(FOLD_ROUNDINGS) for noise in wide[name]]
    most = MOST_LUCK
    if _is_at_its_ceiling(before) and before.truth is not None and before.algebra is not None:
        most = max(most, relative(LOUDEST * before.truth.rms, before.algebra[1].rms))
    after = replace(
        before,
        numeric=_raised(before.numeric, _deployed(narrow.get(name, []), wide[name], before.dtype), NEAR),
        algebra=_raised(before.algebra, folded, most),
    )
    assert after.truth is not None
    figures, found = after.figures, []
    for dtype, old, new in (
        (figures.dtype, before.numeric, after.numeric),
        ("float64", before.algebra, after.algebra),
    ):
        if old is not None and new is not None and new[1].rms > old[1].rms:
            noise, allowed = (relative(pair[1].rms, after.truth.rms) for pair in (new, old))
            found.append(f"{noise:.2g} in {dtype} (allowed for was {allowed:.2g})")
    if not found:
        return after
    if after.numeric is not None:
        figures = replace(
            figures, original_noise=max(figures.original_noise, relative(after.numeric[1].rms, after.truth.rms))
        )
    note = (
        f"{name}: the original is ill-conditioned, so its noise was measured with other roundings of what it "
        f"multiplies, too: {' and '.join(found)}"
    )
    return replace(after, figures=replace(figures, notes=(*figures.notes, note)))


def _deployed(noises: Sequence[Spread], wide: Sequence[Spread], dtype: torch.dtype) -> list[Spread]:
    """The noises that count: those that were seen, and what is `CERTAIN` of them together."""
    together = [root_mean_square(noises).scaled(CERTAIN)] if noises else []
    return [_as_expected(noise, wide, dtype) for noise in (*noises, *together)]


def _as_expected(noise: Spread, wide: Sequence[Spread], dtype: torch.dtype) -> Spread:
    """The noise, without what is more than those in float64 let expect."""
    steps = torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
    most = AS_EXPECTED * steps * max(other.rms for other in wide)
    return noise.scaled(min(1.0, relative(most, noise.rms)))


def _raised(pair: tuple[Spread, Spread] | None, noises: Sequence[Spread], most: float) -> tuple[Spread, Spread] | None:
    """The pair with the largest noise, which is at most `most` times what it was."""
    if pair is None:
        return None
    error, known = pair
    noise = known
    for other in noises:
        noise = noise.larger(other.scaled(min(1.0, relative(most * known.rms, other.rms))))
    return error, noise
