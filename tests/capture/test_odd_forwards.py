"""Forwards that a graph captured from one example could get wrong on another input or in a second call.

Each is fused unverified, in float64. It either answers as the original does, in every call of a sequence; or the fused
model stops with a reason on inputs for which it was not captured; or `fuse` refuses it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reparam import CaptureError, InputError, OtherInputError, fuse
from tests.support import relative_error

Forward = Callable[..., Any]


class Norm(nn.Module):
    """Convolution and BatchNorm, 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 1.5)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class Odd(nn.Module):
    """Parts, and a forward from the table."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.linear = Norm(), Norm(), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        self.register_buffer("state", torch.ones(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.calls, self.last, self.seen = 0, None, []
        self._forward = forward

    def forward(self, *args: Any) -> Any:
        return self._forward(self, *args)


def odd(forward: Forward) -> nn.Module:
    """A module whose forward has the signature of the function (not `*args`)."""
    cls = type("Odd", (Odd,), {"forward": forward})
    return cls(forward).double().eval()


def image(batch: int = 1, height: int = 8, width: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch + height + width)
    return torch.randn(batch, 4, height, width, generator=generator, dtype=torch.float64)


IMAGES = ((image(),), (image(2),), (image(2, 11, 13),), (image(3, 16, 16),))
VECTORS = ((image(1, 1, 1),), (image(2, 1, 1),))


# In place, through views that are only views at some sizes.


def crop(s, x):
    x = s.a(x)
    y = x[:, :, :8, :8]
    y.relu_()
    return s.b.conv(x)


def swap_axes(s, x):
    x = s.a(x)
    y = x.transpose(0, 1).contiguous()
    y.relu_()
    return y.transpose(0, 1) + x


def reshape(s, x):
    x = s.a(x)
    F.relu(x.transpose(0, 1).reshape(4, -1), inplace=True)
    return x * 2


def dropout_is_the_same_tensor(s, x):
    x = s.a(x)
    F.dropout(x, training=s.training).relu_()
    return s.b(x)


def detached(s, x):
    x = s.a(x)
    d = x.detach()
    x.relu_()
    return s.b(d)


def part(s, x):
    x = s.a(x)
    x.chunk(2, 1)[0].relu_()
    return s.b(x)


def several_at_once(s, x):
    x = s.a(x)
    y = s.b(x)
    torch._foreach_add_([x, y], 1.0)
    return x * y


def two_outputs(s, x):
    x = s.a(x)
    values, where = torch.empty_like(x[:, 0]), torch.empty_like(x[:, 0], dtype=torch.long)
    torch.max(x, 1, out=(values, where))
    return x + values.unsqueeze(1)


# What Python asks of a tensor.


def is_a_tensor(s, x):
    if isinstance(x, torch.Tensor) and not isinstance(x, (list, tuple)):
        x = x * 2
    return s.a(x)


def a_size_is_an_int(s, x):
    if isinstance(x.shape[2], int) and isinstance(x.shape, tuple):
        x = x * 2
    return s.a(x)


def what_a_tensor_has_not(s, x):
    if hasattr(x, "tensors") or getattr(x, "mask", None) is not None:
        x = x * 2
    return s.a(x)


def no_weights(s, x):
    tokens = s.a(x).flatten(2).permute(2, 0, 1)
    eye = torch.eye(4, dtype=x.dtype)
    y, weights = F.multi_head_attention_forward(
        tokens, tokens, tokens, 4, 2, torch.cat([eye] * 3), None, None, None, False, 0.0, eye, None, need_weights=False
    )
    return y * 2 if weights is None else y


def stashed(s, x):
    s.last = s.a(x)
    s.seen.append(s.last)
    return s.b(s.last)


def state_in_place(s, x):
    s.state.mul_(0.5).add_(x.mean())
    return s.a(x) * s.state


def statistics_in_place(s, x):
    s.a.norm.running_mean.mul_(0.9)
    return s.a(x)


def statistics_through_a_function(s, x):
    norm = s.b.norm
    return F.batch_norm(s.a.conv(x), norm.running_mean, norm.running_var, training=True) * s.b(x)


# Tensors that are made without the input, in every call, and then written to.


def accumulator(s, x):
    total = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
    total += s.a(x).mean((0, 2, 3), keepdim=True)
    return s.b(x) + total


def accumulator_under_a_view(s, x):
    total = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
    half = total[:, :2]
    half += x.mean()
    return s.b(x) + total


def assigned_item(s, x):
    total = torch.zeros(1, 4, 1, 1, dtype=torch.float64)
    total[:, 1:2] = x.mean()
    return s.b(x) + total


EXACT: list[tuple[Forward, tuple[Any, ...]]] = [
    (crop, IMAGES),
    (swap_axes, IMAGES),
    (swap_axes, IMAGES[::-1]),
    (reshape, IMAGES),
    (reshape, IMAGES[::-1]),
    (dropout_is_the_same_tensor, IMAGES),
    (detached, IMAGES),
    (part, IMAGES),
    (several_at_once, IMAGES),
    (two_outputs, IMAGES),
    (is_a_tensor, IMAGES),
    (a_size_is_an_int, IMAGES),
    (what_a_tensor_has_not, IMAGES),
    (no_weights, IMAGES),
    (stashed, IMAGES),
    (state_in_place, IMAGES),
    (statistics_in_place, IMAGES),
    (statistics_through_a_function, IMAGES),
    (accumulator, IMAGES),
    (accumulator_under_a_view, IMAGES),
    (assigned_item, IMAGES),
]


def call(module: nn.Module, arguments: Any) -> Any:
    with torch.no_grad():
        return module(*copy.deepcopy(arguments))


@pytest.mark.parametrize(("forward", "inputs"), EXACT, ids=[f"{f.__name__}-{len(i[0][0])}" for f, i in EXACT])
def test_every_call_answers_as_the_original(forward: Forward, inputs: tuple[Any, ...]) -> None:
    original = odd(forward)
    fused = fuse(odd(forward), copy.deepcopy(inputs[0]), verify=False).module
    for arguments in (*inputs, *inputs):
        assert relative_error(call(original, arguments), call(fused, arguments)) < 1e-12


# Functions in which a tensor may stand for a number: torch takes a proxy for a tensor there.

OF_NUMBERS: dict[str, Forward] = {
    "pow": lambda s, x: torch.pow(s.a(x), 2) + torch.pow(2, x),
    "where": lambda s, x: torch.where(s.a(x) > 0, x, 0.0) + torch.where(x > 0, 1.0, x),
    "where_in_two": lambda s, x: torch.where(x.mean((2, 3)) > 0),
    "remainder": lambda s, x: torch.remainder(x, 2) + torch.fmod(x, 2) + torch.floor_divide(x, 2),
    "clamp": lambda s, x: torch.clamp(x, min=x * 0.5) + torch.clamp(x, 0, 1) + torch.clamp_min(x, 0),
    "xlogy": lambda s, x: torch.special.xlogy(x.abs(), 2) + torch.special.zeta(x.abs() + 2, 2),
    "float_power": lambda s, x: torch.float_power(x, 2) + torch.Tensor.pow(x, 3),
    "bits": lambda s, x: torch.bitwise_and(x.long(), 1) * torch.result_type(x, 2).itemsize,
    "constants": lambda s, x: (
        torch.ones(8).double() ** x + torch.ones(8).double().pow(x) + torch.ones(8).remainder(x.abs() + 1)
    ),
}


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_functions_of_tensors_or_numbers(name: str) -> None:
    original, fused = odd(OF_NUMBERS[name]), fuse(odd(OF_NUMBERS[name]), image(), verify=False).module
    for x in (image(), image(2)):
        expected, actual = call(original, (x,)), call(fused, (x,))
        for a, b in zip(
            expected if isinstance(expected, tuple) else (expected,),
            actual if isinstance(actual, tuple) else (actual,),
            strict=True,
        ):
            assert torch.equal(a, b) or relative_error(a, b) < 1e-12


# Forwards that go another way on another input.


def squeezed(s, x):
    x = s.a(x).mean((2, 3), keepdim=True).squeeze()
    return s.linear(x.unsqueeze(0) if x.dim() == 1 else x)


def unbatched(s, x):
    return s.a(x.unsqueeze(0) if len(x.shape) == 3 else x)


def optional_in_a_tuple(s, x, state):
    h, c = state
    return s.a(x * 2 if c is None else x) + h


def optional_in_a_dict(s, x, extra):
    return s.a(x) + extra["a"] if extra["b"] is None else s.a(x)


def get(s, x, extra):
    return s.a(x) * 2 if extra.get("b") is None else s.a(x)


def contained(s, x, extra):
    return s.a(x) if "b" in extra else s.a(x) * 2


def items(s, x, extra):
    for key, value in extra.items():
        x = x + value * len(key)
    return s.a(x)


def mode(s, x, options):
    return s.a(x) if options["mode"] == "a" else s.b(x)


OTHERWISE: list[tuple[Forward, Any, Any, str]] = [
    (squeezed, VECTORS[0], VECTORS[1], "a tensor of 1 dims"),
    (squeezed, VECTORS[1], VECTORS[0], "a tensor of 2 dims"),
    (unbatched, (image(),), (image()[0],), "a tensor of 4 dims"),
    (optional_in_a_tuple, (image(), (image(), None)), (image(), (image(), image())), "=None"),
    (optional_in_a_dict, (image(), {"a": image(), "b": None}), (image(), {"a": image(), "b": image()}), "=None"),
    (get, (image(), {"a": image()}), (image(), {"a": image(), "b": image()}), "the keys"),
    (contained, (image(), {"a": image()}), (image(), {"a": image(), "b": image()}), "the keys"),
    (items, (image(), {"a": image(), "bb": image()}), (image(), {"bb": image(), "a": image()}), "the keys"),
    (mode, (image(), {"mode": "a"}), (image(), {"mode": "b"}), "'a'"),
]


@pytest.mark.parametrize(
    ("forward", "example", "other", "phrase"), OTHERWISE, ids=[f"{f.__name__}-{p}" for f, _, _, p in OTHERWISE]
)
def test_another_way_through_the_forward_stops(forward: Forward, example: Any, other: Any, phrase: str) -> None:
    original = odd(forward)
    fused = fuse(original, copy.deepcopy(example), verify=False).module
    assert relative_error(call(original, example), call(fused, example)) < 1e-12
    call(original, other)
    with pytest.raises(OtherInputError, match=phrase):
        call(fused, other)


# Forwards that no graph can hold.


def counter(s, x):
    s.calls += 1
    return s.a(x) * s.calls


def counting_buffer(s, x):
    s.count += 1
    return s.a(x) * s.count


def memory(s, x):
    y = s.a(x) if s.last is None else s.a(x) + s.last
    s.last = y.mean()
    return y


def decision_from_state(s, x):
    s.state.add_(1.0)
    return s.a(x) * 2 if s.state > 2.5 else s.a(x)


def number_from_state(s, x):
    s.state.add_(1.0)
    return s.a(x) * float(s.state)


def noise(s, x):
    return s.a(x) + torch.rand(1, dtype=torch.float64)


def python_noise(s, x):
    return s.a(x) + random.random()


def autocast(s, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.linear(s.a(x).float(), s.linear.weight.float()[:, :1].repeat(1, x.shape[3]))


def assigned_data(s, x):
    y = s.a(x)
    y.data = y.data * 2
    return s.b(y)


def constrained_weight(s, x):
    s.a.conv.weight.data = torch.renorm(s.a.conv.weight.data, 2, 0, 0.5)
    return s.a(x)


def clamped_weight(s, x):
    s.scale.data.clamp_(-0.5, 0.5)
    return s.a(x) * s.scale.view(-1, 1, 1)


def batch_statistics_for_once(s, x):
    s.b.norm.train()
    y = s.b(x)
    s.b.norm.eval()
    return s.a(y)


def one_module_two_strides(s, x):
    s.a.conv.stride = (2, 2)
    y = s.a.conv(x)
    s.a.conv.stride = (1, 1)
    return y


def assigned_buffer(s, x):
    s.state = s.state * 0.5
    return s.a(x) * s.state


REFUSED: list[tuple[Forward, str]] = [
    (counter, "changes calls"),
    (counting_buffer, "changes count"),
    (memory, "changes last"),
    (decision_from_state, "writes to state"),
    (number_from_state, "writes to state"),
    (noise, "random number"),
    (python_noise, "random number"),
    (autocast, "autocast"),
    (assigned_data, "assignment of 'data'"),
    (constrained_weight, "assignment of 'data'"),
    (clamped_weight, "writes to the parameter scale"),
    (batch_statistics_for_once, "changes b.norm.training"),
    (one_module_two_strides, "changes a.conv.stride"),
    (assigned_buffer, "state"),
]


@pytest.mark.parametrize(("forward", "phrase"), REFUSED, ids=[f.__name__ for f, _ in REFUSED])
def test_what_no_graph_can_hold_is_refused(forward: Forward, phrase: str) -> None:
    original = odd(forward)
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    random_state = torch.get_rng_state()
    with pytest.raises(CaptureError, match=phrase):
        fuse(original, image(), verify=False)
    assert torch.equal(random_state, torch.get_rng_state())
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_the_forward_leaves_behind_is_noted_and_undone() -> None:
    original = odd(stashed)
    result = fuse(original, image(), verify=False)
    assert any("changes last, seen" in note for note in result.report.notes)
    assert original.last is None
    assert not original.seen


def test_verification_leaves_out_what_the_fused_model_refuses_and_says_so() -> None:
    comparison = fuse(odd(squeezed), VECTORS[1]).report.comparison
    assert comparison is not None
    assert comparison.passed
    skipped = [case for case in comparison.cases if case.status == "skipped"]
    assert any("the candidate refuses it (this model was captured for" in note for c in skipped for note in c.notes)


def test_weights_that_are_not_there_yet() -> None:
    with pytest.raises(InputError, match="has no values yet"):
        fuse(nn.Sequential(nn.LazyConv2d(4, 3)), image())
