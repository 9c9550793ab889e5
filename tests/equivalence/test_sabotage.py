"""Every fault is found, in every net; and the folds that were sabotaged pass before they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from reparam.equivalence import verify
from tests.equivalence.nets import Branchy, Plain, TwoOutputs, example, fold_bn, folded, randomise

NETS: dict[str, type[Plain]] = {"plain": Plain, "branchy": Branchy, "two outputs": TwoOutputs}
Sabotage = Callable[[Plain, Plain], nn.Module]


class Wrapped(nn.Module):
    """A net, and what is done to its input and output."""

    def __init__(
        self, net: nn.Module, after: Callable[..., object], before: Callable[..., object] | None = None
    ) -> None:
        super().__init__()
        self.net, self.after, self.before = net, after, before

    def forward(self, x: torch.Tensor) -> object:
        return self.after(self.net(x if self.before is None else self.before(x)))


def _first(output: object) -> torch.Tensor:
    tensor = next(iter(output.values())) if isinstance(output, dict) else output
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _with_first(output: object, tensor: torch.Tensor) -> object:
    return {**output, next(iter(output)): tensor} if isinstance(output, dict) else tensor


def perturb_one_weight(original: Plain, fused: Plain) -> nn.Module:
    weight = fused.convs[1].weight.data.flatten()
    weight[weight.abs().argmax()] *= 1.001
    return fused


def swap_two_channels(original: Plain, fused: Plain) -> nn.Module:
    conv = fused.convs[0]
    order = torch.arange(conv.out_channels)
    order[[2, 5]] = order[[5, 2]]
    conv.weight.data, conv.bias.data = conv.weight.data[order], conv.bias.data[order]
    return fused


def drop_a_bias(original: Plain, fused: Plain) -> nn.Module:
    fused.convs[2].bias = None
    return fused


def drop_one_bias_element(original: Plain, fused: Plain) -> nn.Module:
    fused.head.bias.data[3] = 0.0
    return fused


def break_the_border(original: Plain, fused: Plain) -> nn.Module:
    fused.convs[1].padding_mode = "replicate"
    fused.convs[1]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return fused


def insert_a_nan(original: Plain, fused: Plain) -> nn.Module:
    def after(output: object) -> object:
        tensor = _first(output).clone()
        tensor[0, -1] = float("nan")
        return _with_first(output, tensor)

    return Wrapped(fused, after)


def overflow(original: Plain, fused: Plain) -> nn.Module:
    fused.head.weight.data[4, 4] = float("inf")
    return fused


def return_a_constant(original: Plain, fused: Plain) -> nn.Module:
    return Wrapped(fused, lambda output: _with_first(output, torch.full_like(_first(output), 0.1)))


def return_the_example_s_answer(original: Plain, fused: Plain) -> nn.Module:
    """Right on the example and nowhere else, but for the number of images."""
    with torch.no_grad():
        known = _first(original(example(fused.head.weight.dtype)))

    def after(output: object) -> object:
        first = _first(output)
        return _with_first(output, known[torch.arange(len(first)) % len(known)].to(first.dtype))

    return Wrapped(fused, after)


def wrong_eps(original: Plain, fused: Plain) -> nn.Module:
    return folded(original, eps=1e-3)


def fold_twice(original: Plain, fused: Plain) -> nn.Module:
    fold_bn(fused.convs[1], original.bns[1])  # type: ignore[arg-type]
    return fused


def forget_a_bn(original: Plain, fused: Plain) -> nn.Module:
    fused.convs[1].load_state_dict(original.convs[1].state_dict())
    return fused


def add_an_output(original: Plain, fused: Plain) -> nn.Module:
    return Wrapped(
        fused, lambda output: {**output, "more": _first(output)} if isinstance(output, dict) else (output, 1)
    )


def change_the_dtype(original: Plain, fused: Plain) -> nn.Module:
    return Wrapped(fused, lambda output: _with_first(output, _first(output).to(torch.float16)))


def flatten_the_shape(original: Plain, fused: Plain) -> nn.Module:
    return Wrapped(fused, lambda output: _with_first(output, _first(output).flatten()))


def fix_the_batch(original: Plain, fused: Plain) -> nn.Module:
    return Wrapped(fused, lambda output: output, before=lambda x: x.reshape(2, 3, x.shape[2], x.shape[3]))


FAULTS: list[Sabotage] = [
    perturb_one_weight,
    swap_two_channels,
    drop_a_bias,
    drop_one_bias_element,
    break_the_border,
    insert_a_nan,
    overflow,
    return_a_constant,
    return_the_example_s_answer,
    wrong_eps,
    fold_twice,
    forget_a_bn,
    add_an_output,
    change_the_dtype,
    flatten_the_shape,
    fix_the_batch,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found(fault: Sabotage, net: str, dtype: torch.dtype) -> None:
    original = randomise(NETS[net](), seed=1).to(dtype)
    assert isinstance(original, Plain)
    comparison = verify(original, fault(original, folded(original)), example(dtype))
    assert not comparison.passed
    assert comparison.failures
    assert "NOT equivalent" in comparison.summary()


COARSE = [f for f in FAULTS if f not in (perturb_one_weight, wrong_eps, change_the_dtype)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", COARSE, ids=lambda fault: fault.__name__)
def test_a_fault_larger_than_a_weight_s_rounding_is_found_in_half_precision(
    fault: Sabotage, dtype: torch.dtype
) -> None:
    original = randomise(Plain(), seed=1).to(dtype)
    assert isinstance(original, Plain)
    assert not verify(original, fault(original, folded(original)), example(dtype)).passed


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_in_a_candidate_that_is_no_module(fault: Sabotage, net: str) -> None:
    """What another runtime is allowed besides, for its order of summation, hides none of them."""
    original = randomise(NETS[net](), seed=1)
    assert isinstance(original, Plain)
    good, bad = folded(original), fault(original, folded(original)).eval()
    assert verify(original, lambda x: good(x), example()).passed
    assert not verify(original, lambda x: bad(x), example()).passed


@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 0.012), (torch.bfloat16, 0.1)], ids=str)
def test_a_runtime_in_half_precision_is_allowed_no_more_than_a_module(dtype: torch.dtype, share: float) -> None:
    """Its sums are in float32, so their order is no excuse for errors of the size of half precision."""
    original = nn.Conv2d(3, 4, 1).to(dtype)

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return original(x) * (1 + share)  # type: ignore[no-any-return]

    assert verify(original, lambda x: original(x), example(dtype)).passed
    assert not verify(original, wrong, example(dtype)).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", [perturb_one_weight, wrong_eps], ids=lambda fault: fault.__name__)
def test_with_the_unrounded_candidate_even_a_rounding_sized_fault_is_found(fault: Sabotage, dtype: torch.dtype) -> None:
    original = randomise(Plain(), seed=1).to(dtype)
    assert isinstance(original, Plain)
    wide = folded(original.double())
    assert verify(original.to(dtype), folded(original), example(dtype), candidate_float64=wide).passed
    broken = fault(original.double(), folded(original.double()))
    original.to(dtype)
    assert not verify(original, broken, example(dtype), candidate_float64=broken, check_dtypes=False).passed


def test_a_weight_that_is_not_the_unrounded_one_rounded_is_named() -> None:
    original = randomise(Plain(), seed=1)
    assert isinstance(original, Plain)
    wide, fused = folded(Plain.double(original)), folded(original.float())
    fused.convs[1].weight.data[0, 0, 0, 0] *= 1.001
    comparison = verify(original, fused, example(), candidate_float64=wide)
    assert any("convs.1.weight" in sentence for sentence in comparison.failures)


@pytest.mark.parametrize("net", NETS)
def test_a_missing_output_is_found(net: str) -> None:
    original = randomise(NETS[net](), seed=1)

    class Pair(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> tuple[object, torch.Tensor]:
            return self.inner(x), x

    comparison = verify(Pair(original), original, example())
    assert not comparison.passed
    assert any("should be a tuple" in s or "is missing" in s for s in comparison.failures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_callable_is_judged_by_the_numeric_question_alone(dtype: torch.dtype) -> None:
    original = randomise(Plain(), seed=1).to(dtype)
    assert isinstance(original, Plain)
    good, bad = folded(original), fold_twice(original, folded(original))
    comparison = verify(original, lambda x: good(x), example(dtype))
    assert comparison.passed
    assert comparison.algebra_error is None
    assert not verify(original, lambda x: bad(x), example(dtype)).passed


def test_a_fault_in_a_small_channel_beside_huge_ones_is_found() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.conv.weight.data[0] *= 1e8

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    original, candidate = Uneven(), Uneven()
    candidate.load_state_dict(original.state_dict())
    assert verify(original, candidate, example()).passed
    candidate.conv.weight.data[5] *= 1.001
    comparison = verify(original, candidate, example())
    assert not comparison.passed
    output = comparison.outputs[0]
    assert (output.algebra_per_tensor or 0.0) < 1e-10
    assert (output.algebra_per_channel or 0.0) > 1e-4


def test_a_fault_at_the_border_is_located_there() -> None:
    original = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    broken = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"))
    broken.load_state_dict(original.state_dict())
    comparison = verify(original, broken, example())
    assert not comparison.passed
    assert {output.worst_location for output in comparison.outputs} == {"border"}
