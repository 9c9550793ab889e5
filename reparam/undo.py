"""A fused model that does not agree with its original: the rewrite at fault is found and undone, the rest stays.

The first `n` rewrites of a run are right, the first `n + 1` are not: bisection finds `n`, fusing anew each time with
fewer rewrites and running the inputs that failed. Then the model is fused without that rewrite, and verified again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from reparam.equivalence import Comparison
from reparam.errors import ReparamError
from reparam.passes.base import Undone
from reparam.passes.ledger import Ledger, key_of

MOST_UNDONE = 8
"""Rewrites that are looked for one by one; if there are more, all behind the last right one go."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class Attempt(Generic[Made]):
    """A fused model, the rewrites that made it, and how it compares; None if it was not asked."""

    made: Made
    ledger: Ledger
    comparison: Comparison | None

    @property
    def passed(self) -> bool:
        return self.comparison is None or self.comparison.passed


Try = Callable[[Ledger, "frozenset[str] | None"], "Attempt[Made]"]
"""Fuses as a ledger allows, and verifies: on the named input cases, or on all."""


def without_faults(
    first: Attempt[Made],
    attempt: Try[Made],
    parting: Callable[[Made], str],
    tell: Callable[[str], None],
) -> tuple[Attempt[Made], tuple[Undone, ...]]:
    """The attempt that passes, and what had to be undone for that; `first` if nothing helps.

    Args:
        first: the attempt that failed.
        attempt: makes further ones.
        parting: where a model parts from the original, in words; empty if that is not known.
        tell: called with a few words for each thing that is tried.
    """
    current, undone, right = first, list[Undone](), 0
    while not current.passed:
        cases, right_so_far = _failed_cases(current), _asked_of_fewer(current)
        keys = frozenset(key_of(one.rewrite) for one in undone)
        if len(undone) == MOST_UNDONE:
            tell("undoing all further rewrites")
            last = attempt(Ledger(keys, right), None)
            behind = [Undone(one, _failure(current)) for one in current.ledger.made[right:]]
            return (last, (*undone, *behind)) if last.passed else (first, ())
        low, high = right, len(current.ledger.made)
        if high == low or (low == 0 and not right_so_far(_tried(attempt, Ledger(keys, 0), cases))):
            return first, ()  # what no rewrite has done, no undoing repairs
        guilty = current
        while high - low > 1:
            tell(f"looking for the rewrite at fault among {high - low}")
            middle = (low + high) // 2
            tried = _tried(attempt, Ledger(keys, middle), cases)
            if right_so_far(tried):
                low = middle
            else:
                high, guilty = middle, tried or guilty
        undone.append(_undone(current, high - 1, guilty, parting))
        right = low
        tell("fusing without it")
        after = _tried(attempt, Ledger(keys | {key_of(undone[-1].rewrite)}), None)
        if after is None or (len(after.ledger.made) <= right and not after.passed):
            return first, ()
        current = after
    return current, tuple(undone)


def _asked_of_fewer(wrong: Attempt[Made]) -> Callable[[Attempt[Made] | None], bool]:
    """What tells an attempt with fewer rewrites, run on fewer inputs, to be right.

    Rounding noise says nothing, unless it was all that was wrong: the algebra is exact, while the bar for noise is not
    the same with fewer inputs.
    """
    noisy = wrong.comparison is not None and wrong.comparison.only_noisy

    def is_right(tried: Attempt[Made] | None) -> bool:
        comparison = None if tried is None else tried.comparison
        return comparison is not None and (comparison.passed or (comparison.only_noisy and not noisy))

    return is_right


def _tried(attempt: Try[Made], ledger: Ledger, cases: frozenset[str] | None) -> Attempt[Made] | None:
    """An attempt; None if the model cannot be made, or run."""
    try:
        return attempt(ledger, cases)
    except ReparamError:
        return None


def _undone(current: Attempt[Made], index: int, guilty: Attempt[Made], parting: Callable[[Made], str]) -> Undone:
    outputs = () if guilty.comparison is None else guilty.comparison.outputs
    worst = next((output for output in outputs if output.failures), None)
    return Undone(
        current.ledger.made[index],
        _failure(guilty),
        () if worst is None else worst.worst_index,
        "" if worst is None else worst.worst_location,
        parting(guilty.made),
    )


def _failure(attempt: Attempt[Made]) -> str:
    """What was wrong, in a sentence; the algebra rather than what followed from it."""
    failures = () if attempt.comparison is None else attempt.comparison.failures
    algebra = (sentence for sentence in failures if "float64 results differ" in sentence)
    return next(algebra, next(iter(failures), ""))


def _failed_cases(attempt: Attempt[Made]) -> frozenset[str]:
    cases = () if attempt.comparison is None else attempt.comparison.cases
    return frozenset(case.name for case in cases if case.failures)
