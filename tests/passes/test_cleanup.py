"""Operations that return what they read go, and only those; what is computed twice is computed once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import reparam
from tests.support import relative_error
from tests.zoo.trap import Lambda, Two

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
Forward = Callable[..., Any]


def left(module: nn.Module) -> Counter[str]:
    """The operations of a fused model, checks of inputs and reads of sizes aside."""
    assert isinstance(module, fx.GraphModule)
    found: Counter[str] = Counter()
    for node in module.graph.nodes:
        if node.op.startswith("call") and "tensor" in node.meta:
            found[
                type(module.get_submodule(node.target)).__name__
                if node.op == "call_module"
                else node.target
                if isinstance(node.target, str)
                else node.target.__name__
            ] += 1
    return found


GOES: dict[str, Forward] = {
    "times_one": lambda m, x: torch.sin(torch.cos(x) * 1),
    "one_times": lambda m, x: torch.sin(1.0 * torch.cos(x)),
    "over_one": lambda m, x: torch.sin(torch.cos(x) / 1),
    "plus_zero": lambda m, x: torch.sin(torch.cos(x) + 0),
    "zero_plus": lambda m, x: torch.sin(sum([torch.cos(x)])),
    "minus_zero": lambda m, x: torch.sin(torch.cos(x) - 0.0),
    "power_of_one": lambda m, x: torch.sin(torch.cos(x) ** 1),
    "times_ones": lambda m, x: torch.sin(torch.cos(x) * torch.ones(1)),
    "plus_zeros": lambda m, x: torch.sin(torch.cos(x) + torch.zeros(1, 1)),
    "negated_twice": lambda m, x: torch.sin(torch.neg(-torch.cos(x))),
    "reshape_to_its_shape": lambda m, x: torch.sin(torch.cos(x).reshape(x.shape)),
    "view_to_its_sizes": lambda m, x: torch.sin(torch.cos(x).view(x.size(0), -1, x.size(2), x.size(3))),
    "flatten_one_axis": lambda m, x: torch.sin(torch.cos(x).flatten(1, 1)),
    "permutation_of_nothing": lambda m, x: torch.sin(torch.cos(x).permute(0, 1, -2, 3)),
    "axis_with_itself": lambda m, x: torch.sin(torch.cos(x).transpose(-1, 3)),
    "cat_of_one": lambda m, x: torch.sin(torch.cat([torch.cos(x)], 1)),
    "whole_slice": lambda m, x: torch.sin(torch.cos(x)[:, :, ...]),
    "copy": lambda m, x: torch.sin(torch.cos(x).clone()),
    "slope_of_one": lambda m, x: torch.sin(F.leaky_relu(torch.cos(x), 1.0)),
    "layer_with_a_slope_of_one": lambda m, x: torch.sin(m.slope(torch.cos(x))),
    "padding_by_nothing": lambda m, x: torch.sin(F.pad(torch.cos(x), (0, 0, 0, 0))),
    "layer_that_pads_by_nothing": lambda m, x: torch.sin(m.pad(torch.cos(x))),
    "windows_of_one": lambda m, x: torch.sin(F.avg_pool2d(F.max_pool2d(torch.cos(x), 1), kernel_size=1, stride=1)),
    "layer_of_windows_of_one": lambda m, x: torch.sin(m.pool(torch.cos(x))),
    "taken_apart_and_rejoined": lambda m, x: torch.sin(torch.cat(torch.cos(x).chunk(2, 1), 1)),
    "dead_code": lambda m, x: (torch.sin(torch.cos(x)), m.a(x))[0],
}


@pytest.mark.parametrize("name", GOES)
def test_what_returns_its_input_goes(name: str) -> None:
    idle = {"slope": nn.LeakyReLU(1.0), "pad": nn.ZeroPad2d(0), "pool": nn.MaxPool2d(1)}
    model = Lambda(GOES[name], a=nn.Conv2d(4, 4, 3), **idle).eval()
    result = reparam.fuse(model, X)
    assert left(result.module) == {"cos": 1, "sin": 1}
    for x in (X, X[:1], torch.randn(3, 4, 5, 7)):
        assert torch.equal(model(x), result.module(x))
    assert reparam.fuse(result.module, X).report.rewrites == ()


STAYS: dict[str, tuple[Forward, torch.Tensor, str]] = {
    "times_almost_one": (lambda m, x: torch.sin(torch.cos(x) * (1 + 1e-6)), X, "mul"),
    "integers_times_a_float": (lambda m, x: torch.sin(x * 1.0), torch.arange(6).view(2, 3), "mul"),
    "booleans_times_one": (lambda m, x: torch.sin((x > 0) * 1), X, "mul"),
    "integers_over_one": (lambda m, x: torch.sin(x / 1), torch.arange(6).view(2, 3), "truediv"),
    "reshape_for_the_example": (lambda m, x: torch.sin(torch.cos(x).reshape(-1, 4, 6, 6)), X, "reshape"),
    "slice_for_the_example": (lambda m, x: torch.sin(torch.cos(x)[:, :4]), X, "getitem"),
    "flatten_that_flattens": (lambda m, x: torch.sin(torch.cos(x).flatten(0, 1)), X[:1], "flatten"),
    "ones_that_broadcast": (lambda m, x: torch.sin(torch.cos(x) * m.ones), X, "mul"),
    "power_of_two": (lambda m, x: torch.sin(torch.cos(x) ** 2), X, "pow"),
    "contiguous": (lambda m, x: torch.sin(torch.cos(x).contiguous()), X, "contiguous"),
    "copy_without_gaps": (
        lambda m, x: torch.sin(torch.cos(x)[:, :2].clone().view(x.shape[0], -1)),
        X,
        "clone",
    ),
    "slope_of_almost_one": (lambda m, x: torch.sin(F.leaky_relu(torch.cos(x), 0.99)), X, "leaky_relu"),
    "windows_of_one_with_strides": (lambda m, x: torch.sin(F.max_pool2d(torch.cos(x), 1, 2)), X, "max_pool2d"),
    "padding_of_one_side": (lambda m, x: torch.sin(F.pad(torch.cos(x), (0, 1))), X, "pad"),
    "minus_another": (lambda m, x: torch.sin(torch.cos(x) - torch.exp(x)), X, "sub"),
    "one_over": (lambda m, x: torch.sin(1 / (torch.cos(x) + 2)), X, "truediv"),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_looks_like_it_stays(name: str) -> None:
    forward, x, operation = STAYS[name]
    model = Lambda(forward, ones=torch.ones(4, 1, 1)).eval()
    result = reparam.fuse(model, x)
    kept = left(result.module)
    assert kept[operation] or (operation == "pow" and kept["square"]), kept
    assert relative_error(model(x), result.module(x)) < 1e-6


def test_ones_broadcast_another_input() -> None:
    """One channel becomes four: `x * ones` is not `x` there."""
    model = Lambda(lambda m, x: torch.sin(torch.cos(x) * m.ones), ones=torch.ones(4, 1, 1)).eval()
    fused = reparam.fuse(model, X).module
    assert fused(X[:, :1]).shape == model(X[:, :1]).shape == (2, 4, 6, 6)


def test_adding_zero_stays_where_the_sign_of_a_zero_matters() -> None:
    model = Lambda(lambda m, x: 1 / (F.hardshrink(x) + 0)).eval()
    x = torch.tensor([[-0.0, 0.0, 2.0, -3.0]])
    result = reparam.fuse(model, x, verify=False)
    assert torch.equal(model(x), result.module(x))
    assert torch.isposinf(result.module(x)[0, 0])
    (refusal,) = [refusal for refusal in result.report.refusals if refusal.pass_name == "cleanup"]
    assert "-0.0" in refusal.reason


@pytest.mark.parametrize(
    "forward", [lambda m, x: x * 1, lambda m, x: m.w + 0, lambda m, x: (x + 0).view(-1), lambda m, x: x.clone()]
)
def test_a_caller_gets_no_hold_on_the_input_or_on_a_weight(forward: Forward) -> None:
    model = Lambda(lambda m, x: (forward(m, x), torch.sin(x)), w=nn.Parameter(torch.ones(3))).eval()
    fused, x = reparam.fuse(model, X).module, X.clone()
    with torch.no_grad():
        first, _ = fused(x)
        before = fused(x)[0].clone()
        first.mul_(3)
        assert torch.equal(x, X)
        assert torch.equal(fused(x)[0], before)


TWICE: dict[str, tuple[Forward, dict[str, int]]] = {
    "functions": (lambda m, x: torch.cos(x).exp() * torch.cos(x).sin(), {"cos": 1}),
    "layers": (lambda m, x: torch.sin(m.a(x)) * torch.cos(m.a(x)), {"Conv2d": 1}),
    "chains": (lambda m, x: torch.sin(F.relu(m.a(x))) * torch.cos(F.relu(m.a(x))), {"Conv2d": 1, "relu": 1}),
    "sums": (lambda m, x: torch.sin(x + torch.exp(x)) * torch.cos(x + torch.exp(x)), {"exp": 1, "add": 1}),
    "constants": (lambda m, x: torch.sin(x) * m.w.exp() + torch.cos(x) * m.w.exp(), {"mul": 2, "exp": 0}),
}


@pytest.mark.parametrize("name", TWICE)
def test_what_is_computed_twice_is_computed_once(name: str) -> None:
    forward, expected = TWICE[name]
    model = Lambda(forward, a=nn.Conv2d(4, 4, 3, padding=1), w=nn.Parameter(torch.randn(4, 6, 6))).eval()
    result = reparam.fuse(model, X)
    found = left(result.module)
    assert {kind: found[kind] for kind in expected} == expected
    assert relative_error(model(X), result.module(X)) < 1e-6
    assert reparam.fuse(result.module, X).report.rewrites == ()


def test_literals_of_other_types_are_others() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        return torch.sin(x + 1) + torch.sin((x + 1.0).to(torch.int64))

    model = Lambda(forward).eval()
    result = reparam.fuse(model, torch.arange(6).view(2, 3))
    assert torch.equal(model(torch.arange(6).view(2, 3)), result.module(torch.arange(6).view(2, 3)))
    zeros = Lambda(lambda m, x: torch.copysign(x, m.z + 0.0) * torch.copysign(x, m.z - 0.0), z=torch.tensor(-0.0))
    assert torch.equal(zeros(X), reparam.fuse(zeros.eval(), X).module(X))


def test_two_tensors_that_the_model_returns_stay_two() -> None:
    model = Lambda(lambda m, x: (torch.sin(x), torch.sin(x).view(-1))).eval()
    first, second = reparam.fuse(model, X).module(X)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (lambda y: torch.cos(y.clone().mul_(2)) + y)(torch.sin(x)),
        lambda m, x: (lambda y, z: (y.add_(1), y * z)[1])(y := torch.sin(x), y.clone()),
        lambda m, x: (lambda z: (z.view(-1).add_(1), torch.cos(z))[1])(x.clone()) + x,
        lambda m, x: torch.cos(x[:, :2].clone()).view(x.shape[0], -1),
        lambda m, x: x[:, :1].expand(-1, 4, -1, -1).clone().mul_(2).sin() + x,
    ],
)
def test_copies_that_are_written_to_are_copies(forward: Forward) -> None:
    model = Lambda(forward).eval()
    fused = reparam.fuse(model, X).module
    for x in (X, torch.randn(3, 5, 5, 7)[:, :4]):
        before = x.clone()
        assert torch.equal(model(x), fused(x))
        assert torch.equal(x, before)


def test_an_operator_of_the_users_own_is_called_as_often_as_before() -> None:
    calls = []

    @torch.library.custom_op("reparam_tests::counted", mutates_args=())
    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * 2

    counted.register_fake(torch.empty_like)
    model = Lambda(lambda m, x: torch.ops.reparam_tests.counted(x) * torch.ops.reparam_tests.counted(x).sin()).eval()
    fused = reparam.fuse(model, X, verify=False).module
    calls.clear()
    assert torch.equal(model(X), fused(X))
    assert len(calls) == 4


def test_what_is_written_to_is_not_shared() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        a, b = torch.sin(x), torch.sin(x)
        a[:, 0] = 2.0
        return a * torch.cos(b)

    model = Lambda(forward).eval()
    assert torch.equal(model(X), reparam.fuse(model, X).module(X))


def test_a_tensor_that_changes_in_between_is_read_twice() -> None:
    def forward(m: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        before = m.state * x
        m.state.add_(1)
        return before + m.state * y

    def model() -> nn.Module:
        return Two(forward, state=torch.ones(1)).eval()

    original, fused = model(), reparam.fuse(model(), (X, X)).module
    for _ in range(3):
        assert torch.equal(original(X, X), fused(X, X))


def test_a_layer_called_twice_with_a_norm_each_is_merged_twice() -> None:
    """Shared before the collapse, its output would have two readers."""
    model = Lambda(lambda m, x: F.relu(m.n(m.a(x))) + torch.sin(m.o(m.a(x))), a=nn.Conv2d(4, 4, 3),
                   n=nn.BatchNorm2d(4), o=nn.BatchNorm2d(4)).eval()  # fmt: skip
    assert left(reparam.fuse(model, X).module)["BatchNorm2d"] == 0
