"""What a trap is: a trivial model on which a naive fold is silently wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from reparam.inputs import Inputs
from tests.zoo.case import in_dtype, randomise


@dataclass(frozen=True)
class Trap:
    """One model that invites a wrong fold.

    Attributes:
        name: unique; also the test's name.
        build: makes the model (seeded and randomised by `make`).
        inputs: shapes of the inputs; a tuple of shapes for positional, a dict for keyword arguments.
        expected: operations that must be left; kinds not named are free, but no BatchNorm may stay without a reason.
        mentions: some refusal must contain one of these words, case-insensitively; empty if no refusal is due.
        may_refuse: the whole model may also be refused with a `ReparamError`.
        batches: other batch sizes to try.
        flexible: other image sizes than the example's are legal, and tried; the only input has four channels.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[int, ...] | tuple[tuple[int, ...], ...] | Mapping[str, tuple[int, ...]]
    expected: Mapping[str, int] | None = None
    mentions: tuple[str, ...] = ()
    may_refuse: bool = False
    batches: tuple[int, ...] = (1, 5)
    flexible: bool = False

    def make(self, seed: int = 0) -> nn.Module:
        """The model in float64 and eval mode; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return in_dtype(randomise(self.build()), torch.float64).eval()

    def example(self, batch: int | None = None) -> Any:
        """Random inputs in float64, as `reparam.fuse` takes them."""
        generator = torch.Generator().manual_seed(batch or 0)

        def one(shape: tuple[int, ...]) -> torch.Tensor:
            sizes = shape if batch is None else (batch, *shape[1:])
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        if isinstance(self.inputs, Mapping):
            return {name: one(shape) for name, shape in self.inputs.items()}
        if isinstance(self.inputs[0], tuple):
            return tuple(one(shape) for shape in self.inputs)  # type: ignore[arg-type]
        return one(self.inputs)  # type: ignore[arg-type]


class Lambda(nn.Module):
    """Layers by name, and `forward` as a function of (layers, *inputs): keeps each trap to a few lines.

    The function is called as `function(self, ...)`; parameters and buffers may be set on the module afterwards.
    """

    def __init__(self, function: Callable[..., Any], **layers: nn.Module | nn.Parameter | torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in layers.items():
            if isinstance(value, (nn.Module, nn.Parameter)):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


class Two(Lambda):
    """The same with two inputs."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, y)


def output_of(module: nn.Module, inputs: Any) -> Any:
    """The module's output on copies of the inputs, without gradients."""
    return Inputs.of(inputs).call(module)
