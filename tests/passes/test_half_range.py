"""Merged weights that float16 cannot hold: the rewrite is refused with a sentence, the rest of the model is fused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import reparam


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4)
    )  # fmt: skip
    with torch.no_grad():
        for norm in (made[1], made[4]):
            norm.bias.normal_()  # type: ignore[operator, union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    return made.eval()


def overflows(model: nn.Sequential) -> None:
    """Weights of 1e3 and a scale of 1e2; with inputs of 1e-3 no activation is large."""
    model[0].weight *= 5e3  # type: ignore[operator]
    model[1].running_var.fill_(1e-4)  # type: ignore[operator, union-attr]


def underflows(model: nn.Sequential) -> None:
    """A scale of 2e-6 that the next layer makes up for."""
    model[1].weight.fill_(2e-6)  # type: ignore[operator, union-attr]
    model[1].bias.zero_()  # type: ignore[operator, union-attr]
    model[3].weight *= 1e4  # type: ignore[operator]
    model[4].bias.zero_()  # type: ignore[operator, union-attr]


def half_dead(model: nn.Sequential) -> None:
    """Channels that training has all but switched off: what is lost of them matters to nobody."""
    model[1].weight[:4] = 1e-7  # type: ignore[index]


def plain(model: nn.Sequential) -> None:
    pass


CASES = [
    (overflows, torch.float16, "its merged weights overflow float16: 9.15e+04 is above 6.55e+04"),
    (overflows, torch.bfloat16, ""),
    (overflows, torch.float32, ""),
    (underflows, torch.float16, "its merged weights underflow float16: 8 of 8 channels lose up to"),
    (underflows, torch.bfloat16, ""),
    (half_dead, torch.float16, ""),
    (plain, torch.float16, ""),
    (plain, torch.bfloat16, ""),
]


@pytest.mark.parametrize(("change", "dtype", "sentence"), CASES)
def test_what_float16_cannot_hold_is_refused(
    change: Callable[[nn.Sequential], None], dtype: torch.dtype, sentence: str
) -> None:
    model = net()
    with torch.no_grad():
        change(model)
    scale = 1e-3 if change is overflows else 1.0
    x = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    result = reparam.fuse(model.to(dtype), x)
    assert result.report.equivalent
    assert all(parameter.isfinite().all() for parameter in result.module.parameters())
    reasons = [refusal.reason for refusal in result.report.refusals]
    assert result.report.after.batch_norms == (1 if sentence else 0)
    if sentence:
        assert reasons
        assert all(sentence in reason for reason in reasons)
        assert {refusal.where for refusal in result.report.refusals} == {"0", "1"}
        assert result.report.refusals[0].remedy == "fuse in a wider type"
    else:
        assert not reasons
    assert not result.report.undone


def test_an_original_that_overflows_says_so() -> None:
    model = net()
    with torch.no_grad():
        model[4].weight.fill_(6e4)  # type: ignore[operator, union-attr]
        model[4].running_mean.fill_(-6e4)  # type: ignore[operator, union-attr]
    with pytest.raises(
        reparam.NotEquivalentError, match="the original itself overflows: give it smaller inputs, or a wid"
    ) as caught:
        reparam.fuse(model.half(), torch.randn(2, 3, 8, 8).half())
    assert str(caught.value).startswith("the fused Sequential was not shown to agree with the original: NOT shown")
    assert str(caught.value).endswith("no model was made")  # nobody is asked to report what is no fault
    assert caught.value.report.comparison.lacks_evidence
