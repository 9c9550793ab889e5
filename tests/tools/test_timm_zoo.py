"""The models other tests rely on: lively statistics, sane activations, the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tools.timm_zoo import (
    create,
    create_small,
    family,
    import_timm,
    input_size,
    randomise_batch_norms,
    randomise_constants,
)


@pytest.fixture
def model() -> nn.Module:
    return create("resnet18", seed=3)


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def test_model_is_in_eval_mode_and_answers_differ_per_image(model: nn.Module) -> None:
    assert not any(module.training for module in model.modules())
    assert input_size(model) == (3, 224, 224)
    with torch.no_grad():
        out = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert torch.isfinite(out).all()
    assert 1e-2 < (out[0] - out[1]).std() < 1e2


def test_statistics_are_far_from_the_defaults(model: nn.Module) -> None:
    norms = norms_of(model)
    assert len(norms) == 20
    for norm in norms:
        assert norm.momentum == 0.1
        assert (norm.running_mean.abs() > 1e-4).float().mean() > 0.9
        assert (norm.running_var > 0).all()
        assert norm.running_var.std() > 1e-3
        assert norm.weight.std() > 0.1
        assert norm.bias.std() > 0.05
    assert any((norm.weight < 0).any() for norm in norms)


def test_the_seed_decides_and_the_global_random_state_stays() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (create("resnet10t", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.0.weight"], other["conv1.0.weight"])


def test_nothing_stays_patched() -> None:
    assert import_timm().__name__ == "timm"
    assert torch.library.register_fake.__module__ == "torch.library"
    with pytest.raises(RuntimeError, match="does not exist"):
        torch.library.register_fake("nowhere::nothing")(lambda: None)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_randomise_takes_every_kind_of_batch_norm(kind: type[nn.BatchNorm2d], affine: bool, tracked: bool) -> None:
    norm = kind(64, affine=affine, track_running_stats=tracked, dtype=torch.float64)
    defaults = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    assert randomise_batch_norms(norm, seed=1) is norm
    changed = {name for name, tensor in norm.state_dict().items() if not torch.equal(tensor, defaults[name])}
    wanted = ({"weight", "bias"} if affine else set()) | ({"running_mean", "running_var"} if tracked else set())
    assert changed == wanted


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.table = nn.Parameter(torch.zeros(1000)), nn.Parameter(torch.zeros(40, 40))
        self.layer_scale, self.gain = nn.Parameter(torch.full((1000,), 1e-6)), nn.Parameter(torch.tensor(-2.0))
        self.weight, self.mask = nn.Parameter(torch.arange(3.0)), nn.Parameter(torch.ones(3, dtype=torch.int64), False)


def test_constant_parameters_become_lively() -> None:
    module = randomise_constants(Constants())
    assert 0.08 < module.bias.std() < 0.12
    assert 0.01 < module.table.std() < 0.03
    assert 0.1 <= module.layer_scale.min() < module.layer_scale.max() <= 0.5
    assert -3.0 <= module.gain <= -1.0
    assert module.gain != -2.0
    assert module.weight.tolist() == [0.0, 1.0, 2.0]
    assert module.mask.tolist() == [1, 1, 1]


def test_lively_models_show_their_blocks() -> None:
    """A layer scale of 1e-6 would hide what a block computes."""
    effects = []
    for lively in (False, True):
        model, x = create_small("test_convnext", lively=lively)
        with torch.no_grad():
            before = model(x)
            model.stages[2].blocks[0].mlp.fc1.weight.mul_(2.0)
            effects.append(((model(x) - before).abs().max() / before.abs().max()).item())
    assert effects[0] < 1e-5
    assert effects[1] > 1e-3


@pytest.mark.parametrize(
    ("name", "source", "shape"),
    [
        ("test_resnet", "resnet", (2, 3, 64, 64)),
        ("test_vit", "vision_transformer", (2, 3, 64, 64)),
        ("crossvit_tiny_240", "crossvit", (2, 3, 240, 240)),
    ],
)
def test_small_images_where_the_model_takes_them(name: str, source: str, shape: tuple[int, ...]) -> None:
    assert family(name) == source
    model, x = create_small(name)
    assert (tuple(x.shape), input_size(model)) == (shape, shape[1:])
    assert not model.training
