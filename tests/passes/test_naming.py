"""New layers get names that leave every module in its place that the graph still asks for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reparam
from tests.support import relative_error


class Own(nn.Module):
    """Layers, and weights of its own, in either order."""

    def __init__(self, weights_first: bool) -> None:
        super().__init__()
        self.a, self.b, self.weights_first = nn.Linear(4, 4), nn.Linear(4, 4), weights_first
        self.v, self.w = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weights_first:
            return self.b(self.a(F.relu(F.linear(F.linear(x, self.v), self.w))))  # type: ignore[no-any-return]
        return F.linear(F.linear(F.relu(self.b(self.a(x))), self.v), self.w)


class OnlyOwn(nn.Module):
    """Weights of its own, of two layers each."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([torch.randn(4, 4) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c, d = self.w
        return F.linear(F.linear(F.relu(F.linear(F.linear(x, a), b)), c), d)


class Scaled(nn.Module):
    """Two branches, one of them with a scale that is the block's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x) * self.scale  # type: ignore[no-any-return]


def called_twice() -> nn.Module:
    block = Scaled()
    return nn.Sequential(block, nn.ReLU(), block)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers_before_weights": lambda: nn.Sequential(Own(False), nn.ReLU()),
    "weights_before_layers": lambda: nn.Sequential(Own(True), nn.ReLU()),
    "only_weights": lambda: nn.Sequential(OnlyOwn(), nn.ReLU()),
    "a_block_called_twice": called_twice,
}


@pytest.mark.parametrize("name", MODELS)
def test_no_new_layer_stands_in_the_way_of_another(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    result = reparam.fuse(model, x)
    assert result.report.undone == ()
    assert result.report.after.linears == 2
    assert relative_error(model(x), result.module(x)) < 1e-14
