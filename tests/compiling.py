"""Modules and backends for tests of what `torch.compile` has made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.equivalence.nets import Plain, randomise


class Counting:
    """A backend that runs the graph as it is, or, of float32, `factor` times that; it counts its calls."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.calls = factor, 0

    def __deepcopy__(self, memo: Any) -> Counting:
        return self  # a copy of what is compiled with it counts here, too

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.calls += 1
            return tuple(t * self.factor if t.dtype == torch.float32 else t for t in graph.forward(*args))

        return run


def net() -> nn.Module:
    return randomise(Plain(), seed=0).eval()


def compiled(module: nn.Module, backend: Any) -> Any:
    return torch.compile(module, backend=backend, dynamic=False)


class Around(nn.Module):
    """Holds a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x) + 1.0


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0
