"""Example inputs from specifications, and what a model that fails on them says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reparam.capture.examples import InputSpec, check_runs, example_inputs
from reparam.errors import InputError


@pytest.mark.parametrize("text", ["1x3x224x224", "5", "1x77:int64", "mask=1x77:bool", "x=2x3:float16"])
def test_specifications_round_trip(text: str) -> None:
    assert str(InputSpec.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "x", "1x", "1x-3", "1,3", "=1x3", "1x3:", "1x3:float", "0x3", "99999x99999x99999"]
)
def test_malformed_specifications_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--input"):
        InputSpec.parse(text)


def test_inputs_follow_the_specification() -> None:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2)).double()
    inputs, _ = example_inputs(model, ["2x5:int64", "y=4x3", "flag=3:bool"], seed=1)
    (ids,) = inputs.args
    assert (ids.shape, ids.dtype) == ((2, 5), torch.int64)
    assert 0 <= int(ids.min()) <= int(ids.max()) < 7
    assert inputs.kwargs["y"].dtype == torch.float64
    assert inputs.kwargs["flag"].dtype == torch.bool
    again, _ = example_inputs(model, ["2x5:int64", "y=4x3", "flag=3:bool"], seed=1)
    assert torch.equal(inputs.kwargs["y"], again.kwargs["y"])


def test_the_models_own_size_is_the_default() -> None:
    inputs, specs = example_inputs(nn.Sequential(nn.Linear(6, 2)))
    assert inputs.args[0].shape == (1, 6)
    assert str(specs[0]) == "1x6"
    with pytest.raises(InputError, match="give it with --input"):
        example_inputs(nn.ReLU())


def test_a_failure_names_the_innermost_module_and_leaves_no_hooks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(5, 4, 3)))
    inputs, specs = example_inputs(model, ["1x3x9x9"])
    with pytest.raises(InputError, match=r"the input 1x3x9x9 in 1\.1 \(Conv2d\): RuntimeError") as caught:
        check_runs(model, inputs, specs)
    assert "\n" not in str(caught.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match="only a guess from its first layer"):
        check_runs(model, inputs, specs, given=False)


def test_a_model_that_runs_passes() -> None:
    model = nn.Sequential(nn.Linear(6, 2))
    inputs, specs = example_inputs(model)
    check_runs(model, inputs, specs)
    assert not model._forward_hooks
