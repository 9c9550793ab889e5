"""The fused model keeps the memory layout of the original's kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reparam
from tests.zoo.case import randomise


class Branches(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        conv, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[rank - 2]
        self.wide, self.narrow = conv(3, 8, 3, padding=1), conv(3, 8, 1)
        self.norm, self.head = norm(8), conv(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.wide(x) + self.narrow(x)).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize(("rank", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_channels_last_stays(rank: int, layout: torch.memory_format) -> None:
    model = Branches(rank)
    randomise(model)
    model = model.eval().to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, 3, *[8] * rank).to(memory_format=layout)
    result = reparam.fuse(model, x)
    assert result.report.after.convolutions == 2
    assert all(p.is_contiguous(memory_format=layout) for p in result.module.parameters() if p.dim() == rank + 2)
    assert result.module(x).is_contiguous(memory_format=layout)
    torch.testing.assert_close(result.module(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_usual_layout_stays_too() -> None:
    model = Branches(2)
    randomise(model)
    result = reparam.fuse(model.eval(), torch.randn(2, 3, 8, 8))
    assert all(p.is_contiguous() for p in result.module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capture", ["symbolic", "export"])
def test_half_precision(dtype: torch.dtype, capture: str) -> None:
    model = Branches(2)
    randomise(model)
    model = model.eval().to(dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    result = reparam.fuse(model, x, capture=capture)
    assert result.report.after.convolutions == 2
    assert result.module(x).dtype == dtype
    assert {p.dtype for p in result.module.parameters()} == {dtype}
