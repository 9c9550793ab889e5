"""Decisions that the roundings of the deployment dtype make: a candidate that goes another way than the truth does.

Attention whose softmax all but chooses between two keys of nearly the same score picks one by what float32 rounds the
scores to. The original and the candidate then have two answers each, far apart, and which of them comes out is luck. To
call that noise would excuse every error as large as the two are apart. Instead the roundings of both are varied
(`montecarlo.py`), and either shows that it was luck:

* In one of its runs the original goes the candidate's way: there the two agree as closely as the candidate otherwise
  must agree with the truth.
* In its own runs the candidate agrees with the truth nearly as often as the original does.

That there are answers far apart is seen in the same runs: none lies between those that agree with the truth and those
that do not. An original that is noise all over shows no such gap, and its runs may come near to any answer by chance.

What is imprecise errs in every run and agrees with none. A candidate that decides otherwise does so in every run. One
that parts what is equal in every deployment of the original (a score and itself, computed anew) goes wrong in half of
its runs, where the original never does. They stay refused. Asked is only a candidate that errs as deployed and in
nothing else: its algebra was compared and is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from reparam.equivalence.cases import Case
from reparam.equivalence.gather import Ran
from reparam.equivalence.judge import Spread, spread
from reparam.equivalence.measure import verdict
from reparam.equivalence.measured import Measured
from reparam.equivalence.metrics import relative
from reparam.equivalence.montecarlo import MovedOperands
from reparam.equivalence.outputs import Flat, double
from reparam.equivalence.precision import PrivateCopy, named_tensors
from reparam.equivalence.session import Model, Noises, Session

SOMETIMES = 0.25
"""In what part of its runs with other roundings the original must agree with the truth itself, at least."""
FEWER, AS_OFTEN = 0.25, 0.5
"""The candidate must agree in as many runs as the original, but for so large a part of all; and half as often at least.
Two that agree with equal chances differ by more in 5% of all cases at most (in twenty runs); that of twenty tosses
fifteen show heads has a probability of 2%, and what parts equals is asked for each input on which it erred."""

APART = 3.0
"""How many times farther from the truth every other answer is, at least, than the farthest run that agrees with it."""


def with_decisions(
    session: Session, original: PrivateCopy | None, ran: Ran, case: Case, truth: Flat, noises: Noises
) -> Ran:
    """`ran`, with the errors of outputs that went another way by luck replaced by those that show that it was luck.

    Args:
        session: runs the models, and counts what it costs.
        original: as it is deployed; None asks nothing.
        ran: the case as measured, its noise raised.
        case, truth: what is run, and the original's answer in float64.
        noises: by output, how far the original was from the truth in each of its deployed runs with moved operands
            (seeds: that of the session, and those that follow). The candidate is run as often.
    """
    failing = [one for one in ran.measured if not _passes(one, session)]
    own = [noises.get(one.figures.name, []) for one in failing]
    if original is None or not failing or not all(own):
        return ran
    if not all(_errs_as_deployed_alone(one, session) for one in failing):
        return ran
    tie = _Tie(session, failing, case, [list(run) for run in zip(*own, strict=True)])
    if not tie.is_one:
        return ran
    luck = tie.along_with(original) or tie.as_often(truth)
    # What erred only because it was run for the first time does not repeat that after all those runs.
    if luck is None or not tie.is_as_measured(truth):
        return ran
    after = {one.figures.name: _beside(one, error, luck.why) for one, error in zip(failing, luck.errors, strict=True)}
    return replace(ran, measured=tuple(after.get(one.figures.name, one) for one in ran.measured))


@dataclass(frozen=True)
class _Luck:
    """What shows that it was luck: errors within the bar, one for each output that failed; and a sentence."""

    errors: Sequence[Spread]
    why: str


class _Tie:
    """The outputs that fail, and the runs in which the original goes one way or the other."""

    def __init__(
        self, session: Session, failing: Sequence[Measured], case: Case, noises: Sequence[Sequence[Spread]]
    ) -> None:
        self._session, self._failing, self._case = session, failing, case
        self._others = [draw for draw, errors in enumerate(noises) if not self._are_within(errors)]
        self._noises = noises

    @property
    def draws(self) -> int:
        """How often the original was run."""
        return len(self._noises)

    @property
    def agreed(self) -> int:
        """In how many of its runs the original agrees with the truth."""
        return self.draws - len(self._others)

    @property
    def is_one(self) -> bool:
        """Whether the original agrees with the truth sometimes at least, and else is far from it, as the candidate."""
        if self.agreed < SOMETIMES * self.draws:
            return False
        near = [errors for draw, errors in enumerate(self._noises) if draw not in self._others]
        return _are_apart(near, [self._noises[draw] for draw in self._others] + [self._measured])

    @property
    def _measured(self) -> list[Spread]:
        return [one.numeric[0] for one in self._failing if one.numeric is not None]

    def along_with(self, original: PrivateCopy) -> _Luck | None:
        """A run of the original in which it goes the candidate's way."""
        if not self._others:
            return None
        answer = self._session.call(self._session.candidate, self._case, None)
        for draw in self._others:
            apart = self._apart(answer, self._moved(original, draw))
            if apart and self._are_within(apart):
                others = f"{len(self._others)} of {self.draws} runs"
                return _Luck(apart, f"so does the original in one of the {others} in which it leaves the truth as well")
        return None

    def as_often(self, truth: Flat) -> _Luck | None:
        """The runs of the candidate in which it agrees with the truth, if they are as many as they should be."""
        least = max(self.agreed - FEWER * self.draws, AS_OFTEN * self.agreed)
        near: list[Sequence[Spread]] = []
        far: list[Sequence[Spread]] = [self._measured]
        for draw in range(self.draws):
            if len(near) + self.draws - draw < least:
                return None
            apart = self._apart(self._moved(self._session.candidate, draw), truth)
            if not apart:
                return None
            (near if self._are_within(apart) else far).append(apart)
        if len(near) < least or not _are_apart(near, far):
            return None
        largest = [max(errors, key=lambda error: error.rms) for errors in zip(*near, strict=True)]
        why = f"it agrees with the truth in {len(near)} of {self.draws} runs, the original in {self.agreed}"
        return _Luck(largest, why)

    def is_as_measured(self, truth: Flat) -> bool:
        """Whether the candidate, run as it is deployed, still errs as it did."""
        apart = self._apart(self._session.call(self._session.candidate, self._case, None), truth)
        return [error.rms for error in apart] == [error.rms for error in self._measured]

    def _moved(self, model: Model, draw: int) -> Flat:
        weights = list(named_tensors(model.module).values()) if isinstance(model, PrivateCopy) else []
        with MovedOperands(self._session.seed + draw, weights=weights):
            return self._session.call(model, self._case, None)

    def _apart(self, answer: Flat, other: Flat) -> list[Spread]:
        """How far two answers are apart in each of the outputs; nothing where that cannot be said of all."""
        spreads = []
        for one in self._failing:
            mine, theirs = (flat.tensors().get(one.figures.name) for flat in (answer, other))
            if mine is None or theirs is None or mine.shape != theirs.shape or one.figures.elements != mine.numel():
                return []
            error = double(mine) - double(theirs)
            if not bool(error.isfinite().all()):
                return []
            spreads.append(spread(error / one.unit))
        return spreads

    def _are_within(self, errors: Sequence[Spread]) -> bool:
        return all(
            _passes(replace(one, numeric=(error, one.numeric[1])), self._session)
            for one, error in zip(self._failing, errors, strict=True)
            if one.numeric is not None
        )


def _are_apart(near: Sequence[Sequence[Spread]], far: Sequence[Sequence[Spread]]) -> bool:
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
