"""A fused model that does not agree with its original: the rewrites at fault are found and undone, the rest stays.

First by what each rewrite did to the tensors it stands between (`reparam.passes.watch`), which names all of them at
once. What that cannot see, because the example does not show it, is found by bisection: the first `n` rewrites of a run
are right, the first `n + 1` are not, fusing anew each time and running the inputs that failed. Either way the model is
then fused without them, and verified again. No model but the last one is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from reparam.equivalence import Comparison
from reparam.passes.base import Rewrite, Undone
from reparam.passes.ledger import Key, Ledger, key_of
from reparam.passes.watch import Fault, Judge

MOST_BISECTED = 8
"""Rewrites that are looked for by bisection; if there are more, all behind the last right one go."""
MOST_UNTOLD = 2
"""Those of them that are looked for where roundings alone explain the difference: which one it is depends on chance."""
MOST_ATTEMPTS = 64
"""Models that are made to find out; then, too, all behind the last right one go."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class Attempt(Generic[Made]):
    """A fused model, the rewrites that made it, and how it compares; None if it was not asked."""

    made: Made
    ledger: Ledger
    comparison: Comparison | None

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the model as a whole."""
        return self.comparison is None or self.comparison.passed

    @property
    def faults(self) -> list[Fault]:
        """Faults of rewrites where they stand; where the whole model was compared in float64, it is what counts."""
        whole = self.comparison is None or (self.comparison.passed and self.comparison.algebra_error is not None)
        return [] if whole else self.ledger.faults


Try = Callable[[Ledger, "frozenset[str] | None", bool], "Attempt[Made]"]
"""Fuses as a ledger allows, and verifies: on the named input cases, or on all; True looks for the parting, too."""


def without_faults(
    first: Attempt[Made], attempt: Try[Made], judge: Judge, tell: Callable[[str], None]
) -> tuple[Attempt[Made] | None, tuple[Undone, ...]]:
    """The attempt that passes, and what had to be undone for that; None if no undoing helps.

    Args:
        first: the attempt that failed.
        attempt: makes further ones.
        judge: tells whether two values are one.
        tell: called with a few words for each thing that is tried.
    """
    search, current = _Search(attempt, judge, tell), first
    while not current.passed or current.faults:
        found = search.at_fault(current)
        if not found:
            break
        after = search.made_without(found)
        if after is None:
            return None, ()
        current = after
    return (current, tuple(search.undone)) if current.passed else (None, ())


@dataclass
class _Search(Generic[Made]):
    """What has been found so far.

    Attributes:
        undone: the rewrites at fault.
        right: how many of the first rewrites are known to be right.
        most: how many are made at all, once there is no more looking for single ones.
        left: models that may still be made.
        bisected: rewrites that were found by bisection.
        untold: those of them for which nothing could be told.
    """

    attempt: Try[Made]
    judge: Judge
    tell: Callable[[str], None]
    undone: list[Undone] = field(default_factory=list)
    right: int = 0
    most: int | None = None
    left: int = MOST_ATTEMPTS
    bisected: int = 0
    untold: int = 0

    @property
    def keys(self) -> frozenset[Key]:
        return frozenset(key_of(one.rewrite) for one in self.undone)

    def at_fault(self, current: Attempt[Made]) -> list[Undone]:
        """The rewrites that are to be undone next; empty if it is none of them."""
        if self.most is not None:
            return []
        is_untold = current.comparison is not None and current.comparison.is_untold
        if self.left <= 0 or self.bisected == MOST_BISECTED or (is_untold and self.untold == MOST_UNTOLD):
            self.tell("undoing all further rewrites")
            self.most = self.right
            return [Undone(one, _failure(current.comparison)) for one in current.ledger.made[self.right :]]
        found = self._by_standing(current)
        comparison = current.comparison
        if found or comparison is None or comparison.passed:
            return found
        if comparison.lacks_evidence and not comparison.is_untold:
            return []  # no rewrite has done that
        return self._by_bisection(current)

    def made_without(self, found: list[Undone]) -> Attempt[Made] | None:
        """The model without what was found, too; None if it cannot be made."""
        self.tell(f"fusing without {len(found)} of its rewrites")
        self.undone += found
        after = self._made(Ledger(self.keys, self.most, judge=self.judge), None)
        if after is not None:
            without = _error(after.comparison)
            self.undone[-len(found) :] = [replace(one, error_without=without) for one in found]
        return after

    def _by_standing(self, current: Attempt[Made]) -> list[Undone]:
        """Those whose own tensors are wrong."""
        if current.ledger.judge is not None and not current.ledger.faults:
            return []
        self.tell("checking each rewrite where it stands")
        ledger = Ledger(self.keys, judge=self.judge, one_by_one=True)
        self._made(ledger, frozenset())
        faults = {key_of(fault.rewrite): fault for fault in reversed(ledger.faults) if fault.rewrite is not None}
        return [
            _from_fault(fault.rewrite, fault, _error(current.comparison), _number(ledger.made, key))
            for key, fault in reversed(faults.items())
            if fault.rewrite is not None and key not in self.keys
        ]

    def _by_bisection(self, current: Attempt[Made]) -> list[Undone]:
        """The first of them with which the inputs fail that failed."""
        comparison, made = current.comparison, current.ledger.made
        cases: frozenset[str] | None = _failed_cases(comparison)
        is_right = _asked_of_fewer(comparison)
        low, high = self.right, len(made)
        if is_right(self._compared(high, cases)):
            cases = None  # only all inputs together show it
        if low == high or (low == 0 and not is_right(self._compared(0, cases))):
            return []  # what no rewrite has done, no undoing repairs
        while high - low > 1:
            self.tell(f"looking for the rewrite at fault among {high - low}")
            middle = (low + high) // 2
            if is_right(self._compared(middle, cases)):
                low = middle
            else:
                high = middle
        self.right, self.bisected = low, self.bisected + 1
        self.untold += comparison is not None and comparison.is_untold
        rewrite, found = made[high - 1], self._compared(high, cases, describe=True) or comparison
        return [_from_comparison(rewrite, found, _number(made, key_of(rewrite)))]

    def _compared(self, most: int, cases: frozenset[str] | None, describe: bool = False) -> Comparison | None:
        """How the model with the first few rewrites compares; None if it cannot be made, or run."""
        made = self._made(Ledger(self.keys, most), cases, describe)
        return None if made is None else made.comparison

    def _made(self, ledger: Ledger, cases: frozenset[str] | None, describe: bool = False) -> Attempt[Made] | None:
        self.left -= 1
        try:
            return self.attempt(ledger, cases, describe)
        except Exception:  # a graph that was rewritten wrongly may fail anywhere
            return None


def _asked_of_fewer(wrong: Comparison | None) -> Callable[[Comparison | None], bool]:
    """What tells an attempt with fewer rewrites, run on fewer inputs, to be right.

    Rounding noise says nothing, unless it was all that was wrong: the algebra is exact, while the bar for noise is not
    the same with fewer inputs.
    """
    noisy = wrong is not None and wrong.only_noisy

    def is_right(comparison: Comparison | None) -> bool:
        if comparison is None or comparison.passed:
            return comparison is not None
        return comparison.only_noisy and not comparison.is_untold and not noisy

    return is_right


def _from_fault(rewrite: Rewrite, fault: Fault, error: float | None, number: int) -> Undone:
    found = fault.difference
    what = fault.tensor if found is None else f"{fault.tensor}: {found.what} where the rewrite stands"
    undone = Undone(rewrite, what, error_with=error, number=number)
    if found is None:
        return undone
    return replace(
        undone,
        worst=found.worst_index,
        location=found.worst_location,
        shape=found.shape,
        local_error=found.error,
    )


def _from_comparison(rewrite: Rewrite, comparison: Comparison | None, number: int) -> Undone:
    outputs = () if comparison is None else comparison.outputs
    worst = next((output for output in outputs if output.failures), None)
    undone = Undone(rewrite, _failure(comparison), error_with=_error(comparison), number=number)
    if worst is not None:
        undone = replace(undone, worst=worst.worst_index, location=worst.worst_location, shape=worst.shape)
    parting = None if comparison is None else comparison.parting
    return undone if parting is None else replace(undone, parting=str(parting))


def _number(made: Iterable[Rewrite], key: Key) -> int:
    """How many rewrites are undone together with this one, itself included."""
    return sum(key_of(one) == key for one in made)


def _error(comparison: Comparison | None) -> float | None:
    """The float64 error of a model; that in its own dtype, if the other is not known.

    None if what failed is no matter of size, as an output that is missing, or not finite.
    """
    if comparison is None:
        return None
    if not comparison.passed and not any(output.worst_ratio > 1.0 for output in comparison.outputs):
        return None
    return comparison.numeric_error if comparison.algebra_error is None else comparison.algebra_error


def _failure(comparison: Comparison | None) -> str:
    """What was wrong, in a sentence; the algebra rather than what followed from it."""
    failures = () if comparison is None else comparison.failures
    algebra = (sentence for sentence in failures if "float64 results differ" in sentence)
    return next(algebra, next(iter(failures), ""))


def _failed_cases(comparison: Comparison | None) -> frozenset[str]:
    cases = () if comparison is None else comparison.cases
    return frozenset(case.name for case in cases if case.failures or case.is_untold)
