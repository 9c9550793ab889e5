"""`x @ W` with a matrix of weights is a linear layer, however it is written; other products are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import reparam
from tests.support import EXACT, assert_unchanged, relative_error, run, snapshot, static_counts
from tests.zoo.trap import Lambda
from tools.timm_zoo import randomise_batch_norms

TOKENS, ROWS, SQUARE = (2, 5, 6), (5, 6), (2, 6, 6)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.4)


def model(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Lambda(forward, **{name: part() if isinstance(part, type) else part for name, part in parts.items()})
    return randomise_batch_norms(made).double().eval()


def attended(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = x @ m.q, x @ m.k, x @ m.v
    return torch.softmax(q @ k.transpose(1, 2), -1) @ v


# name -> model, shape, linear layers left (modules), products left, BatchNorms left
MERGED: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[int, ...]]] = {
    "norm": (lambda m, x: m.n(x @ m.w).relu(), {"w": weight(6, 8), "n": nn.BatchNorm1d(8)}, ROWS),
    "chain": (
        lambda m, x: F.relu(torch.matmul(x @ m.a, m.b) + m.c),
        {"a": weight(6, 4), "b": weight(4, 8), "c": weight(8)},
        TOKENS,
    ),
    "branches": (
        lambda m, x: F.relu(x.matmul(m.w) + x + m.l(x)),
        {"w": weight(6, 6), "l": nn.Linear(6, 6)},
        TOKENS,
    ),
    "mm": (lambda m, x: m.l(torch.mm(x, m.w)), {"w": weight(6, 8), "l": nn.Linear(8, 3)}, ROWS),
    "mm, by name": (
        lambda m, x: m.l(torch.mm(mat2=m.w, input=x)),
        {"w": weight(6, 8), "l": nn.Linear(8, 3)},
        ROWS,
    ),
    "method mm": (lambda m, x: m.l(x.mm(m.w)), {"w": weight(6, 8), "l": nn.Linear(8, 3)}, ROWS),
    "computed weights": (
        lambda m, x: F.relu(m.l(x @ (m.w * 0.5).t())),
        {"w": weight(8, 6), "l": nn.Linear(8, 3)},
        TOKENS,
    ),
    "scale": (lambda m, x: F.relu((x @ m.w) * m.s), {"w": weight(6, 8), "s": weight(8)}, TOKENS),
}
"""Each comes to one linear layer and nothing else that is affine."""
LEFT: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "alone": (model(lambda m, x: F.relu(x @ m.w), w=weight(6, 8)), TOKENS),
    "on the left": (model(lambda m, x: F.relu(m.w @ x * 2 + m.w @ x), w=weight(5, 5)), TOKENS),
    "two activations": (model(lambda m, x: F.relu((x @ x.mT) @ x * 2)), TOKENS),
    "a vector": (model(lambda m, x: F.relu(x @ m.w), w=weight(6)), TOKENS),
    "a stack of matrices": (model(lambda m, x: F.relu((x @ m.w) + x), w=weight(1, 6, 6)), TOKENS),
    "weights of the input": (model(lambda m, x: F.relu(x @ (m.w * x.mean()) + x), w=weight(6, 6)), TOKENS),
}


def products(module: nn.Module) -> int:
    names = [getattr(node.target, "__name__", node.target) for node in module.graph.nodes if node.op != "get_attr"]  # type: ignore[union-attr]
    return sum(name in ("matmul", "mm") for name in names)


def exact(original: nn.Module, fused: nn.Module, shape: tuple[int, ...]) -> None:
    for batch in (shape[0], 1, 7):
        x = torch.randn(batch, *shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
        assert relative_error(run(original, x), run(fused, x)) < EXACT


@pytest.mark.parametrize("capture", ["symbolic", "export"])
@pytest.mark.parametrize("name", MERGED)
def test_a_product_with_weights_is_merged(name: str, capture: str) -> None:
    forward, parts, shape = MERGED[name]
    original = model(forward, **parts)
    before = snapshot(original)
    result = reparam.fuse(original, torch.randn(shape, dtype=torch.float64), capture=capture)
    assert_unchanged(before, original)
    assert result.report.comparison.passed
    assert not result.report.undone
    counts = static_counts(result.module)
    assert (counts["linear"], counts["bn"], counts["mul"], counts["add"]) == (1, 0, 0, 0)
    assert products(result.module) == 0
    assert result.report.after.linears == 1
    exact(original, result.module, shape)


@pytest.mark.parametrize("name", LEFT)
def test_another_product_is_left_alone(name: str) -> None:
    original, shape = LEFT[name]
    result = reparam.fuse(original, torch.randn(shape, dtype=torch.float64), verify=False)
    assert static_counts(result.module)["linear"] == 0
    assert products(result.module) >= 1
    exact(original, result.module, (shape[0], *shape[1:]))


def test_queries_keys_and_values_are_one_layer() -> None:
    original = model(attended, q=weight(6, 6), k=weight(6, 6), v=weight(6, 6)).float()
    result = reparam.fuse(original, torch.randn(TOKENS), objective="parameters")
    assert static_counts(result.module)["linear"] == 1
    assert (result.report.before.linears, result.report.after.linears) == (3, 1)
    assert products(result.module) == 2
    exact(original.double(), result.module.double(), TOKENS)


def test_a_product_counts_as_the_layer_it_is() -> None:
    forward, parts, shape = MERGED["chain"]
    original = model(forward, **parts)
    report = reparam.fuse(original, torch.randn(shape, dtype=torch.float64), verify=False).report
    assert (report.before.linears, report.after.linears) == (2, 1)
    assert report.before.macs == 10 * (6 * 4 + 4 * 8)
    assert report.after.macs == 10 * 6 * 8


@pytest.mark.parametrize("capture", ["symbolic", "export"])
def test_it_counts_also_where_the_matrix_is_computed(capture: str) -> None:
    original = model(lambda m, x: m.n(x @ m.w.to(x.dtype)).relu(), n=nn.BatchNorm1d(6))
    original.register_buffer("w", torch.arange(36).reshape(6, 6) % 5)
    report = reparam.fuse(original, torch.randn(ROWS, dtype=torch.float64), capture=capture).report
    assert (report.before.linears, report.after.linears) == (1, 1)
    assert report.before.macs == report.after.macs == 5 * 6 * 6


def test_a_matrix_that_the_forward_writes_to_is_no_weight() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.w.mul_(0.5)
        return m.l(x @ m.w)  # type: ignore[no-any-return]

    original = Lambda(forward, l=nn.Linear(8, 3)).eval()
    original.register_buffer("w", torch.randn(6, 8))
    x = torch.randn(2, 6)
    kept = original.w.clone()
    try:
        fused = reparam.fuse(original, x, verify=False).module
    except reparam.ReparamError:
        return
    for _ in range(2):
        with torch.no_grad():
            original.w.copy_(kept)
            expected = original(x)
            again = original(x)
        assert not torch.allclose(expected, again)
    with torch.no_grad():
        assert torch.allclose(fused(x), expected, atol=1e-5)
        assert torch.allclose(fused(x), again, atol=1e-5)
