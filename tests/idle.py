"""Nothing that only training needs is left: how a test tells, and many small models as one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.support import static_counts
from tests.zoo.case import BlockCase

RANDOM_IN_ONNX = {
    *("Dropout", "Identity", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli"),
    "Multinomial",
}


class Beside(nn.Module):
    """Blocks side by side, each on the input of its shape."""

    def __init__(self, blocks: list[BlockCase]) -> None:
        super().__init__()
        self.shapes = [case.input_shape for case in blocks]
        self.blocks = nn.ModuleList(case.make(torch.float32, seed) for seed, case in enumerate(blocks))

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        different = list(dict.fromkeys(self.shapes))
        return [block(inputs[different.index(shape)]) for block, shape in zip(self.blocks, self.shapes, strict=True)]


def assert_nothing_idle(module: Any) -> None:
    """No node whose name speaks of dropping or of chance, and no module of that kind."""
    counts = static_counts(module)
    assert (counts["dropout"], counts["identity"]) == (0, 0)
    for node in module.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op == "call_module":
            name = type(module.get_submodule(node.target)).__name__
        words = ("drop", "rand", "bernoulli", "stochastic", "identity", "noise")
        assert not any(word in name.lower() for word in words), name
