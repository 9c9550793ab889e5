"""Decisions that the roundings of the deployment dtype make: a candidate that goes another way than the truth does.

Attention whose softmax all but chooses between two keys of nearly the same score picks one by what float32 rounds the
scores to. The original and the candidate then have two answers each, far apart, and which of them comes out is luck. To
call that noise would excuse every error as large as the two are apart. Instead the roundings of both are varied
(`montecarlo.py`), and what they do is compared. It was luck if

* the original now and then leaves the truth itself, and by far: none of its runs lies between those that agree with the
  truth and those that do not. (One that is noise all over shows no such gap, and comes near to any answer by chance.)
  Only then has roundings' say been seen, and not that the candidate parted what is equal in every deployment;
* wherever the candidate errs the original does so, too, in one run or another, and about as much: in the same outputs,
  and in the same slices of them. A near tie in one image says nothing of another one of the batch, nor of another
  output;
* the candidate agrees with the truth in nearly as many of its runs as the original, as a whole and in each of those
  slices; or in half as many, and in one of its own the original gives the candidate's answer.

What is imprecise, and what decides otherwise for another reason than roundings, agrees in few runs or in none. Asked is
only a candidate that errs as deployed and in nothing else: its algebra was compared and is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from reparam.equivalence.cases import Case
from reparam.equivalence.gather import Ran
from reparam.equivalence.judge import FEW_ELEMENTS, Spread, spread
from reparam.equivalence.measure import verdict
from reparam.equivalence.measured import Measured
from reparam.equivalence.metrics import relative
from reparam.equivalence.montecarlo import MovedOperands
from reparam.equivalence.outputs import Flat, double
from reparam.equivalence.precision import PrivateCopy, first_line, named_tensors
from reparam.equivalence.session import Model, Noises, Session

SOMETIMES = 0.25
"""In what part of its runs with other roundings the original must agree with the truth itself, at least."""
FEWER, AS_OFTEN = 0.25, 0.5
"""The candidate must agree in as many runs as the original, but for so large a part of all; and half as often at least.
Two that agree with equal chances differ by more in 10% of all cases at most (of two binomial numbers of twenty)."""
LARGER = 2.0
"""How many times what the original's other answers differ by in a slice the candidate may be off there: the sum of two
decisions that the original was seen to make otherwise one at a time."""
MOST = 0.5
"""Of a larger part than this of the slices of few elements in which the candidate errs the original must err, too. It
is two thirds of a thousand logits where a decision that is made otherwise changes them by three times what counts."""
APART = 3.0
"""How many times farther from the truth every other answer is, at least, than the farthest run that agrees with it."""

_Run: TypeAlias = "Sequence[Spread]"
"""How far an answer is from another, output by output."""


def with_decisions(
    session: Session, original: PrivateCopy | None, ran: Ran, case: Case, truth: Flat, noises: Noises, ill: Set[str]
) -> Ran:
    """`ran`, with the errors of outputs that went another way by luck replaced by those that show that it was luck.

    Args:
        session: runs the models, and counts what it costs.
        original: as it is deployed; None asks nothing.
        ran: the case as measured, its noise raised.
        case, truth: what is run, and the original's answer in float64.
        noises: by output, how far the original was from the truth in each of its deployed runs with moved operands
            (seeds: that of the session, and those that follow). The candidate is run as often.
        ill: the outputs whose noise was raised because the original is ill-conditioned.
    """
    failing = [one for one in ran.measured if not _passes(one, session)]
    asked = [one for one in ran.measured if one.numeric is not None]
    own = [noises.get(one.figures.name, []) for one in asked]
    if original is None or not failing or not all(own):
        return ran
    if not isinstance(session.candidate, PrivateCopy):
        return ran  # its operands cannot be moved
    if not all(one.figures.name in ill and _errs_as_deployed_alone(one, session) for one in failing):
        return ran
    tie = _Tie(session, asked, case, [list(run) for run in zip(*own, strict=True)])
    try:
        luck = tie.luck(original, truth) if tie.is_one else None
    except Exception as error:  # a candidate whose operators cannot be watched
        session.notes.append(f"{case.name}: the candidate could not be run with other roundings ({first_line(error)})")
        return ran
    if luck is None:
        return ran
    names = {one.figures.name for one in failing}
    after = {
        one.figures.name: _beside(one, error, luck.why)
        for one, error in zip(asked, luck.errors, strict=True)
        if one.figures.name in names
    }
    return replace(ran, measured=tuple(after.get(one.figures.name, one) for one in ran.measured))


@dataclass(frozen=True)
class _Luck:
    """What shows that it was luck: errors within the bar, one for each output; and a sentence."""

    errors: _Run
    why: str


class _Tie:
    """The outputs, and the runs in which the original goes one way or the other."""

    def __init__(self, session: Session, asked: Sequence[Measured], case: Case, noises: Sequence[_Run]) -> None:
        self._session, self._asked, self._case, self._noises = session, asked, case, noises
        self._measured = [one.numeric[0] for one in asked if one.numeric is not None]
        self._others = [draw for draw, errors in enumerate(noises) if not self._are_within(errors)]
        self._agreed = len(noises) - len(self._others)

    @property
    def is_one(self) -> bool:
        """Whether the original agrees with the truth sometimes at least, and else is far from it, as the candidate."""
        if not self._others or self._agreed < SOMETIMES * len(self._noises):
            return False
        near = [errors for draw, errors in enumerate(self._noises) if draw not in self._others]
        return _are_apart(near, [self._noises[draw] for draw in self._others] + [self._measured])

    def luck(self, original: PrivateCopy, truth: Flat) -> _Luck | None:
        """What shows that the candidate erred by luck; None if nothing does."""
        draws = len(self._noises)
        near, far = self._candidates_runs(truth)
        # What erred only because it was run for the first time does not repeat that after all those runs.
        answer = self._session.call(self._session.candidate, self._case, None)
        if not near or not self._is_as_measured(answer, truth):
            return None
        counts = self._right_where_it_erred(near, far)
        if counts is None:
            return None
        own, its = counts
        if bool((its < AS_OFTEN * own).any()):
            return None
        if len(near) >= self._agreed - FEWER * draws and bool((its >= own - FEWER * draws).all()):
            largest = [max(errors, key=lambda error: error.rms) for errors in zip(*near, strict=True)]
            return _Luck(
                largest, f"it agrees with the truth in {len(near)} of {draws} runs, the original in {self._agreed}"
            )
        for draw in self._others:
            apart = self._apart(answer, self._moved(original, draw))
            if apart and self._are_within(apart):
                return _Luck(apart, f"the original gives the same answer, in at least one of {draws} runs")
        return None

    def _candidates_runs(self, truth: Flat) -> tuple[list[_Run], list[_Run]]:
        """The errors of the candidate in its runs with moved operands: those that agree with the truth, and the others.

        Both are empty if the ones are not far from the others, or are fewer than count; it stops where they would be.
        """
        near: list[_Run] = []
        far: list[_Run] = []
        for draw in range(len(self._noises)):
            if len(near) + len(self._noises) - draw < AS_OFTEN * self._agreed:
                return [], []
            apart = self._apart(self._moved(self._session.candidate, draw), truth)
            if not apart:
                return [], []
            (near if self._are_within(apart) else far).append(apart)
        enough = near and len(near) >= AS_OFTEN * self._agreed
        return (near, far) if enough and _are_apart(near, [*far, self._measured]) else ([], [])

    def _right_where_it_erred(
        self, near: Sequence[_Run], far: Sequence[_Run]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """For each slice in which the candidate erred: in how many runs the original is right there, and it itself.

        None if there is none, or if the original does not err there, too, and about as much. Of slices of few elements,
        which another decision now and then leaves nearly as they were, it must do so in most.
        """
        runs = torch.stack([_sliced(errors) for errors in self._noises])
        its = torch.stack([_sliced(errors) for errors in (*near, *far)])
        agreeing = [draw for draw in range(len(runs)) if draw not in self._others]
        limit = APART * torch.maximum(runs[agreeing].amax(0), its[: len(near)].amax(0))
        measured, telling = _sliced(self._measured), _telling(self._measured)
        erred = measured > limit
        shared = (runs > limit).any(0)
        few = erred & ~telling
        if bool(few.any()) and float(shared[few].double().mean()) <= MOST:
            return None
        erred &= telling
        likewise = shared & (measured <= LARGER * runs.amax(0))
        if not bool(erred.any()) or bool((erred & ~likewise).any()):
            return None
        return (runs <= limit)[:, erred].sum(0), (its <= limit)[:, erred].sum(0)

    def _is_as_measured(self, answer: Flat, truth: Flat) -> bool:
        return [error.rms for error in self._apart(answer, truth)] == [error.rms for error in self._measured]

    def _moved(self, model: Model, draw: int) -> Flat:
        weights = list(named_tensors(model.module).values()) if isinstance(model, PrivateCopy) else []
        with MovedOperands(self._session.seed + draw, weights=weights):
            return self._session.call(model, self._case, None)

    def _apart(self, answer: Flat, other: Flat) -> list[Spread]:
        """How far two answers are apart in each of the outputs; nothing where that cannot be said of all."""
        spreads = []
        for one in self._asked:
            mine, theirs = (flat.tensors().get(one.figures.name) for flat in (answer, other))
            if mine is None or theirs is None or mine.shape != theirs.shape or one.figures.elements != mine.numel():
                return []
            error = double(mine) - double(theirs)
            if not bool(error.isfinite().all()):
                return []
            spreads.append(spread(error / one.unit))
        return spreads

    def _are_within(self, errors: _Run) -> bool:
        return all(
            _passes(replace(one, numeric=(error, one.numeric[1])), self._session)
            for one, error in zip(self._asked, errors, strict=True)
            if one.numeric is not None
        )


def _sliced(errors: _Run) -> torch.Tensor:
    """The errors of every slice of every output along each of its axes, by RMS and by peak."""
    return torch.cat([kind for error in errors for axis in error.slices for kind in axis])


def _telling(errors: _Run) -> torch.Tensor:
    """Which of those slices are an image of the batch, or of more than a few elements."""
    parts = []
    for error in errors:
        sizes = [len(rms) for rms, _ in error.slices]
        for axis, size in enumerate(sizes):
            tells = axis == 0 or math.prod(sizes) // size >= FEW_ELEMENTS
            parts.append(torch.full((2 * size,), tells, device="cpu"))
    return torch.cat(parts)


def _are_apart(near: Sequence[_Run], far: Sequence[_Run]) -> bool:
    """Whether each of the far runs is so much farther off in some output than all near ones."""
    farthest = [max(error.rms for error in errors) for errors in zip(*near, strict=True)]
    return all(any(error.rms > APART * least for error, least in zip(errors, farthest, strict=True)) for errors in far)


def _passes(one: Measured, session: Session) -> bool:
    said = verdict(one, session.rules)
    return not said.failures and not said.untold


def _errs_as_deployed_alone(one: Measured, session: Session) -> bool:
    if one.numeric is None or one.algebra is None or one.figures.failures:
        return False
    ratio = verdict(one, session.rules).algebra_ratio
    return ratio is not None and ratio <= 1.0


def _beside(one: Measured, error: Spread, why: str) -> Measured:
    """The measurement with another error than the one that was seen, and why."""
    assert one.numeric is not None
    assert one.truth is not None
    figures = one.figures
    note = (
        f"{figures.name}: the candidate is {figures.numeric_error:.2g} off, as roundings alone decided otherwise: with "
        f"others {why} (to {relative(error.rms, one.truth.rms):.2g}, RMS)"
    )
    return replace(one, numeric=(error, one.numeric[1]), figures=replace(figures, notes=(*figures.notes, note)))
