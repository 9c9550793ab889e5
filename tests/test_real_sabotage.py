"""Real models with many rewrites at fault at once: each is named, and what is made without them is right.

`tools/sabotage.py` does the same one fault at a time, for all pairs, and asks `reparam.verify` of each, too.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import reparam
from tests.support import sampled
from tools.faults import FAULTS, once, rewrites_sabotaged
from tools.sabotage import MODELS, START, model_of


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", sampled(sorted(MODELS, key="lcnet_035".__ne__), len(MODELS)))
def test_every_rewrite_at_fault_is_named_and_undone(name: str) -> None:
    model, x = model_of(name)
    with rewrites_sabotaged(once(list(FAULTS.values()), START)) as injected:
        result = reparam.fuse(model, x)
    named = [one.rewrite.place.module for one in result.report.undone]
    assert sorted(named) == sorted(injected.places)
    assert len(named) >= 5
    assert result.report.comparison is not None
    assert result.report.comparison.passed
    assert result.report.rewrites  # the rest of the model is fused
    assert not {one.rewrite for one in result.report.undone} & set(result.report.rewrites)
