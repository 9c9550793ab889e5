"""Halves multiplied in float32: what is replaced, and that it is one rounding of the exact product."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tools import false_alarms, half_products

DTYPES = [str(dtype).removeprefix("torch.") for dtype in half_products.HALVES]
CASES = {
    "mm": lambda a, b: a @ b,
    "linear": lambda a, b: functional.linear(a, b, a[0, :6]),
    "addmm": lambda a, b: torch.addmm(a[0, :6], a, b.t(), beta=0.5, alpha=2.0),
    "bmm": lambda a, b: a.view(3, 2, 6) @ b.expand(3, 6, 6),
    "baddbmm": lambda a, b: torch.baddbmm(a.view(3, 2, 6), a.view(3, 2, 6), b.expand(3, 6, 6), beta=0.5),
    "convolution": lambda a, b: functional.conv2d(a.view(1, 1, 6, 6), b.view(4, 1, 3, 3), a[0, :4], padding=1),
    "grouped": lambda a, b: functional.conv1d(a.view(2, 2, 9), b.view(12, 1, 3), stride=2, groups=2),
    "transposed": lambda a, b: functional.conv_transpose2d(a.view(1, 1, 6, 6), b.view(1, 4, 3, 3), stride=2),
}  # fmt: skip


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(6, 6, generator=generator).to(dtype) for _ in range(2))
    return a, b


@pytest.mark.parametrize("dtype", half_products.HALVES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_product_of_halves_is_rounded_once(case: str, dtype: torch.dtype) -> None:
    a, b = operands(dtype)
    with half_products.in_float32():
        answer = CASES[case](a, b)
    assert answer.dtype == dtype
    assert torch.equal(answer, CASES[case](a.float(), b.float()).to(dtype))


@pytest.mark.parametrize("case", CASES)
def test_other_dtypes_go_to_torch(case: str) -> None:
    for dtype in (torch.float32, torch.float64):
        a, b = operands(dtype)
        expected = CASES[case](a, b)
        with half_products.in_float32():
            assert torch.equal(CASES[case](a, b), expected)


def test_afterwards_torch_multiplies_again(monkeypatch: pytest.MonkeyPatch) -> None:
    widened: list[object] = []
    monkeypatch.setattr(half_products, "_widened", lambda value: widened.append(value) or value)
    a, b = operands(torch.bfloat16)
    with half_products.in_float32():
        a @ b
    assert len(widened) == 2
    a @ b
    assert len(widened) == 2


def test_a_mode_sees_the_operators_of_the_model() -> None:
    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    a, b = operands(torch.float16)
    with half_products.in_float32(), Seen() as seen:
        functional.linear(a, b, a[0])
    assert seen.names == ["aten.select.int", "aten.t.default", "aten.addmm.default"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_real_model_is_judged_as_with_the_kernels_of_torch(name: str) -> None:
    """The noise in question is that of halves, whoever multiplies them."""
    own = false_alarms.measured(name, DTYPES)
    wide = false_alarms.measured(name, DTYPES, "float32")
    assert (own.half_products, wide.half_products) == ("", "float32")
    for dtype in DTYPES:
        assert own.outcome(dtype) == wide.outcome(dtype) == "agrees"
        for figure in ("error", "noise"):
            assert wide.verdicts[dtype][figure] == pytest.approx(own.verdicts[dtype][figure], rel=0.3)
