"""Monte Carlo arithmetic (Parker 1997): a run in which what is multiplied is moved at random, as roundings move it.

What a model does to its roundings shows when it is run several times, each time with other roundings. Here the operands
of products, convolutions and normalisations are moved by up to half a unit in the last place where they are used, data
and weights alike. The weights themselves stay what they are: a model that compares a buffer with a constant, or makes
an index of it, goes the way it always goes. Moving the weights would send it the other way, and that jump is no noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from reparam.lazy import Lazy, row_blocks

_PRODUCTS = ("linear", "addmm", "addbmm", "baddbmm", "addmv", "addr", "mm", "bmm", "mv", "dot", "matmul")
_CONVOLUTIONS = ("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution")
_NORMALISATIONS = ("batch_norm", "layer_norm", "group_norm", "rms_norm")
_WHOLE_LAYERS = (
    "mkldnn_rnn_layer",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
MOVED = frozenset(
    (
        *_PRODUCTS,
        *_CONVOLUTIONS,
        *(f"conv{kind}{axes}d" for kind in ("", "_transpose") for axes in (1, 2, 3)),
        *_NORMALISATIONS,
        *(f"native_{name}" for name in _NORMALISATIONS),
        "_native_batch_norm_legit_no_training",
        "cudnn_batch_norm",
        "_fused_rms_norm",
        *_WHOLE_LAYERS,
    )
)
"""Names of the ATen operators whose operands move."""


class MovedOperands(TorchDispatchMode):
    """Inside, the floating-point operands of the operators in `MOVED` are moved; the same way for the same seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = np.random.default_rng(seed % 2**63)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)  # a higher-order operator has none
        if schema is not None and schema.name.partition("::")[2] in MOVED and not schema.is_mutable:
            args, kwargs = tree_map_only(torch.Tensor, self._moved, (args, kwargs))
        return func(*args, **kwargs)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return moved(tensor, self._generator)


def moved(tensor: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Each element moved by up to half a unit in its last place.

    Whole numbers up to `eps ** -0.5` stay what they are: masks, counts and selections are exact however they are
    multiplied, and a comparison of them is no noise either. So does what is not finite, and nothing becomes infinite.
    Tensors that are not dense or hold no real floating-point numbers are returned unchanged.
    """
    if not tensor.is_floating_point() or tensor.layout != torch.strided or not tensor.numel():
        return tensor
    if isinstance(tensor, Lazy):
        tensor = tensor.whole()
    result = torch.empty_like(tensor, memory_format=torch.preserve_format)
    for rows in row_blocks(tuple(tensor.shape)) if tensor.dim() else (...,):
        wide = tensor[rows].double()
        result[rows] = wide + _steps(wide, tensor.dtype, generator)
    return result


def _steps(wide: torch.Tensor, dtype: torch.dtype, generator: np.random.Generator) -> torch.Tensor:
    """By how much each element moves; in arithmetic throughout, which is several times as fast as choosing."""
    info = torch.finfo(dtype)
    draws = torch.from_numpy(generator.random(tuple(wide.shape), np.float32)).to(wide.device).sub_(0.5)
    size = wide.abs()
    broken = (size.round() - size).abs_()
    too_large = (size - info.eps**-0.5).clamp_min_(0.0)
    steps = size.clamp_min(info.tiny).mul_(info.eps).mul_(draws).mul_(broken.add_(too_large).sign_())
    if not float(size.max()) <= info.max / 2:
        steps.masked_fill_(~(size <= info.max / 2), 0.0)
    return steps
