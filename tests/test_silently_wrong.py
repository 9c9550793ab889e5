"""Models on which folding by pattern is silently wrong: ours is exact, and says why whatever stays."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reparam
from reparam.errors import OtherInputError, ReparamError
from tests.support import EXACT, assert_unchanged, executed_counts, relative_error, sampled, snapshot, static_counts
from tests.zoo.arithmetic import ARITHMETIC
from tests.zoo.case import bn, conv, conv_bn
from tests.zoo.chance_traps import CHANCE
from tests.zoo.channel_traps import CHANNELS
from tests.zoo.layout_traps import LAYOUTS
from tests.zoo.peers import PEERS
from tests.zoo.trap import Lambda, Trap, output_of
from tests.zoo.traps import TRAPS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")

ALL = [*PEERS, *TRAPS, *ARITHMETIC, *CHANNELS, *LAYOUTS, *CHANCE]


def by_name(trap: Trap) -> str:
    return trap.name


@functools.cache
def fused(name: str) -> tuple[nn.Module, Any]:
    """(original, result without verification) of the trap; the result is None if the model is refused and may be."""
    trap = next(trap for trap in ALL if trap.name == name)
    model = trap.make()
    try:
        return model, reparam.fuse(model, trap.example(), verify=False)
    except ReparamError as error:
        if not trap.may_refuse or "\n" in str(error).strip():
            raise
        return model, None


@pytest.mark.parametrize("trap", ALL, ids=by_name)
def test_engine_alone_is_exact(trap: Trap) -> None:
    """Without verification, so that nothing but the engine stands between the user and a wrong answer."""
    model, result = fused(trap.name)
    if result is None:
        return
    for batch in (None, *trap.batches):
        x = trap.example(batch)
        assert relative_error(output_of(model, x), output_of(result.module, x)) < EXACT, batch


@pytest.mark.parametrize("trap", sampled(ALL, 5), ids=by_name)
def test_verified_and_untouched(trap: Trap) -> None:
    """With verification: accepted, or refused as a whole; the caller's model stays as it was in training mode."""
    model = trap.make().train()
    before = snapshot(model)
    try:
        result = reparam.fuse(model, trap.example())
    except ReparamError:
        if not trap.may_refuse:
            raise
    else:
        assert result.report.comparison.passed
        x = trap.example()
        assert relative_error(output_of(copy.deepcopy(model).eval(), x), output_of(result.module, x)) < EXACT
    assert_unchanged(before, model)


@pytest.mark.parametrize("trap", [trap for trap in ALL if not trap.may_refuse], ids=by_name)
def test_folded_or_refused_with_a_reason(trap: Trap) -> None:
    _, result = fused(trap.name)
    assert result is not None
    static, executed = static_counts(result.module), executed_counts(result.module, trap.example())
    refusals = [f"{r.where}: {r.subject}: {r.reason}" for r in result.report.refusals]
    expected = dict(trap.expected or {})
    assert {kind: static[kind] for kind in expected} == expected, refusals
    assert {kind: executed[kind] for kind in expected} == expected, refusals
    about_norms = [text for text in refusals if "norm" in text.lower()]
    assert static["bn"] <= len(about_norms), refusals
    if trap.mentions:
        assert any(word in text.lower() for text in refusals for word in trap.mentions), refusals


@pytest.mark.parametrize(
    "trap",
    [t for t in ALL if t.flexible or t.name.startswith(("same", "reflect", "branches", "swapped"))],
    ids=by_name,
)
def test_other_image_sizes(trap: Trap) -> None:
    model, result = fused(trap.name)
    for size in ((6, 6), (9, 12), (13, 7)):
        inputs = trap.example()
        x = torch.randn(3, 4, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        inputs = tuple(x.clone() for _ in inputs) if isinstance(inputs, tuple) else x
        assert relative_error(output_of(model, inputs), output_of(result.module, inputs)) < EXACT, size


def test_control_flow_on_the_size_is_right_at_other_sizes_or_refused_there() -> None:
    trap = next(trap for trap in ALL if trap.name == "branch_on_the_size")
    model = trap.make()
    result = reparam.fuse(model, trap.example())
    for width in (5, 7):
        x = torch.randn(2, 4, 7, width, dtype=torch.float64)
        assert relative_error(output_of(model, x), output_of(result.module, x)) < EXACT
    with pytest.raises(OtherInputError, match=r"a condition False at arithmetic.py"):
        output_of(result.module, torch.randn(2, 4, 7, 11, dtype=torch.float64))


@pytest.mark.parametrize(
    "name", ["registered_in_another_order", "three_branches", "plus_equals_branches", "two_inputs"]
)
def test_fusing_twice_changes_nothing(name: str) -> None:
    trap = next(trap for trap in ALL if trap.name == name)
    result = reparam.fuse(trap.make(), trap.example())
    again = reparam.fuse(result.module, trap.example())
    assert static_counts(again.module) == static_counts(result.module)
    first, second = result.module.state_dict(), again.module.state_dict()
    assert len(first) == len(second)
    for a, b in zip(first.values(), second.values(), strict=True):
        assert torch.equal(a, b)
    original_again = reparam.fuse(trap.make(), trap.example())
    assert (
        relative_error(output_of(result.module, trap.example()), output_of(original_again.module, trap.example())) == 0
    )


@pytest.mark.parametrize("trap", [trap for trap in CHANCE if trap.name.endswith("_always")], ids=by_name)
def test_random_in_eval_mode_is_refused(trap: Trap) -> None:
    """Also dropout that is left on on purpose: nothing is removed, and nothing random comes back."""
    for verify in (True, False):
        with pytest.raises(ReparamError, match=r"random"):
            reparam.fuse(trap.make(), trap.example(), verify=verify)


class WithFlag(nn.Module):
    """An optional argument with a default, as backbones have."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = conv_bn(2, 4, 4, 3), conv(2, 4, 2, 1)

    def forward(self, x: torch.Tensor, embed: bool = False, scale: float = 2.0) -> torch.Tensor:
        y = F.relu(self.block(x))
        return y if embed else self.head(y) * scale


def test_optional_arguments_are_kept_or_refused() -> None:
    """The fused module takes the same call; another value of a flag is honoured or raises, and is never ignored."""
    model = WithFlag().double().eval()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    module = reparam.fuse(model, x).module
    assert relative_error(output_of(model, x), output_of(module, x)) < EXACT
    assert relative_error(output_of(model, {"x": x}), output_of(module, {"x": x})) < EXACT
    for other in ({"x": x, "embed": True}, {"x": x, "scale": 3.0}):
        try:
            actual = output_of(module, other)
        except (TypeError, ValueError, AssertionError, RuntimeError, ReparamError):
            continue
        assert relative_error(output_of(model, other), actual) < EXACT, other


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_combined_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    model = nn.Sequential(
        conv_bn(2, 4, 6, 3, bias=True), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5), nn.BatchNorm1d(5)
    )
    for norm in (model[0][1], model[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    model = model.to(dtype).eval()
    x = torch.randn(2, 4, 6, 6).to(dtype)
    half = reparam.fuse(model, x).module.state_dict()
    double = reparam.fuse(copy.deepcopy(model).double(), x.double()).module.state_dict()
    assert half.keys() == double.keys()
    for name, weight in half.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, double[name].to(dtype)), name


def test_float16_overflow_is_noticed() -> None:
    """The merged weight does not fit float16 although every activation does: it must stay finite or be refused."""
    layer, norm = conv(2, 4, 4, 1), bn(2, 4, eps=1e-5)
    with torch.no_grad():
        layer.weight.fill_(200.0)
        norm.weight.fill_(500.0)
    model = nn.Sequential(layer, norm).half().eval()
    x = torch.full((2, 4, 3, 3), 1e-5, dtype=torch.float16)
    expected = output_of(model, x)
    assert torch.isfinite(expected).all()
    try:
        result = reparam.fuse(model, x, verify=False)
    except ReparamError:
        return
    assert relative_error(expected.double(), output_of(result.module, x).double()) < 1e-2
    assert result.report.refusals


def test_a_hundredfold_error_is_not_equivalent() -> None:
    model = conv(2, 4, 4, 3).double()
    scaled = Lambda(lambda m, x: 100 * m.inner(x), inner=copy.deepcopy(model))
    assert not reparam.verify(model, scaled, torch.randn(2, 4, 8, 8, dtype=torch.float64)).passed


def test_an_exported_program_is_fused_or_refused() -> None:
    trap = next(trap for trap in ALL if trap.name == "three_branches")
    model, x = trap.make(), trap.example()
    exported = torch.export.export(model, (x,)).module()
    try:
        result = reparam.fuse(exported, x)
    except ReparamError:
        return
    assert relative_error(output_of(model, x), output_of(result.module, x)) < EXACT


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 4), (0,)])
def test_inputs_of_the_wrong_shape_get_one_sentence(shape: tuple[int, ...]) -> None:
    with pytest.raises(ReparamError) as caught:
        reparam.fuse(conv_bn(2, 4, 4, 3).eval(), torch.randn(shape))
    assert str(caught.value).strip()
    assert "\n" not in str(caught.value)


def test_a_model_that_caches_what_it_computed_is_left_alone() -> None:
    """Attention biases are often cached on first use; tracing must not leave proxies or tensors behind."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        if "7" not in m.cache:
            m.cache["7"] = m.table[:, m.index].sum(-1).view(1, -1, 1, 1)
        return F.relu(m.block(x)) + m.cache["7"]

    model = Lambda(
        forward, block=conv_bn(2, 4, 4, 3), table=nn.Parameter(torch.randn(4, 5)), index=torch.tensor([0, 2])
    )
    model.cache = {}
    model.double().eval()
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    first = reparam.fuse(model, x)
    assert model.cache == {}
    second = reparam.fuse(model, x)
    assert relative_error(output_of(first.module, x), output_of(second.module, x)) == 0
    assert relative_error(output_of(copy.deepcopy(model), x), output_of(first.module, x)) < EXACT


class Anything(nn.Module):
    """Takes its tensors as `*args`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), bn(2, 4)

    def forward(self, *images: torch.Tensor) -> torch.Tensor:
        return sum(self.norm(self.conv(image)) for image in images)  # type: ignore[return-value]


def test_variable_arguments_are_fixed_to_the_example_and_say_so() -> None:
    model, x = Anything().double().eval(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    result = reparam.fuse(model, (x, 2 * x), verify=False)
    assert relative_error(model(x, x + 1), result.module(x, x + 1)) < EXACT
    with pytest.raises(ValueError, match="captured for 2 elements"):
        result.module(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parametrised_weights_are_computed_in_float64(dtype: torch.dtype) -> None:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    model = nn.Sequential(conv, bn(2, 6), nn.ReLU()).to(dtype).eval()
    result = reparam.fuse(model, torch.randn(2, 4, 8, 8, dtype=dtype))
    assert result.report.comparison is not None
    assert result.report.comparison.passed
    assert result.report.after.batch_norms == 0
