"""The neutral counter and the error of comparisons with other tools, on modules whose figures are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from tools.layer_counts import LayerCounts, count_layers, errors


class Spellings(nn.Module):
    """Two each of convolutions, norms (one functional), linears and scales, and products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.gamma = nn.Parameter(torch.randn(4, 1, 1))
        self.fc = nn.Linear(4, 4, bias=False)
        self.table = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        y = F.conv2d(y, self.weight) * self.gamma
        y = F.batch_norm(y, self.norm.running_mean, self.norm.running_var) + 2.0 * y
        tokens = self.fc(y.flatten(2).transpose(1, 2))
        tokens = tokens @ tokens.transpose(1, 2) @ tokens
        return tokens @ self.table + self.table[0]


EXPECTED = LayerCounts(convolutions=2, batch_norms=2, linears=2, scales=2)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_spelling_counts_once(batch: int) -> None:
    model = Spellings().eval()
    x = torch.randn(batch, 3, 5, 6)
    assert count_layers(model, x) == EXPECTED
    assert count_layers(fx.symbolic_trace(model), x) == EXPECTED
    assert count_layers(torch.export.export(model, (x,)).module(), x) == EXPECTED


def test_layers_called_twice_count_twice_and_uncalled_ones_do_not() -> None:
    conv, idle = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
    model = nn.Sequential(conv, nn.ReLU(inplace=True), conv, nn.ConvTranspose1d(4, 4, 2))
    model.idle = nn.Identity()
    model.idle.norm = idle
    x = torch.randn(2, 4, 8)
    kept = x.clone()
    assert count_layers(model.eval(), x) == LayerCounts(convolutions=3)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("wanted", "got", "absolute", "relative"),
    [
        (torch.tensor([1.0, -4.0]), torch.tensor([1.0, -4.0]), 0.0, 0.0),
        (torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0]), 1.0, 0.25),
        ((torch.ones(1), torch.full((2,), 8.0)), (torch.tensor([1.5]), torch.full((2,), 6.0)), 2.0, 0.5),
        (torch.zeros(2), torch.ones(2), 1.0, math.inf),
        (torch.zeros(2), torch.zeros(3), math.inf, math.inf),
        (torch.zeros(2), torch.zeros(2).double(), math.inf, math.inf),
        (torch.zeros(2), (torch.zeros(2),), math.inf, math.inf),
        (torch.ones(2), torch.tensor([1.0, math.nan]), math.inf, math.inf),
        (torch.tensor([1.0, math.inf]), torch.tensor([1.0, -math.inf]), math.inf, math.inf),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), 0.0, 0.0),
        ({"a": 3}, {"a": 4}, math.inf, math.inf),
    ],
)
def test_errors(wanted: Any, got: Any, absolute: float, relative: float) -> None:
    assert errors(wanted, got) == (absolute, relative)
