"""timm models with random weights and lively BatchNorm statistics: for tests, tools and benchmarks, never the product.

Importing timm imports torchvision, which registers fake kernels for its compiled operators while it is imported. Where
torchvision's compiled part cannot be loaded (a wheel built for CUDA beside a CPU-only torch) those operators do not
exist and the import fails. They are skipped here as `reparam` skips them for `--arch timm:NAME`.
"""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from reparam.capture.imports import missing_operators_skipped

CALIBRATION_FORWARDS = 2
CALIBRATION_BATCH = 4
SMALL = (64, 128)
"""Sides of images, in pixels, that are tried before the model's own."""


def import_torchvision() -> ModuleType:
    """Imports and returns torchvision, whether or not its compiled operators can be loaded."""
    with missing_operators_skipped():
        return importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """Imports and returns timm, whether or not torchvision's compiled operators can be loaded."""
    import_torchvision()
    return importlib.import_module("timm")


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [child for child in module.modules() if isinstance(child, _BatchNorm)]


@torch.no_grad()
def randomise_batch_norms(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every BatchNorm in `module` random statistics and affine parameters, in place, and returns `module`.

    The defaults (mean 0, variance 1, gamma 1, beta 0) hide most errors a fold can make. Drawn are: running_mean from
    N(0, 0.1), running_var from U(0.5, 1.5), gamma from U(0.5, 1.5) with one in eight negative, beta from N(0, 0.1).
    What a BatchNorm does not have (`affine=False`, `track_running_stats=False`) is left out. dtypes and devices stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64) + 0.5

    def normal(like: torch.Tensor, scale: float = 0.1) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64) * scale

    for norm in _batch_norms(module):
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.copy_(normal(norm.running_mean))
            norm.running_var.copy_(uniform(norm.running_var))
        if norm.affine:
            negative = torch.rand(norm.weight.shape, generator=generator) < 0.125
            gamma = uniform(norm.weight)
            norm.weight.copy_(torch.where(negative, -gamma, gamma))
            norm.bias.copy_(normal(norm.bias))
    return module


@torch.no_grad()
def randomise_constants(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter whose elements are all the same random ones, in place, and returns `module`.

    timm starts biases at 0, norms at 1 and layer scales as low as 1e-6: the first two hide errors of a fold, the last
    one whole blocks. Zeros become N(0, 0.1), as matrices N(0, 0.02); up to 0.1, U(0.1, 0.5); others change by half.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.numel() or not parameter.is_floating_point() or parameter.min() != parameter.max():
            continue
        value = float(parameter.flatten()[0])
        if value == 0.0:
            drawn = torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.dim() < 2 else 0.02)
        elif 0.0 < value <= 0.1:
            drawn = 0.1 + 0.4 * torch.rand(parameter.shape, generator=generator)
        else:
            drawn = value * (0.5 + torch.rand(parameter.shape, generator=generator))
        parameter.copy_(drawn)
    return module


@torch.no_grad()
def _calibrate(model: nn.Module, shape: tuple[int, int, int], seed: int) -> None:
    """Sets running statistics to those of random inputs, then jitters them, so that deep models stay in range.

    Only the BatchNorms run in training mode: with dropout or stochastic depth active, the statistics would be those of
    another model.
    """
    norms = [norm for norm in _batch_norms(model) if norm.running_mean is not None]
    if not norms:
        return
    generator = torch.Generator().manual_seed(seed + 1)
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the calibration batches
        norm.train()
    try:
        for _ in range(CALIBRATION_FORWARDS):
            model(torch.randn(CALIBRATION_BATCH, *shape, generator=generator))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        jitter = torch.randn(norm.running_mean.shape, generator=generator) * 0.1
        norm.running_mean.add_(jitter * norm.running_var.sqrt())
        # The floor keeps channels that are constant under random inputs from blowing the model up.
        norm.running_var.clamp_(min=1e-3).mul_(0.8 + 0.4 * torch.rand(norm.running_var.shape, generator=generator))


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of one image for a timm `model`, from its configuration."""
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} carries no timm configuration, so its input size is not known.")
    channels, height, width = config["input_size"] if isinstance(config, dict) else config.input_size
    return int(channels), int(height), int(width)


def family(name: str) -> str:
    """The source file of timm that defines the model `name`, without its ending."""
    return str(import_timm().model_entrypoint(name).__module__).rpartition(".")[2]


def create(name: str, *, seed: int = 0, lively: bool = False, norms: bool = True, **kwargs: Any) -> nn.Module:
    """The timm model `name` in eval mode, with random weights, randomised and then calibrated BatchNorms.

    Args:
        name: timm's model name.
        seed: decides every weight and statistic; the global random state is left as it was.
        lively: also randomise what timm starts at a constant: biases, norms, layer scales.
        norms: whether every BatchNorm gets random weights of about 1, also where timm starts them at 0.
        kwargs: go to `timm.create_model`; `pretrained` is always False.
    """
    timm = import_timm()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(name, pretrained=False, **kwargs)
        if norms:
            randomise_batch_norms(model, seed)
        if lively:
            randomise_constants(model, seed)
        _calibrate(model, input_size(model), seed)
    return model.eval()


def create_small(
    name: str, *, seed: int = 0, lively: bool = False, norms: bool = True
) -> tuple[nn.Module, torch.Tensor]:
    """The model as `create` makes it, and two images: small ones, if the model takes them."""
    *smaller, (own, settings) = small_sizes(name)
    for size, built_for in smaller:
        # It does not take a size, or the image was too small.
        with contextlib.suppress(RuntimeError, AssertionError, ValueError, TypeError):
            return _created_at(name, size, seed, lively, norms, **built_for)
    return _created_at(name, own, seed, lively, norms, **settings)


def small_sizes(name: str) -> list[tuple[tuple[int, ...], dict[str, int]]]:
    """Sizes of an image (channels first) to try in turn, the model's own last, each with what it is then built with."""
    config = import_timm().get_pretrained_cfg(name)
    own = tuple(config.input_size)
    sizes = [(own[0], side, side) for side in SMALL if side < own[1]]
    if not config.fixed_input_size and config.min_input_size is not None:
        sizes.append(tuple(config.min_input_size))
    # A model for one size only is built for the small one where its constructor can.
    return [*((size, {"img_size": size[1]} if config.fixed_input_size else {}) for size in sizes), (own, {})]


def create_plain(name: str, size: tuple[int, ...], **kwargs: Any) -> nn.Module:
    """The model as timm makes it, for images of a size (channels first)."""
    model: nn.Module = import_timm().create_model(
        name, pretrained=False, pretrained_cfg_overlay={"input_size": size}, **kwargs
    )
    return model


def _created_at(
    name: str, size: tuple[int, ...], seed: int, lively: bool, norms: bool, **kwargs: Any
) -> tuple[nn.Module, torch.Tensor]:
    overlay = {"input_size": size}
    model = create(name, seed=seed, lively=lively, norms=norms, pretrained_cfg_overlay=overlay, **kwargs)
    x = torch.randn(2, *input_size(model), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model(x)
    return model, x
