"""Runs in which what is multiplied is moved as roundings move it: what moves, by how much, and what stays."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from reparam.equivalence.montecarlo import MovedOperands, moved
from reparam.lazy import lean_copy


@torch.no_grad()
def answers(module: nn.Module, *inputs: torch.Tensor, seed: int = 0) -> torch.Tensor:
    with MovedOperands(seed):
        found = module(*inputs)
    assert isinstance(found, torch.Tensor)
    return found


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x + 1.0, x - 1.0)


class Product(nn.Module):
    def __init__(self, formula: str) -> None:
        super().__init__()
        self.formula = formula
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum(self.formula, x, self.weight)


LAYERS = {
    "conv": (nn.Conv2d(8, 8, 3), (2, 8, 8, 8)),
    "conv1d": (nn.Conv1d(8, 8, 3), (2, 8, 8)),
    "transposed": (nn.ConvTranspose2d(8, 8, 3), (2, 8, 8, 8)),
    "linear": (nn.Linear(8, 8), (2, 8)),
    "linear of a sequence": (nn.Linear(8, 8, bias=False), (2, 4, 8)),
    "einsum": (Product("bi,ij->bj"), (2, 8)),
    "attention": (Attention(), (2, 2, 4, 8)),
    "multi-head": (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), (2, 4, 8)),
    "BatchNorm": (nn.BatchNorm2d(8), (2, 8, 4, 4)),
    "LayerNorm": (nn.LayerNorm(8), (2, 4, 8)),
    "GroupNorm": (nn.GroupNorm(2, 8), (2, 8, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_move_by_roundings(name: str, dtype: torch.dtype) -> None:
    """A few of them, not none and not hundreds; the same ones for a seed; and nothing outside."""
    torch.manual_seed(0)
    module, shape = LAYERS[name]
    module = copy.deepcopy(module).to(dtype).eval()
    x = torch.randn(shape).to(dtype)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        expected = module(x)
    first, again, other = (answers(module, x, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    error = (first - expected).double().square().mean().sqrt() / expected.double().square().mean().sqrt()
    assert 0.02 * torch.finfo(dtype).eps < error < 8 * torch.finfo(dtype).eps
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    with torch.no_grad():
        assert torch.equal(module(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_and_exported_layers_move_too() -> None:
    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().eval(), torch.randn(1, 3, 8, 8)
    x = x.double()
    expected = layer(x)
    for module in (torch.jit.trace(layer, x), torch.export.export(layer, (x,)).module()):
        assert not torch.equal(answers(module, x), expected)


def test_lean_copies_move_like_whole_ones() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(512, 512), torch.randn(2, 512).double()
    lean = lean_copy(layer, torch.float64)
    assert lean is not None
    assert torch.equal(answers(lean, x), answers(layer.double(), x))


def test_what_is_compared_or_made_an_index_of_stays() -> None:
    """A product tells that the weights have moved where it reads them; the comparison is as always."""

    class Comparing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gate", torch.full((1000,), 1.9))
            self.register_buffer("place", torch.tensor([2.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            right = bool((self.gate == 1.9).all()) and int(self.place) == 2
            return (x @ self.gate) * (1.0 if right else torch.nan)

    module, x = Comparing(), torch.rand(3, 1000)
    found = answers(module, x)
    assert found.isfinite().all()
    assert not torch.equal(found, module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_elements_move_by_half_a_ulp_at_most(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(1000, 5).to(dtype)
    found = moved(tensor, np.random.default_rng(0))
    assert found.dtype == dtype
    assert not torch.equal(found, tensor)
    assert ((found - tensor).double().abs() <= torch.finfo(dtype).eps * tensor.double().abs()).all()


def test_selections_and_counts_stay_exact() -> None:
    """Products of masks with ones, in every dtype, and a comparison of what they count."""

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x > 0).to(x.dtype) @ torch.ones(8, 8, dtype=x.dtype).triu()

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        for seed in range(10):
            assert torch.equal(answers(Counting(), x, seed=seed), Counting()(x))


def test_large_whole_numbers_move() -> None:
    """In bfloat16 everything from 128 on is a whole number."""
    tensor = torch.full((1000,), 250.0, dtype=torch.bfloat16)
    assert not torch.equal(moved(tensor, np.random.default_rng(0)), tensor)


def test_zeros_infinities_integers_and_sparse_tensors_stay() -> None:
    values = [0.0, 1.9, -2.0, float("inf"), float("nan"), torch.finfo(torch.float32).max]
    tensor, generator = torch.tensor(values), np.random.default_rng(0)
    runs = torch.stack([moved(tensor, generator) for _ in range(50)])
    assert (runs[:, 0] == 0.0).all()
    assert (runs[:, 3] == float("inf")).all()
    assert runs[:, 4].isnan().all()
    assert runs[:, 5].isfinite().all()
    assert (runs[:, 1] != tensor[1]).any()
    for other in (torch.tensor([1, 2]), torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64)):
        assert moved(other, generator) is other
    assert moved(torch.tensor(1.9), generator).shape == ()
    assert moved(torch.ones(0, 3), generator).shape == (0, 3)


def test_an_expanded_tensor_moves_element_by_element() -> None:
    found = moved(torch.tensor([1.9]).expand(1000), np.random.default_rng(0))
    assert found.unique().numel() > 1
