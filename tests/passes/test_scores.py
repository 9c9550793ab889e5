"""One number behind a product or behind views enters the layer; weights of norms enter layers where that pays."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import reparam
from tests.support import relative_error, static_counts
from tests.zoo.constants import ScaledAttention
from tests.zoo.trap import Lambda

TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
SCALE = 0.4


def heads(x: torch.Tensor) -> torch.Tensor:
    batch, tokens, _ = x.shape
    return x.reshape(batch, tokens, 2, -1).transpose(1, 2)


def joint(m: Any, x: torch.Tensor) -> Any:
    batch, tokens, _ = x.shape
    return m.qkv(x).reshape(batch, tokens, 3, 2, 3).permute(2, 0, 3, 1, 4)


def by_index(m: Any, x: torch.Tensor) -> torch.Tensor:
    qkv = joint(m, x)
    return (qkv[0] * SCALE @ qkv[1].transpose(-2, -1)).softmax(-1) @ qkv[2]


def by_chunks(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = map(heads, m.qkv(x).chunk(3, -1))
    return (q @ k.transpose(-2, -1) * SCALE).softmax(-1) @ v


def with_bias(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = joint(m, x).unbind(0)
    return ((q @ k.transpose(-2, -1)) / 2.5 + m.bias).softmax(-1) @ v


def through_convolutions(m: Any, x: torch.Tensor) -> torch.Tensor:
    image = x[:, :, :, None].transpose(1, 2)
    q, k = m.p(image).flatten(2), m.r(image).flatten(2)
    return (q.transpose(1, 2) @ k * SCALE).softmax(-1)


def by_the_size(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The factor is computed of a size that the layers fix."""
    q, k = heads(m.a(x)), heads(m.b(x))
    return ((q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(m.a(x).size(-1)))).softmax(-1)


def through_einsum(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k = heads(m.a(x)), heads(m.b(x))
    return (torch.einsum("bhid,bhjd->bhij", q, k) * SCALE).softmax(-1)


def model(forward: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    parts: dict[str, Any] = {"qkv": nn.Linear(6, 18), "a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}
    parts.update(p=nn.Conv2d(6, 4, 1), r=nn.Conv2d(6, 4, 1), bias=nn.Parameter(torch.randn(2, 5, 5)))
    return Lambda(forward, **parts).double().eval()


def scores(result: reparam.FuseResult) -> int:
    return sum(rewrite.pass_name == "scores" for rewrite in result.report.rewrites)


@pytest.mark.parametrize("forward", [by_index, by_chunks, with_bias, through_convolutions, by_the_size, through_einsum])
def test_a_number_enters_the_layer(forward: Callable[..., Any]) -> None:
    original = model(forward)
    result = reparam.fuse(original, TOKENS.double())
    assert scores(result) == 1
    assert static_counts(result.module)["mul"] == 0
    others = (torch.randn(1, 5, 6), torch.randn(3, 5 if forward is with_bias else 2, 6))
    for x in (TOKENS, *others):
        assert relative_error(original(x.double()), result.module(x.double())) < 1e-14
    assert reparam.fuse(result.module, TOKENS.double()).report.rewrites == ()


@pytest.mark.parametrize("where", ["query", "scores"])
@pytest.mark.parametrize("together", [True, False])
def test_attention_in_float32(where: str, together: bool) -> None:
    torch.manual_seed(1)
    result = reparam.fuse(ScaledAttention(where, together).eval(), TOKENS)
    assert result.report.comparison is not None
    assert result.report.comparison.passed
    assert static_counts(result.module)["mul"] == 0


def read_twice(m: Any, x: torch.Tensor) -> Any:
    q, k, v = joint(m, x).unbind(0)
    return (q * SCALE @ k.transpose(-2, -1)).softmax(-1) @ v + q.sum((0, 2, 3)).sum()


def squared(m: Any, x: torch.Tensor) -> Any:
    q = heads(m.a(x))
    return torch.tanh((q @ q) * SCALE) if q.shape[-1] == q.shape[-2] else torch.tanh(torch.matmul(q.mT, q) * SCALE)


def overlapping(m: Any, x: torch.Tensor) -> Any:
    qkv = joint(m, x)
    return torch.tanh(qkv[:2] * SCALE) + torch.tanh(qkv[1:])


def shared_layer(m: Any, x: torch.Tensor) -> Any:
    return torch.tanh(heads(m.a(x)) @ heads(m.a(x.flip(1))).mT * SCALE)


def per_head(m: Any, x: torch.Tensor) -> Any:
    return torch.tanh(heads(m.a(x)) @ heads(m.b(x)).mT * m.bias[:, :1, :1])


@pytest.mark.parametrize("forward", [read_twice, squared, overlapping, shared_layer, per_head])
def test_what_another_operation_needs_unscaled_is_not_scaled(forward: Callable[..., Any]) -> None:
    original = model(forward)
    result = reparam.fuse(original, TOKENS.double())
    assert scores(result) == 0
    assert relative_error(original(TOKENS.double()), result.module(TOKENS.double())) < 1e-14


@pytest.mark.parametrize("forward", [overlapping, shared_layer])
def test_the_reason_is_said(forward: Callable[..., Any]) -> None:
    refusals = reparam.fuse(model(forward), TOKENS.double()).report.refusals
    assert [r for r in refusals if r.pass_name == "scores" and ("channels" in r.reason or "weight" in r.reason)]


NORMS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any], torch.Tensor]] = {
    "layer": (lambda: nn.LayerNorm(6), lambda m, x: torch.tanh(m.a(m.n(x))), TOKENS),
    "layer_of_two": (lambda: nn.LayerNorm(6), lambda m, x: (lambda y: m.a(y).tanh() + m.b(y).sin())(m.n(x)), TOKENS),
    "rms": (lambda: nn.RMSNorm(6), lambda m, x: torch.tanh(m.a(m.n(x))), TOKENS),
    "group": (lambda: nn.GroupNorm(2, 6), lambda m, x: torch.tanh(m.p(m.n(x))), torch.randn(2, 6, 4, 4)),
    "function": (
        lambda: nn.LayerNorm(6),
        lambda m, x: torch.tanh(m.a(F.layer_norm(x, (6,), m.n.weight, bias=m.n.bias))),
        TOKENS,
    ),
}


def normed(name: str) -> nn.Module:
    torch.manual_seed(0)
    make, forward, _ = NORMS[name]
    norm = make()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    parts = {"n": norm, "a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "p": nn.Conv2d(6, 4, 1)}
    return Lambda(forward, **parts).double().eval()


def norm_weights(module: nn.Module) -> int:
    """Numbers that norms hold, or that functions of norms read."""
    assert isinstance(module, fx.GraphModule)
    norms = [m for m in module.modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))]
    read = [n for n in module.graph.nodes if n.target is F.layer_norm for o in n.all_input_nodes if o.op == "get_attr"]
    return sum(p.numel() for norm in norms for p in norm.parameters()) + len(read)


@pytest.mark.parametrize("name", NORMS)
def test_weights_of_norms_go_only_where_that_pays(name: str) -> None:
    original, x = normed(name), NORMS[name][2].double()
    fuse = partial(reparam.fuse, original, x)
    fewest, fastest = fuse(objective="parameters"), fuse()
    assert norm_weights(fewest.module) == 0
    assert norm_weights(fastest.module) > 0
    for result in (fewest, fastest):
        for batch in (x, x[:1]):
            assert relative_error(original(batch), result.module(batch)) < 1e-13
    assert [r.remedy for r in fastest.report.refusals if r.pass_name == "norm weights"]
    assert reparam.fuse(fewest.module, x, objective="parameters").report.rewrites == ()


def test_weights_of_a_norm_in_front_of_padding_or_a_sum_stay() -> None:
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    for forward in (lambda m, x: torch.tanh(m.q(m.n(x))), lambda m, x: torch.tanh(m.p(m.n(x))) + m.n(x).sum()):
        torch.manual_seed(0)
        parts = {"n": nn.GroupNorm(2, 6), "p": nn.Conv2d(6, 4, 1), "q": nn.Conv2d(6, 4, 3, padding=1)}
        nn.init.normal_(parts["n"].bias)
        original = Lambda(forward, **parts).double().eval()
        result = reparam.fuse(original, x, objective="parameters")
        assert norm_weights(result.module) > 0
        assert relative_error(original(x), result.module(x)) < 1e-13


def read_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The query also goes another way, by a part of it, as where a position encoding is made of it."""
    q, k, v = joint(m, x).unbind(0)
    attended = q @ (k.softmax(-2).transpose(-2, -1) @ v)
    return SCALE * attended + F.pad(q[:, :, 1:, :].sigmoid(), (0, 0, 1, 0))


def measured_and_read(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The query's size is asked for besides: that is no other reader."""
    q, k, v = joint(m, x).unbind(0)
    return ((q @ k.transpose(-2, -1)) * SCALE).softmax(-1) @ v + q.shape[-2]


def test_a_tensor_that_is_read_in_another_way_too_is_not_scaled() -> None:
    original = model(read_twice)
    fused = reparam.fuse(original, TOKENS.double())
    assert relative_error(original(TOKENS.double()), fused.module(TOKENS.double())) < 1e-12
    assert static_counts(fused.module)["mul"] == 1


def test_a_size_that_is_read_is_no_reader() -> None:
    original = model(measured_and_read)
    fused = reparam.fuse(original, TOKENS.double())
    assert relative_error(original(TOKENS.double()), fused.module(TOKENS.double())) < 1e-12
    assert static_counts(fused.module)["mul"] == 0
