"""A fused model is saved and loaded like any other."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import reparam
from tests.capture import test_odd_forwards as forwards
from tests.capture import test_sizes as sizes
from tests.capture.test_odd_forwards import call, image, odd
from tests.support import executed_counts, relative_error
from tests.test_blocks import BLOCKS

MODELS: list[Callable[..., Any]] = [
    forwards.crop,
    forwards.is_a_tensor,
    forwards.state_in_place,
    sizes.branch,
    sizes.rows,
    sizes.square_root,
    sizes.asserted,
    *sizes.OPEN,
]


def saved_and_loaded(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("forward", MODELS, ids=lambda forward: forward.__name__)
def test_a_fused_model_is_saved_and_loaded(forward: Callable[..., Any]) -> None:
    original, fused = odd(forward), reparam.fuse(odd(forward), image(), verify=False).module
    for twin in (copy.deepcopy(fused), saved_and_loaded(fused), pickle.loads(pickle.dumps(fused))):
        assert relative_error(call(odd(forward), (image(),)), call(twin, (image(),))) < 1e-12
    if forward in (sizes.branch, sizes.rows, sizes.square_root, sizes.asserted):
        with pytest.raises(reparam.OtherInputError):
            call(saved_and_loaded(fused), (image(1, 11, 11),))
    assert original is not fused


@pytest.mark.parametrize("case", BLOCKS[::40], ids=lambda case: case.name)
def test_blocks_are_saved_and_loaded_as_they_are(case: Any) -> None:
    fused = reparam.fuse(case.make(), case.inputs(), verify=False).module
    loaded = saved_and_loaded(fused)
    assert torch.equal(fused(case.inputs()), loaded(case.inputs()))
    again = reparam.fuse(loaded, case.inputs()).module
    assert executed_counts(again, case.inputs()) == executed_counts(fused, case.inputs())
