"""Runs in which what is multiplied is moved as roundings move it: what moves, by how much, and what stays."""

from __future__ import annotations

import copy

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


KEY = 0x1234567890ABCDEF


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


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
    kept = copy.deepcopy(layer).double()
    assert torch.equal(answers(lean, x), answers(kept, x))
    with torch.no_grad(), MovedOperands(0, weights=lean.parameters()):
        assert torch.equal(lean(x), lean(x))


def test_what_is_compared_or_made_an_index_of_stays() -> None:
    """A product tells that the weights have moved where it reads them; the comparison is as always."""

    class Comparing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gate", torch.linspace(0.1, 1.9, 1000))
            self.register_buffer("place", torch.tensor([2.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            right = bool((self.gate == torch.linspace(0.1, 1.9, 1000)).all()) and int(self.place) == 2
            return (x @ self.gate) * (1.0 if right else torch.nan)

    module, x = Comparing(), torch.rand(3, 1000)
    found = answers(module, x)
    assert found.isfinite().all()
    assert not torch.equal(found, module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_elements_move_to_a_neighbour_or_not_at_all(dtype: torch.dtype) -> None:
    """A sixth up, a sixth down, in every draw others; by more with a longer step."""
    torch.manual_seed(0)
    tensor = (torch.randn(4000, 5) * 3.0).to(dtype)
    infinity = torch.full_like(tensor, torch.inf)
    found = moved(tensor, KEY)
    up, down = found == tensor.nextafter(infinity), found == tensor.nextafter(-infinity)
    assert found.dtype == dtype
    assert bool((up | down | (found == tensor)).all())
    for share in (up.float().mean(), down.float().mean()):
        assert 0.1 < float(share) < 0.2
    other = moved(tensor, KEY + 1)
    assert 0.2 < float(((found == tensor) == (other == tensor)).float().mean()) < 0.8
    further = (moved(tensor, KEY, 8.0) - tensor).double().abs() / tensor.double().abs()
    assert torch.finfo(dtype).eps < float(further.nanmean()) < 4 * torch.finfo(dtype).eps


def test_moves_are_as_good_as_independent() -> None:
    """Of neighbours, of close numbers, and of the same number in two draws."""
    for tensor in (
        torch.randn(20000, generator=generator()).double(),
        1.0 + torch.arange(1, 20001).double() * 2.0**-40,
    ):
        first, second = ((moved(tensor, key, 2.0**10) - tensor) / tensor for key in (KEY, KEY + 1))
        scale = first.square().mean()
        for product in (first * second, first[1:] * first[:-1]):
            assert abs(float(product.mean() / scale)) < 0.03
        assert abs(float(first.mean() / scale.sqrt())) < 0.03


def test_equal_numbers_move_alike_and_opposite_ones_stay_opposite() -> None:
    tensor = torch.randn(1000, generator=generator())
    found = moved(tensor, KEY)
    assert torch.equal(moved(tensor.flip(0), KEY), found.flip(0))
    assert torch.equal(moved(-tensor, KEY), -found)
    assert torch.equal(moved(tensor.reshape(10, 100).t(), KEY), found.reshape(10, 100).t())
    assert torch.equal(moved(tensor[::2], KEY), found[::2])
    assert torch.equal(moved(tensor[:1].expand(7), KEY), found[:1].expand(7))


def test_selections_and_counts_stay_exact() -> None:
    """Products of masks with ones, in every dtype, and a comparison of what they count."""

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x > 0).to(x.dtype) @ torch.ones(8, 8, dtype=x.dtype).triu()

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = torch.randn(16, 8, generator=generator()).to(dtype)
        for seed in range(10):
            assert torch.equal(answers(Counting(), x, seed=seed), Counting()(x))


def test_numbers_that_differ_by_a_power_of_two_move_alike() -> None:
    tensor = torch.randn(1000, generator=generator())
    assert torch.equal(moved(4.0 * tensor, KEY), 4.0 * moved(tensor, KEY))
    assert torch.equal(moved(0.5 * tensor, KEY), 0.5 * moved(tensor, KEY))


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_nested_tensors_are_left_alone() -> None:
    layer = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1, enable_nested_tensor=True
    ).eval()
    x, padding = torch.rand(2, 4, 8, generator=generator()), torch.zeros(2, 4, dtype=torch.bool)
    padding[0, 2:] = True
    with torch.no_grad(), MovedOperands(0):
        assert layer(x, src_key_padding_mask=padding).isfinite().all()


def test_sparse_factors_are_left_alone_and_dense_ones_move() -> None:
    dense = torch.rand(8, 8, generator=generator())
    factor, x = dense.to_sparse(), torch.rand(8, 3, generator=generator())
    with MovedOperands(0, weights=[factor, x]):
        found = torch.mm(factor, x)
    assert torch.allclose(found, dense @ x)
    assert not torch.equal(found, torch.mm(factor, x))


def test_large_whole_numbers_move() -> None:
    """In bfloat16 everything from 128 on is a whole number."""
    tensor = torch.arange(200.0, 250.0, dtype=torch.bfloat16)
    assert not torch.equal(moved(tensor, KEY), tensor)


def test_zeros_infinities_integers_and_sparse_tensors_stay() -> None:
    values = [0.0, 1.9, -2.0, float("inf"), float("nan"), torch.finfo(torch.float32).max]
    tensor = torch.tensor(values)
    runs = torch.stack([moved(tensor, KEY + draw) for draw in range(50)])
    assert (runs[:, 0] == 0.0).all()
    assert (runs[:, 3] == float("inf")).all()
    assert runs[:, 4].isnan().all()
    assert runs[:, 5].isfinite().all()
    assert (runs[:, 1] != tensor[1]).any()
    for other in (torch.tensor([1, 2]), torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64)):
        assert moved(other, KEY) is other
    assert moved(torch.tensor(1.9), KEY).shape == ()
    assert moved(torch.ones(0, 3), KEY).shape == (0, 3)


def test_two_factors_move_and_what_a_number_multiplies_does_not() -> None:
    x = torch.rand(100, 2, generator=generator())
    expected = [x * x.flip(1), x * 0.1, x * torch.tensor(0.1), torch.div(x, x.flip(1), rounding_mode="floor")]
    with MovedOperands(0):
        found = [x * x.flip(1), x * 0.1, x * torch.tensor(0.1), torch.div(x, x.flip(1), rounding_mode="floor")]
    assert [torch.equal(*pair) for pair in zip(expected, found, strict=True)] == [False, True, True, True]


def test_what_becomes_of_a_weight_is_kept_until_it_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrent model reads it at every step."""
    calls = []

    def counted(tensor: torch.Tensor, *args: float) -> torch.Tensor:
        calls.append(tuple(tensor.shape))
        return moved(tensor, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("reparam.equivalence.montecarlo.moved", counted)
    weight, x = torch.rand(5, 5, generator=generator()), torch.rand(3, 5, generator=generator())
    with MovedOperands(0, weights=[weight]):
        first, again = x @ weight, x @ weight
        assert calls.count((5, 5)) == 1
        assert torch.equal(first, again)
        weight.mul_(2.0)
        assert not torch.equal(x @ weight, first)
        assert calls.count((5, 5)) == 2
