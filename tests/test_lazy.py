"""Products with weights that are made in float64 when they are read: the same numbers, however they are cut."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reparam.lazy import lazy_cast

ROWS, COLUMNS = 1100, 1024  # more elements than the largest block


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    "shape", [(0, COLUMNS), (1, COLUMNS), (40, COLUMNS), (600, COLUMNS), (2, 3, COLUMNS), (COLUMNS,)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_with_a_lazy_weight_is_that_with_the_wide_one(
    weight: torch.Tensor, shape: tuple[int, ...], biased: bool
) -> None:
    x = inputs(*shape)
    bias = torch.randn(ROWS, generator=torch.Generator().manual_seed(2), dtype=torch.float64) if biased else None
    made = F.linear(x, lazy_cast(weight, torch.float64), bias)
    assert made.shape == (*shape[:-1], ROWS)
    torch.testing.assert_close(made, F.linear(x, weight.double(), bias), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 40, 600])
def test_a_product_with_a_lazy_weight_that_is_not_transposed(weight: torch.Tensor, rows: int) -> None:
    x = inputs(rows, ROWS)
    lazy = lazy_cast(weight, torch.float64)
    torch.testing.assert_close(x @ lazy, x @ weight.double(), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(torch.mm(x, lazy), x @ weight.double(), rtol=1e-12, atol=1e-10)
    other = inputs(rows, COLUMNS)
    torch.testing.assert_close(torch.mm(other, lazy.t()), other @ weight.double().t(), rtol=1e-12, atol=1e-10)


def test_a_small_input_reads_a_weight_in_small_blocks(monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor) -> None:
    made: list[int] = []
    lazy = lazy_cast(weight, torch.float64)
    reader = type(lazy.source).reader

    def watched(source):  # type: ignore[no-untyped-def]
        read = reader(source)
        return lambda block: made.append(block.stop - block.start) or read(block)  # type: ignore[func-returns-value]

    monkeypatch.setattr(type(lazy.source), "reader", watched)
    F.linear(inputs(4, COLUMNS), lazy)
    assert max(made) * COLUMNS == 1 << 17
    made.clear()
    F.linear(inputs(100, COLUMNS), lazy)
    assert max(made) * COLUMNS == 4 * 100 * COLUMNS
    made.clear()
    F.linear(inputs(900, COLUMNS), lazy)
    assert max(made) * COLUMNS == 1 << 20
