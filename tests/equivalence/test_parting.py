"""A failed comparison of two modules names the first tensor that only the original computes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

from reparam.equivalence import Parting, parting, verify
from tests.equivalence.nets import Branchy, Plain, TwoOutputs, example, folded, randomise


def _double(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).double()


@torch.no_grad()
def wrong_weight(net: Plain) -> None:
    net.convs[1].weight[0, 0, 0, 0] += 0.1


@torch.no_grad()
def wrong_bias(net: Plain) -> None:
    net.convs[2].bias[5] += 0.1  # type: ignore[index]


@torch.no_grad()
def not_finite(net: Plain) -> None:
    net.convs[1].weight[3, 0, 0, 0] = float("nan")


@torch.no_grad()
def wrong_head(net: Plain) -> None:
    net.head.weight[4, 4] += 0.1


FAULTS: list[tuple[Callable[[Plain], None], str, str]] = [
    (wrong_weight, "convs.1", "bns.0"),
    (wrong_bias, "convs.2", "bns.1"),
    (not_finite, "convs.1", "bns.0"),
    (wrong_head, "head", "bns.2"),
]


@pytest.mark.parametrize(("fault", "place", "after"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("net", [Plain, TwoOutputs], ids=lambda kind: kind.__name__)
def test_the_first_tensor_that_differs_is_named(
    fault: Callable[[Plain], None], place: str, after: str, net: type[Plain]
) -> None:
    original = randomise(net(), seed=1)
    other = copy.deepcopy(original)
    fault(other)  # type: ignore[arg-type]
    comparison = verify(original, other, example())
    assert comparison.parting is not None
    assert comparison.parting.place == place
    assert comparison.parting.after == after
    assert place in str(comparison.parting)


@pytest.mark.parametrize(("fault", "place"), [(wrong_weight, "bns.1"), (wrong_bias, "bns.2"), (wrong_head, "head")])
@pytest.mark.parametrize("net", [Plain, Branchy], ids=lambda kind: kind.__name__)
def test_against_a_folded_candidate_it_is_the_first_that_folding_keeps(
    fault: Callable[[Plain], None], place: str, net: type[Plain]
) -> None:
    """What was merged away is not at fault: only what nothing behind it reproduces."""
    original = randomise(net(), seed=1)
    assert isinstance(original, Plain)
    good = folded(original)
    assert parting(original, good, example()) is None
    fault(good)
    found = parting(original, good, example())
    assert found is not None
    stage = place.partition(".")[2]
    assert found.place in (place, f"convs.{stage}")


def test_models_that_agree_have_none_and_neither_has_a_callable() -> None:
    original = randomise(Plain(), seed=1)
    good = folded(original)  # type: ignore[arg-type]
    assert verify(original, good, example()).parting is None
    failed = verify(original, lambda x: good(x) + 1, example())
    assert not failed.passed
    assert failed.parting is None


def test_it_is_looked_for_on_the_inputs_that_failed() -> None:
    """A candidate that is wrong for other batch sizes only."""

    class Wrong(Plain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            features = self.features(x)
            return self.head(features.mean((2, 3)) * (1.0 if len(x) == 2 else 1.5))  # type: ignore[no-any-return]

    original, other = randomise(Plain(), seed=1), Wrong().eval()
    other.load_state_dict(original.state_dict())
    comparison = verify(original, other, example())
    assert comparison.cases[0].passed
    assert comparison.parting == Parting("head", "addmm", (1, 10), "bns.2")


def test_it_can_be_left_out_and_it_is_in_the_json() -> None:
    original = randomise(Plain(), seed=1)
    other = copy.deepcopy(original)
    wrong_weight(other)  # type: ignore[arg-type]
    assert verify(original, other, example(), find_parting=False).parting is None
    plain = json.loads(json.dumps(verify(original, other, example()).to_dict(), allow_nan=False))
    assert plain["parting"]["place"] == "convs.1"
    assert plain["parting"]["sentence"].startswith("the first tensor that only the original computes")


def test_a_constant_that_both_have_does_not_hide_a_fault() -> None:
    """A tensor of equal values tells nothing, though it is computed from the one that is wrong."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = self.conv(x)
            return y, y * 0.0

    original = Masked()
    other = copy.deepcopy(original)
    with torch.no_grad():
        other.conv.weight[0] *= 1.01
    found = parting(original, other, example())
    assert found is not None
    assert (found.place, found.operation) == ("conv", "convolution")
