"""Linear operations that are registered from outside: found, folded, counted, refused with a reason, and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import reparam
from reparam import InputError, NotEquivalentError, OpCall
from reparam.algebra import AffineMap, Inexact, from_conv, from_linear, from_scale_shift, identity
from reparam.graph import register
from tests.support import EXACT, executed_counts, relative_error
from tools.timm_zoo import randomise_batch_norms

CHANNELS = 6


@torch.library.custom_op("reparam_tests::channel_affine", mutates_args=())
def channel_affine(x: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor, factor: float = 0.5) -> torch.Tensor:
    return x * (gain * factor)[:, None, None] + offset[:, None, None]


@channel_affine.register_fake
def _(x: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor, factor: float = 0.5) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("reparam_tests::grow_", mutates_args=("x",))
def grow(x: torch.Tensor) -> None:
    x.mul_(2)


def run_affine(x: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return channel_affine(x, gain, offset)  # type: ignore[no-any-return]


def affine_formula(call: OpCall) -> AffineMap:
    return from_scale_shift(call["gain"] * call["factor"], call["offset"])


def scaled(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    if bool((gain == 0).all()):  # a decision that could not be traced for a tensor that the model computes
        return torch.zeros_like(x)
    return F.relu(x * gain[:, None, None]) - F.relu(-x * gain[:, None, None])


def weighed_sum(x: torch.Tensor, y: torch.Tensor, *, share: float) -> torch.Tensor:
    return torch.where(x > 0, x, x) * share + y * (1 - share)


class Doubling(nn.Module):
    """A 3x3 convolution, doubled in a way that nobody can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.gain = nn.Parameter(torch.rand(CHANNELS) + 0.5)
        self.shift = nn.Parameter(torch.randn(CHANNELS))

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        y = self.conv(x) * scale
        y = y if float(y.detach().abs().sum()) >= 0 else -y
        return y * self.gain.exp()[:, None, None] + self.shift[:, None, None]


def doubling_formula(call: OpCall) -> AffineMap | Inexact:
    if call["scale"] == 0:
        return Inexact("it is switched off", "give it a scale")
    weight = call["conv.weight"] * (call["scale"] * call["gain"].exp())[:, None, None, None]
    return from_conv(weight, call["shift"], (1, 1), ((1, 1), (1, 1)), (1, 1), 1)


class TokenScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens @ self.weight.T if tokens.sum() < 1e30 else tokens


class Positive(nn.Module):
    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        return raw.exp()


class Around(nn.Module):
    """conv, the operation, BatchNorm, ReLU."""

    def __init__(self, middle: Callable[..., torch.Tensor], parameters: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.constants = nn.ParameterList(torch.randn(CHANNELS) for _ in range(parameters))
        self.middle = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.middle(self.conv(x), *self.constants)))


class Global(Around):
    """Calls `scaled` by its global name, as models do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(scaled(self.conv(x), self.constants[0])))


class Two(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(weighed_sum(self.conv(x), self.conv(2 * x), share=0.25)))


class Method(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x).positive()))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(5, CHANNELS), TokenScale(), nn.Linear(CHANNELS, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.last(self.scale(self.first(x))))


def ready(model: nn.Module) -> nn.Module:
    return randomise_batch_norms(model).eval()


@pytest.fixture(autouse=True)
def _seeded_and_clean() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    left = list(register._ROWS)
    for row in left:
        reparam.unregister_linear_op((*row.calls, *row.modules)[0])
    assert not left, "a test left a registration behind"


IMAGE = (2, 3, 8, 8)
# name: target, formula, options, model, input shape, layers that run before and after, operations after
FOLDED: dict[str, tuple[Any, Any, dict[str, Any], Callable[[], nn.Module], tuple[int, ...], tuple[int, int], int]] = {
    "operator": (channel_affine, affine_formula, {}, lambda: Around(run_affine, 2), IMAGE, (1, 1), 2),
    "packet": (
        torch.ops.reparam_tests.channel_affine,
        affine_formula,
        {},
        lambda: Around(torch.ops.reparam_tests.channel_affine, 2),
        IMAGE,
        (1, 1),
        2,
    ),
    "overload, called by packet": (
        torch.ops.reparam_tests.channel_affine.default,
        affine_formula,
        {"signature": ("x", "gain", "offset", "factor")},
        lambda: Around(lambda x, g, b: torch.ops.reparam_tests.channel_affine(x, g, b, factor=0.5), 2),
        IMAGE,
        (1, 1),
        2,
    ),
    "function": (
        scaled,
        lambda call: from_scale_shift(call["gain"], None),
        {},
        lambda: Global(None, 1),
        IMAGE,
        (1, 1),
        2,
    ),  # type: ignore[arg-type]
    "method": (
        "positive",
        lambda call: identity(call.channels),
        {"signature": ["input"]},
        lambda: Method(None),  # type: ignore[arg-type]
        IMAGE,
        (1, 1),
        2,
    ),
    "two operands": (
        weighed_sum,
        lambda call: tuple(
            from_scale_shift(torch.full((call.channels,), share), None) for share in (call["share"], 1 - call["share"])
        ),
        {"operands": ("x", "y")},
        lambda: Two(None),  # type: ignore[arg-type]
        IMAGE,
        (2, 1),
        2,
    ),
    "module": (Doubling, doubling_formula, {}, lambda: Around(Doubling()), IMAGE, (2, 2), 3),
    "last axis": (
        TokenScale,
        lambda call: from_linear(call["weight"], None),
        {"axis": -1},
        Tokens,
        (2, 7, 5),
        (3, 1),
        2,
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_registered_op_is_folded(name: str) -> None:
    target, formula, options, make, shape, (before, after), operations = FOLDED[name]
    model, x = ready(make()).double(), torch.randn(shape, dtype=torch.float64)
    expected = model(x)
    assert layers(model, x) == before
    with reparam.register_linear_op(target, formula, **options):
        result = reparam.fuse(model, x)
        assert result.report.comparison is not None
        assert result.report.comparison.passed
        assert relative_error(expected, result.module(x)) < EXACT
        assert executed_counts(result.module, x)["bn"] == 0
        assert layers(result.module, x) == after
        assert result.report.after.nodes == operations
        assert result.report.before.nodes > operations
        again = reparam.fuse(result.module, x)
        assert again.report.rewrites == ()
        assert again.report.after == result.report.after


def layers(model: nn.Module, x: torch.Tensor) -> int:
    """Convolutions and linear layers that run."""
    counts = executed_counts(model, x)
    return counts["conv"] + counts["linear"]


def test_float32_weights_are_rounded_once() -> None:
    """The formula gets float64, so that its own arithmetic adds nothing to the rounding of the weights."""
    seen = []

    def formula(call: OpCall) -> AffineMap | Inexact:
        seen.append((call["gain"].dtype, call["conv.weight"].dtype, call.channels, call.result.dtype))
        return doubling_formula(call)

    with reparam.register_linear_op(Doubling, formula):
        result = reparam.fuse(ready(Around(Doubling())), torch.randn(IMAGE))
    assert seen[0] == (torch.float64, torch.float64, CHANNELS, torch.float32)
    assert result.report.comparison is not None
    assert result.report.comparison.algebra_error < 1e-12


def test_parametrised_module() -> None:
    model = ready(Around(Doubling())).double()
    parametrize.register_parametrization(model.middle, "gain", Positive())
    x = torch.randn(IMAGE, dtype=torch.float64)
    with reparam.register_linear_op(Doubling, doubling_formula):
        result = reparam.fuse(model, x)
    assert executed_counts(result.module, x)["bn"] == 0
    assert relative_error(model(x), result.module(x)) < EXACT


def test_decorator_returns_the_formula() -> None:
    @reparam.register_linear_op(channel_affine)
    def formula(call: OpCall) -> AffineMap:
        return affine_formula(call)

    assert callable(formula)
    model, x = ready(Around(run_affine, 2)), torch.randn(IMAGE)
    assert reparam.fuse(model, x).report.after.nodes == 2
    reparam.unregister_linear_op(channel_affine)
    assert reparam.fuse(model, x).report.after.nodes == 4
    reparam.unregister_linear_op(channel_affine)


def test_model_that_cannot_be_traced_without_its_leaf() -> None:
    model, x = ready(Around(Doubling())), torch.randn(IMAGE)
    with pytest.raises(reparam.CaptureError, match="Around cannot be traced"):
        reparam.fuse(model, x)
    with reparam.register_linear_op(Doubling, lambda call: Inexact("it is no layer", "make it one")):
        report = reparam.fuse(model, x).report
    assert report.after.nodes == report.before.nodes == 4
    assert [(r.subject, r.reason, r.remedy) for r in report.refusals if r.where.startswith("middle")] == [
        ("Doubling", "it is no layer", "make it one")
    ]


class Switched(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.middle(self.conv(x), scale=0))  # type: ignore[call-arg]


class Computed(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return F.relu(self.norm(channel_affine(y, y.mean((0, 2, 3)), self.constants[0])))


class Constant(Around):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return weighed_sum(self.constants[0][:, None, None], self.conv(x), share=0.25)


def hooked() -> nn.Module:
    model = Around(Doubling())
    model.middle.conv.register_forward_hook(lambda module, args, out: out + 1)  # type: ignore[union-attr]
    return model


# name: target, options, model, reason
REFUSED: dict[str, tuple[Any, dict[str, Any], Callable[[], nn.Module], str]] = {
    "the formula says no": (Doubling, {}, lambda: Switched(Doubling()), "it is switched off"),
    "constant that is computed": (
        channel_affine,
        {},
        lambda: Computed(None, 1),  # type: ignore[arg-type]
        "its argument 'gain' is computed from the input",
    ),
    "operand that is constant": (
        weighed_sum,
        {"operands": ("x", "y")},
        lambda: Constant(None, 1),  # type: ignore[arg-type]
        "its argument 'x' is no tensor that the model computes",
    ),
    "argument without a name": (
        channel_affine,
        {"signature": ("x", "gain")},
        lambda: Around(run_affine, 2),
        "it is called with further arguments",
    ),
    "no such axis": (channel_affine, {"axis": 4}, lambda: Around(run_affine, 2), "its result has no axis 4"),
    "hook inside": (Doubling, {}, hooked, "it has forward hooks"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_call_is_refused_with_a_reason(name: str) -> None:
    target, options, make, reason = REFUSED[name]
    model, x = ready(make()), torch.randn(IMAGE)
    formula = doubling_formula if target is Doubling else affine_formula
    with reparam.register_linear_op(target, formula, **options):
        result = reparam.fuse(model, x)
    assert [r.reason for r in result.report.refusals if r.reason.startswith(reason)], result.report.refusals
    assert relative_error(model(x), result.module(x)) < 1e-5


# A formula whose numbers are wrong, and the shapes right: only the check of the fused model can find it.
WRONG_NUMBERS: dict[str, Callable[[OpCall], AffineMap]] = {
    "factor forgotten": lambda call: from_scale_shift(call["gain"], call["offset"]),
    "shift forgotten": lambda call: from_scale_shift(call["gain"] * call["factor"], None),
    "sign": lambda call: from_scale_shift(-call["gain"] * call["factor"], call["offset"]),
    "float32 arithmetic": lambda call: from_scale_shift(
        (call["gain"].float() / 3).double() * 3 * call["factor"], call["offset"]
    ),
    "identity": lambda call: identity(call.channels),
}


@pytest.mark.parametrize("name", WRONG_NUMBERS)
def test_wrong_formula_is_found(name: str) -> None:
    model, x = ready(Around(run_affine, 2)), torch.randn(IMAGE)
    with reparam.register_linear_op(channel_affine, WRONG_NUMBERS[name]):
        with pytest.raises(NotEquivalentError, match=r"of Around at fault") as raised:
            reparam.fuse(model, x, strict=True)
        assert raised.value.report.undone
        result = reparam.fuse(model, x)
        assert result.report.undone
        assert result.report.comparison.passed
        with torch.no_grad():
            torch.testing.assert_close(result.module(x), model(x))
        assert reparam.fuse(model, x, verify="off").report.after.nodes == 2, "the formula was not used at all"


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        (lambda call: from_scale_shift(call["gain"][:1], None), "its map from 1 to 1 channels"),
        (lambda call: from_conv(torch.ones(6, 6, 3, 3), None, (1, 1), ((0, 0),) * 2, (1, 1), 1), "does not take 'x'"),
        (lambda call: from_conv(torch.ones(6, 6, 3), None, (1,), ((1, 1),), (1,), 1), "does not take 'x'"),
        (lambda call: None, "must return an AffineMap or an Inexact, not None"),
        (lambda call: (identity(6), identity(6)), "must return an AffineMap or an Inexact, not"),
        (lambda call: from_scale_shift(call["gian"], None), "no constant argument and no attribute 'gian'"),
        (lambda call: from_scale_shift(call["x"], None), "no constant argument and no attribute 'x'"),
        (lambda call: 1 / 0, "fails: ZeroDivisionError: division by zero"),
    ],
)
def test_formula_that_does_not_fit_its_call(formula: Any, words: str) -> None:
    model, x = ready(Around(run_affine, 2)), torch.randn(IMAGE)
    with (
        reparam.register_linear_op(channel_affine, formula),
        pytest.raises(InputError, match="formula") as raised,
    ):
        reparam.fuse(model, x)
    assert words in str(raised.value)
    assert "torch.ops.reparam_tests.channel_affine.default at " in str(raised.value)


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (nn.Conv2d, {}, "torch.nn.modules.conv.Conv2d is in the lift table already: convolution"),
        (torch.add, {"signature": ("input", "other")}, "torch.add is in the lift table already: addition"),
        ("mul", {"signature": ("input", "other")}, "torch.Tensor.mul is in the lift table already: multiplication"),
        (nn.Linear(2, 2), {}, "a linear op is a function, a torch.library operator"),
        (int, {}, "a linear op is a function"),
        (3, {}, "a linear op is a function"),
        ("no_such_method", {}, "'no_such_method' is no method of torch.Tensor"),
        ("ndim", {}, "'ndim' is no method of torch.Tensor"),
        ("mul_", {}, "'mul_' is no method of torch.Tensor that returns a new tensor"),
        (grow, {}, "reparam_tests.grow_.default writes to its arguments"),
        (torch.ops.aten.add, {}, "aten.add has several overloads; register one of them, such as aten.add."),
        (torch.cumsum, {}, 'the arguments of torch.cumsum cannot be read off it; pass signature=("input", ...)'),
        (lambda *args: args[0], {}, "cannot be read off it"),
        (scaled, {"signature": "x"}, "signature='x' must be names of arguments"),
        (scaled, {"signature": ()}, "signature=() must be names of arguments"),
        (scaled, {"operands": ("z",)}, "operands=('z',) must be names out of ('x', 'gain')"),
        (scaled, {"operands": "x"}, "operands='x' must be names out of"),
        (scaled, {"axis": "channels"}, "axis='channels' must be an integer"),
        (scaled, {"formula": 3}, "the formula for tests.test_register.scaled must be a function, not 3"),
    ],
)
def test_registration_that_makes_no_sense(target: Any, options: dict[str, Any], words: str) -> None:
    options = {"formula": affine_formula, **options}
    with pytest.raises(InputError) as raised:
        reparam.register_linear_op(target, **options)
    assert words in str(raised.value)


@pytest.mark.parametrize("target", [channel_affine, Doubling, scaled, "positive"])
def test_registering_twice(target: Any) -> None:
    options = {"signature": ("x",)} if target == "positive" else {}
    with reparam.register_linear_op(target, affine_formula, **options):
        with pytest.raises(InputError, match="is in the lift table already"):
            reparam.register_linear_op(target, affine_formula, **options)
        assert len(register._ROWS) == 1
    with ExitStack() as stack:
        stack.enter_context(reparam.register_linear_op(target, affine_formula, **options))
    assert register.leaves() == type(register.leaves())()


def test_registration_ends_when_the_block_fails() -> None:
    with pytest.raises(RuntimeError, match="other"), reparam.register_linear_op(scaled, affine_formula):
        raise RuntimeError("something other")
    assert register._ROWS == []
