"""A model that does not run on the example is refused in a sentence that says on what, where and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import reparam
from reparam import InputError
from tools import false_alarms


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def after(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.conv(x))


class Deciding(Plain):
    """No graph holds it: what it does depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if float(x.sum()) > 0:
            x = x + 1
        return super().forward(x)


class Resizing(Plain):
    """torch resizes halves so on no CPU."""

    def after(self, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(y, (5, 5), mode="bicubic", antialias=True)


class DecidingAndResizing(Deciding, Resizing):
    pass


WAYS = {Plain: ("auto", "symbolic", "export"), Deciding: ("auto", "export", "modules")}
WRONG = {
    "channels": (torch.zeros(1, 4, 9, 8), "float32 of 1x4x9x8", "expected input"),
    "dtype": (torch.zeros(1, 3, 9, 8, dtype=torch.int64), "int64 of 1x3x9x8", "should be the same"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(("make", "way"), [(make, way) for make, ways in WAYS.items() for way in ways])
def test_an_input_that_the_model_does_not_take(make: type[Plain], way: str, wrong: str) -> None:
    x, what, why = WRONG[wrong]
    with pytest.raises(InputError) as caught:
        reparam.fuse(make().eval(), x, capture=way)
    text = str(caught.value)
    assert text.startswith(f"the model cannot run on the example input ({what}): ")
    assert why in text
    assert text.endswith("; pass inputs of the shape and dtype that it expects")
    assert "\n" not in text


@pytest.mark.parametrize("make", [Resizing, DecidingAndResizing])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_dtype_for_which_torch_lacks_an_operation(make: type[Plain], dtype: torch.dtype) -> None:
    model = make().eval()
    assert model(torch.ones(1, 3, 9, 9)).shape == (1, 4, 5, 5)
    with pytest.raises(InputError, match=r"not implemented for .*; take the model and its inputs in another dtype$"):
        reparam.fuse(model.to(dtype), torch.ones(1, 3, 9, 9, dtype=dtype))


def test_the_sweep_counts_it_apart() -> None:
    verdict = false_alarms._verdict(Resizing().half().eval(), torch.ones(1, 3, 9, 9, dtype=torch.float16))
    assert verdict["passed"] is None
    assert "not implemented for 'Half'" in verdict["original"]
    row = false_alarms.Row("net", "family", float64_error=0.0, verdicts={"float16": verdict})
    assert row.outcome("float16") == "original fails"
    assert not row.failed


def test_what_only_fusing_stumbles_over_stays_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def stumbling(*args: object) -> None:
        raise ValueError("stumbled")

    monkeypatch.setattr(reparam, "fuse", stumbling)
    verdict = false_alarms._verdict(Plain().eval(), torch.ones(1, 3, 9, 9))
    assert verdict["original"] == ""
    row = false_alarms.Row("net", "family", float64_error=0.0, verdicts={"float32": verdict})
    assert row.outcome("float32") == "not fused"
    assert row.failed
