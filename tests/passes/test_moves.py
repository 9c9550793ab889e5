"""Scales and shifts that move to a layer that absorbs them, and those that must not.

Every model is fused without verification, so that nothing but the pass stands between a wrong move and the answer.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reparam
from reparam.graph.nodes import module_of
from reparam.passes import moves
from reparam.passes.collapse import Collapse
from reparam.passes.inference_form import InferenceForm
from tests.passes.moves_cases import ACCEPT, ALL, REFUSE, ROUNDS, TRAPS, Case, Scaled, by_name, by_rank, channels, norm
from tests.support import (
    EXACT,
    assert_unchanged,
    executed_counts,
    relative_error,
    run,
    sampled,
    snapshot,
    static_counts,
)
from tests.zoo.case import conv
from tests.zoo.trap import Lambda
from tools import timm_zoo

WITHOUT_MOVES = (InferenceForm(), Collapse())


def moved(result: Any) -> int:
    return sum(rewrite.pass_name == "moves" for rewrite in result.report.rewrites)


@pytest.mark.parametrize("case", ALL, ids=by_name)
def test_exact_and_as_expected(case: Case) -> None:
    model = case.make()
    before = snapshot(model)
    x, *others = case.inputs()
    result = reparam.fuse(model, x, verify=False)
    for other in (x, *others):
        kept = other.clone()
        assert relative_error(run(model, other), result.module(other)) < EXACT, other.shape
        assert torch.equal(kept, other), "the caller's input was written to"
    assert_unchanged(before, model)
    static, executed = static_counts(result.module), executed_counts(result.module, x)
    refusals = [f"{r.where}: {r.subject}: {r.reason}" for r in result.report.refusals]
    assert {kind: static[kind] for kind in case.left} == case.left, refusals
    assert {kind: executed[kind] for kind in case.left} == case.left, refusals
    assert moved(result) == case.moves
    assert any(case.reason in text for text in refusals) or not case.reason, refusals
    places = [r.where for r in result.report.refusals]
    assert len(places) == len(set(places)), refusals


@pytest.mark.parametrize("case", sampled(ALL, 3), ids=by_name)
def test_no_operation_is_added(case: Case) -> None:
    model, (x, *_) = case.make(), case.inputs()
    with_moves = reparam.fuse(model, x, verify=False).module
    without = reparam.fuse(model, x, verify=False, passes=WITHOUT_MOVES).module
    called = [Counter(n.op for n in m.graph.nodes if n.op.startswith("call")).total() for m in (with_moves, without)]
    assert called[0] <= called[1]


@pytest.mark.parametrize("case", sampled(ALL, 3), ids=by_name)
def test_fusing_again_changes_nothing(case: Case) -> None:
    model, (x, *_) = case.make(), case.inputs()
    once = reparam.fuse(model, x, verify=False)
    twice = reparam.fuse(once.module, x, verify=False)
    assert moved(twice) == 0
    assert [(n.op, n.target) for n in twice.module.graph.nodes if n.op == "call_module"] == [
        (n.op, n.target) for n in once.module.graph.nodes if n.op == "call_module"
    ]
    assert relative_error(once.module(x), twice.module(x)) < EXACT


@pytest.mark.parametrize(
    ("case", "dtype"),
    sampled(
        [
            *((case, dtype) for case in [*ACCEPT, *REFUSE] for dtype in (torch.float32, torch.float16)),
            *((case, torch.bfloat16) for case in by_rank(2)),
        ],
        5,
    ),
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_verified_in_other_dtypes(case: Case, dtype: torch.dtype) -> None:
    """Weights are combined in float64 and rounded once: verification asks for 1e-10 before rounding."""
    model, (x, *_) = case.make(dtype), case.inputs(dtype)
    result = reparam.fuse(model, x)
    assert result.report.comparison is not None
    assert result.report.comparison.passed
    assert {tensor.dtype for tensor in result.module.state_dict().values() if tensor.is_floating_point()} <= {dtype}
    assert result.module(x).dtype == dtype
    assert moved(result) == case.moves


# --- what the conditions guard against: each is shown to matter by taking it away


@pytest.mark.parametrize(
    "name",
    [
        "negative, ReLU",
        "negative, max pooling",
        "negative, forwards",
        "negative number",
        "shift, ReLU",
        "shift, forwards",
    ],
)
def test_sabotage_sign_and_shift(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in REFUSE if case.name == name)
    monkeypatch.setattr(moves, "_obstacle", lambda *_: None)
    model, (x, *_) = case.make(), case.inputs()
    result = reparam.fuse(model, x, verify=False)
    assert moved(result) == 1
    assert relative_error(run(model, x), result.module(x)) > 1e-3
    with pytest.raises(reparam.NotEquivalentError):
        reparam.fuse(model, x, strict=True)


def test_sabotage_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """`0 * max(x)` is NaN where `max(0 * x)` would be a number: an infinity in a window of finite numbers."""
    case = next(case for case in REFUSE if case.name == "zero")
    monkeypatch.setattr(moves, "_obstacle", lambda *_: None)
    model, (x, *_) = case.make(), case.inputs()
    model[0].weight.data[1, 0] = -1e308
    x[0, 0] = 1e30
    result = reparam.fuse(model, x, verify=False)
    assert moved(result) == 1
    assert relative_error(run(model, x), result.module(x)) == float("inf")


def test_sabotage_second_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in TRAPS if case.name == "the operation has another reader")
    first = lambda node: next(iter(node.users), None)  # noqa: E731
    monkeypatch.setattr(moves, "only_reader", first)
    monkeypatch.setattr("reparam.passes.scaling.only_reader", first)
    model, (x, *_) = case.make(), case.inputs()
    result = reparam.fuse(model, x, verify=False)
    assert moved(result) == 1
    assert relative_error(run(model, x), result.module(x)) > 1e-3


def test_sabotage_rounded_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second round that read the first one's layers after rounding would round twice; verification sees it."""
    case = ROUNDS[0]
    model, (x, *_) = case.make(torch.float32), case.inputs(torch.float32)
    assert reparam.fuse(model, x).report.comparison is not None
    monkeypatch.setattr("reparam.graph.lift._unrounded", module_of)
    with pytest.raises(reparam.NotEquivalentError):
        reparam.fuse(model, x, strict=True)


def test_sabotage_rounded_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the constants of a moved scale and shift."""
    case = next(case for case in ACCEPT if case.name == "conv, pool, norm, rank 2")
    model, (x, *_) = case.make(torch.float32), case.inputs(torch.float32)
    assert reparam.fuse(model, x).report.comparison is not None
    monkeypatch.setattr("reparam.graph.constants._unrounded", lambda node, value: value)
    with pytest.raises(reparam.NotEquivalentError):
        reparam.fuse(model, x, strict=True)


# --- one by one


def test_in_place_relu_does_not_write_to_the_models_input() -> None:
    """`relu_(x * s)` becomes `relu(x) * s`: what was written to was fresh, and is now the caller's tensor."""
    model = nn.Sequential(Scaled(channels(3)), nn.ReLU(inplace=True), conv(2, 3, 8, 3)).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    result = reparam.fuse(model, x, verify=False)
    kept = x.clone()
    result.module(x)
    assert moved(result) == 1
    assert torch.equal(x, kept)


def test_in_place_relu_does_not_write_to_a_view_of_another_tensor() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.tanh()
        a, _ = y.chunk(2, 1)
        return self.conv(F.relu_(a * self.scale)) + y.sum(1, keepdim=True)

    model = Lambda(forward, conv=conv(2, 3, 8, 3), scale=channels(3)).double().eval()
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    result = reparam.fuse(model, x, verify=False)
    assert moved(result) == 1
    assert relative_error(run(model, x), result.module(x)) < EXACT


def test_hooks_of_an_operation_are_not_lost() -> None:
    """A hook on the ReLU sees what it saw."""
    model = nn.Sequential(conv(2, 3, 8, 3), nn.ReLU(), norm(8, shift=False), nn.Sigmoid()).double().eval()
    model[1].register_forward_hook(lambda module, args, out: out + 1)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    result = reparam.fuse(model, x, verify=False)
    assert relative_error(run(model, x), result.module(x)) < EXACT


def test_overflow_of_merged_weights() -> None:
    """In float16 the merged weights would be infinite; the scale stays behind the ReLU."""
    model = nn.Sequential(conv(2, 3, 8, 3), nn.ReLU(), Scaled(torch.full((1,), 3e4)), nn.Sigmoid()).eval()
    model[0].weight.data.uniform_(10, 20)
    x = (torch.rand(2, 3, 9, 9) * 1e-3).half()
    result = reparam.fuse(model.half(), x, verify=False)
    assert moved(result) == 0
    assert any("overflow" in refusal.reason for refusal in result.report.refusals)


def test_underflow_of_merged_weights() -> None:
    """Merged weights of 1e-8 are zero in float16."""
    model = nn.Sequential(nn.Sigmoid(), Scaled(torch.full((1,), 1e-6)), nn.ReLU(), conv(2, 3, 8, 3)).eval()
    x = torch.randn(2, 3, 9, 9)
    assert moved(reparam.fuse(model, x)) == 1
    half = reparam.fuse(model.half(), x.half(), verify=False)
    assert moved(half) == 0
    assert any("underflow float16" in refusal.reason for refusal in half.report.refusals)


def test_offset_in_front_of_a_padded_conv_is_bounded() -> None:
    """In float32 up to 1/sqrt(eps) = 2896; beyond it the norm stays."""
    x = torch.randn(2, 3, 9, 9)
    for offset, moves_ in ((2e3, 1), (4e3, 0), (-4e3, 0)):
        scale = torch.full((1,), 0.01)
        model = nn.Sequential(nn.Tanh(), Scaled(scale, offset * scale), conv(2, 3, 8, 3)).eval()
        assert moved(reparam.fuse(model, x)) == moves_


def test_what_stays_says_why_once() -> None:
    """The shift that is left of a norm, and a norm that stays: one refusal each, the more precise one."""
    x = torch.randn(2, 3, 13, 17)
    shift = nn.Sequential(nn.Tanh(), norm(3), conv(2, 3, 8, 3)).eval()
    (refusal,) = reparam.fuse(shift, x).report.refusals
    assert (refusal.pass_name, refusal.subject, refusal.place.module) == ("collapse", "add", "1")
    assert "its shift cannot cross the zero padding" in refusal.reason
    sign = nn.Sequential(conv(2, 3, 8, 3), nn.MaxPool2d(2), norm(8, negative=3), nn.Sigmoid()).eval()
    (refusal,) = reparam.fuse(sign, x).report.refusals
    assert (refusal.pass_name, refusal.subject, refusal.place.module) == ("moves", "BatchNorm2d", "2")
    assert refusal.remedy == "train it in front of max pooling"


def test_rewrite_names_what_moved_and_why() -> None:
    model = nn.Sequential(conv(2, 3, 8, 3), nn.MaxPool2d(2), norm(8), nn.Sigmoid()).eval()
    first, second = reparam.fuse(model, torch.randn(2, 3, 13, 17)).report.rewrites
    assert (first.pass_name, second.pass_name) == ("moves", "collapse")
    assert first.replaced == ("2: BatchNorm2d",)
    assert first.replacement == "scale and shift behind 0: Conv2d"
    assert first.identity == "s * op(x) + t = op(s * x + t), op = max pooling, s > 0"


@torch.no_grad()
def real(name: str) -> nn.Module:
    """A published model with positive BatchNorm scales, as trained ones have, and scalars that are not one or zero."""
    torch.manual_seed(0)
    model = timm_zoo.create(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.abs_()
    for parameter in model.parameters():
        if parameter.numel() == 1:
            parameter.uniform_(0.5, 1.5)
    return model.double().eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "moves_", "norms"),
    [
        ("resnetv2_50", 1, 0),  # the stem's pooling stands in front of the first norm
        ("hgnetv2_b0", 3, 0),  # scales and shifts behind ReLU, in front of padded convolutions
    ],
)
def test_real_models(name: str, moves_: int, norms: int) -> None:
    model = real(name)
    x, other = (torch.randn(n, 3, size, size, dtype=torch.float64) for n, size in ((2, 64), (1, 96)))
    result = reparam.fuse(model, x, verify=False)
    assert moved(result) == moves_
    before = reparam.fuse(model, x, verify=False, passes=WITHOUT_MOVES)
    fewer = [executed_counts(r.module, x) for r in (result, before)]
    assert fewer[0].total() < fewer[1].total() or len(result.module.graph.nodes) < len(before.module.graph.nodes)
    for image in (x, other):
        assert relative_error(run(model, image), result.module(image)) < EXACT
