"""Every published block: exact always, and collapsed to what the papers say is left."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import reparam
from reparam.errors import ReparamError
from tests.support import (
    EXACT,
    assert_unchanged,
    counts_of,
    executed_counts,
    idle_layers,
    relative_error,
    run,
    sampled,
    snapshot,
    static_counts,
)
from tests.zoo import BLOCKS, BlockCase

COUNTED_UP_TO = 5
"""Counts are asserted for the blocks whose collapse belongs to an issue up to this one; exactness for all."""

COUNTED = [case for case in BLOCKS if int(case.since) <= COUNTED_UP_TO and case.expected]
LAYERS = ("conv", "bn", "linear")


@functools.cache
def fused(name: str) -> tuple[torch.nn.Module, Any]:
    """(original, result) in float64 of the case called `name`; skips a block that may be refused as a whole and is."""
    case = next(case for case in BLOCKS if case.name == name)
    model = case.make()
    try:
        return model, reparam.fuse(model, case.inputs(), verify=False)
    except ReparamError as error:
        if not case.may_refuse:
            raise
        pytest.skip(f"refused as a whole: {error}")


def by_name(case: BlockCase) -> str:
    return case.name


@pytest.mark.parametrize("case", sampled(BLOCKS, 4), ids=by_name)
def test_block_is_a_fair_test(case: BlockCase) -> None:
    """The original reacts to its input almost everywhere, and is not all zero behind its ReLU."""
    model = case.make()
    first, second = run(model, case.inputs()), run(model, 2 * case.inputs() + 1)
    assert torch.isfinite(first).all()
    assert (first != 0).float().mean() > 0.1
    assert (first != second).flatten(2 if first.ndim > 2 else 1).any(-1).float().mean() > 0.5


@pytest.mark.parametrize("case", BLOCKS, ids=by_name)
def test_block_is_exact(case: BlockCase) -> None:
    """Same output in float64, on the example's size, another batch size and other image sizes."""
    original, result = fused(case.name)
    sizes = [{}, {"batch": 1}, {"batch": 3}]
    if case.flexible:
        sizes += [{"grow": 1}, {"batch": 1, "grow": 4}]
    for size in sizes:
        x = case.inputs(**size)
        assert relative_error(run(original, x), run(result.module, x)) < EXACT, size


@pytest.mark.parametrize("case", COUNTED, ids=by_name)
def test_block_is_collapsed(case: BlockCase) -> None:
    _, result = fused(case.name)
    static, executed = static_counts(result.module), executed_counts(result.module, case.inputs())
    assert counts_of(static, case.expected) == case.expected, [str(r) for r in result.report.refusals]
    measured = {kind: count for kind, count in case.expected.items() if kind != "identity"}
    assert counts_of(executed, measured) == measured
    assert idle_layers(result.module) == []


@pytest.mark.parametrize("case", sampled(BLOCKS, 4), ids=by_name)
def test_block_never_grows(case: BlockCase) -> None:
    """No more layers than before, and not more weights than one enclosing kernel explains."""
    original, result = fused(case.name)
    before, after = (executed_counts(module, case.inputs()) for module in (original, result.module))
    # a merged identity or pool may need a convolution where there was none, never more than the operations it replaces
    assert sum(after[kind] for kind in LAYERS) <= sum(before[kind] for kind in (*LAYERS, "add", "mul"))
    assert after["bn"] <= before["bn"]
    assert sum(after.values()) <= sum(before.values())


@pytest.mark.parametrize("case", sampled(BLOCKS, 8), ids=by_name)
def test_block_fused_twice_is_the_same(case: BlockCase) -> None:
    original, result = fused(case.name)
    again = reparam.fuse(result.module, case.inputs(), verify=False)
    assert static_counts(again.module) == static_counts(result.module)
    assert relative_error(run(original, case.inputs()), run(again.module, case.inputs())) < EXACT


@pytest.mark.parametrize("case", sampled(BLOCKS, 8), ids=by_name)
def test_block_is_verified_in_float32_and_the_callers_model_left_alone(case: BlockCase) -> None:
    model = case.make(torch.float32).train()
    before = snapshot(model)
    try:
        result = reparam.fuse(model, case.inputs(torch.float32))
    except ReparamError:
        if not case.may_refuse:
            raise
        return
    finally:
        assert_unchanged(before, model)
    assert result.report.comparison.passed
    assert not any(module.training for module in result.module.modules())
    for refusal in result.report.refusals:
        assert refusal.where.strip()
        assert len(refusal.reason.split()) > 2
