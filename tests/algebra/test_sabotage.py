"""Each law fails on some wrong implementation of what it is about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from reparam.algebra import AffineMap, Geometry, Inexact, compose, plus, regrouped, then
from reparam.algebra.deferred import Deferred
from tests.algebra import test_laws
from tests.algebra.drawing import FIRST_FAILURE
from tests.algebra.test_laws import LAWS

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
Result = AffineMap | Inexact


def then_without_the_first_bias(f: AffineMap, g: AffineMap) -> Result:
    return then(f.linear_part, g)


def then_at_any_border(f: AffineMap, g: AffineMap) -> Result:
    """What most tools do: merges whatever the padding."""
    original = compose.crossing
    compose.crossing = lambda first, second: None  # type: ignore[assignment]
    try:
        return then(f, g)
    finally:
        compose.crossing = original


def then_with_the_kernel_flipped(f: AffineMap, g: AffineMap) -> Result:
    merged = then(f, g)
    if isinstance(merged, Inexact) or not merged.geometry.rank:
        return merged
    return AffineMap(merged.geometry, Deferred(lambda w: w.flip(-1), merged.weight), merged.bias)


def then_that_doubles_a_diagonal(f: AffineMap, g: AffineMap) -> Result:
    """Forgets that a scale of ones is not a scale of twos."""
    return then(f, plus_exactly(g, g)) if g.geometry.is_diagonal else then(f, g)


def plus_exactly(f: AffineMap, g: AffineMap) -> AffineMap:
    total = plus(f, g)
    assert isinstance(total, AffineMap)
    return total


def plus_of_the_first_bias(f: AffineMap, g: AffineMap) -> Result:
    return plus(f, g.linear_part)


def plus_aligned_at_the_corner(f: AffineMap, g: AffineMap) -> Result:
    """Kernels laid over one another by their first tap instead of by their padding."""
    original = compose._embedded

    def corner(source: Geometry, target: Geometry, weight: Any) -> Any:
        weight = original(source, target, weight)
        return weight.roll(1, -1) if source is g.geometry and source != target else weight

    merged = plus(f, g)
    if isinstance(merged, Inexact):
        return merged
    first, second, geometry = f.geometry, g.geometry, merged.geometry
    weight = Deferred(
        lambda w1, w2: (
            original(first.with_rank(geometry.rank), geometry, w1)
            + corner(second.with_rank(geometry.rank), geometry, w2)
        ),
        f.weight,
        g.weight,
    )
    return AffineMap(geometry, weight, merged.bias)


def plus_of_any_modes(f: AffineMap, g: AffineMap) -> Result:
    """Says no in one order only."""
    return Inexact("the second is larger") if f.geometry.kernel < g.geometry.kernel else plus(f, g)


def plus_that_forgets_rounding(f: AffineMap, g: AffineMap) -> Result:
    """Leaves a trace of the bias where it cancels."""
    merged = plus(f, g)
    if isinstance(merged, Inexact) or merged.bias is None:
        return merged
    return AffineMap(merged.geometry, merged.weight, Deferred(lambda b: b + 1e-15, merged.bias))


def regrouped_by_repeating(f: AffineMap, groups: int) -> AffineMap:
    """Repeats the blocks instead of putting zeros between them."""
    right = regrouped(f, groups)
    times = f.geometry.groups // groups
    return AffineMap(right.geometry, Deferred(lambda w: w.repeat(1, times, *(1,) * (w.ndim - 2)), f.weight), f.bias)


SABOTAGE: list[tuple[str, str, Callable[..., Any]]] = [
    ("then_agrees_with_running_both", "then", then_at_any_border),
    ("then_agrees_with_running_both", "then", then_without_the_first_bias),
    ("then_agrees_with_running_both", "then", then_with_the_kernel_flipped),
    ("then_is_associative", "then", then_without_the_first_bias),
    ("then_is_associative", "then", then_at_any_border),
    ("plus_agrees_with_adding", "plus", plus_of_the_first_bias),
    ("plus_agrees_with_adding", "plus", plus_aligned_at_the_corner),
    ("plus_commutes", "plus", plus_of_the_first_bias),
    ("plus_commutes", "plus", plus_of_any_modes),
    ("plus_is_associative", "plus", plus_aligned_at_the_corner),
    ("then_distributes_over_plus", "plus", plus_of_the_first_bias),
    ("then_distributes_over_plus", "then", then_with_the_kernel_flipped),
    ("then_distributes_from_the_left", "then", then_without_the_first_bias),
    ("then_distributes_from_the_left", "plus", plus_aligned_at_the_corner),
    ("identity_is_neutral_and_zero_adds_nothing", "then", then_that_doubles_a_diagonal),
    ("identity_is_neutral_and_zero_adds_nothing", "plus", plus_of_the_first_bias),
    ("zero_behind_is_zero", "then", then_with_the_kernel_flipped),
    ("zero_behind_is_zero", "plus", plus_that_forgets_rounding),
    ("regrouping_changes_nothing", "regrouped", regrouped_by_repeating),
    ("pointwise_around_a_transposed_convolution", "then", then_at_any_border),
    ("pointwise_around_a_transposed_convolution", "then", then_without_the_first_bias),
]


@pytest.mark.parametrize(("law", "name", "wrong"), SABOTAGE, ids=lambda value: getattr(value, "__name__", value))
def test_a_wrong_implementation_breaks_the_law(
    law: str, name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, name, wrong)
    monkeypatch.setattr(test_laws, "SETTINGS", FIRST_FAILURE)
    with pytest.raises(AssertionError):
        LAWS[law]()


def test_every_law_is_shown_to_fail() -> None:
    assert {law for law, _, _ in SABOTAGE} == set(LAWS)
