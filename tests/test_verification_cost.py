"""What verification costs at its levels, in float64 forward passes of the original: the standard one at most ten."""

from __future__ import annotations

import pytest
import torch

import reparam
from tools.timm_zoo import create


@pytest.mark.parametrize("size", [32, 96])
def test_the_standard_level_costs_at_most_ten_passes_with_the_check_of_each_rewrite(size: int) -> None:
    model = create("resnet10t", seed=0)
    comparison = reparam.fuse(model, torch.randn(1, 3, size, size)).report.comparison
    assert comparison is not None
    assert comparison.passed
    cases = sum(case.cost for case in comparison.cases)
    # One pass of the original, and one of the layers that are new: in this model nearly all of them.
    assert 1.5 < comparison.cost - cases <= 2.0
    assert comparison.cost <= 10.0
    assert sum(case.status == "passed" for case in comparison.cases) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("level", "checked"), [("quick", False), ("thorough", True)])
def test_the_other_levels(level: str, checked: bool) -> None:
    model = create("resnet10t", seed=0)
    comparison = reparam.fuse(model, torch.randn(1, 3, 32, 32), verify=level).report.comparison
    assert comparison is not None
    assert comparison.passed
    assert (comparison.cost - sum(case.cost for case in comparison.cases) > 1.0) == checked
    assert (comparison.cost <= 5.0) == (level == "quick")


def test_off_compares_nothing_and_another_word_is_refused() -> None:
    model = create("resnet10t", seed=0)
    assert reparam.fuse(model, torch.randn(1, 3, 32, 32), verify="off").report.comparison is None
    with pytest.raises(reparam.InputError, match="verify='careful' is not known"):
        reparam.fuse(model, torch.randn(1, 3, 32, 32), verify="careful")
