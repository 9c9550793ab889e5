"""Monte Carlo arithmetic (Parker 1997): a run in which what is multiplied is moved at random, as roundings move it.

What a model does to its roundings shows when it is run several times, each time with other roundings. Here the operands
of products, convolutions and normalisations are moved where they are used, data and weights alike, by about half a unit
in the last place: in float64 by that, in the dtype itself to a neighbouring number or not at all.

A rounding is no dice: what is exact or equal in a model stays so in every deployment of it, and decisions hang on that.
A run that moved it would jump, and that jump is no noise. So

* the weights themselves stay what they are: a model may compare a buffer with a constant or make an index of it;
* numbers of few significant bits stay: masks, counts, selections and their halves are exact whatever multiplies them;
* equal numbers move alike: what a number moves by is drawn by hashing it. So do those that differ by a power of two,
  and opposite ones stay opposite.

Sums are not varied, nor what a number multiplies; they round what reaches them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from reparam.lazy import Lazy, row_blocks

_ELEMENTWISE = ("mul", "div")
_PRODUCTS = (
    *("linear", "addmm", "addbmm", "baddbmm", "addmv", "addr", "mm", "bmm", "mv", "dot", "vdot", "matmul", "inner"),
    *("outer", "tensordot", "linalg_vecdot", "_trilinear", "bilinear", "_cdist_forward", "_euclidean_dist"),
)
_CONVOLUTIONS = (
    *("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "cudnn_convolution", "conv_tbc"),
    *(f"conv{kind}{axes}d" for kind in ("", "_transpose") for axes in (1, 2, 3)),
)
_NORMALISATIONS = (
    *("batch_norm", "layer_norm", "group_norm", "rms_norm", "native_batch_norm", "native_layer_norm"),
    *("native_group_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_fused_rms_norm"),
)
_WHOLE_LAYERS = (
    *("mkldnn_rnn_layer", "_native_multi_head_attention", "_transformer_encoder_layer_fwd"),
    *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
    "_scaled_dot_product_cudnn_attention",
)
MOVED = frozenset((*_ELEMENTWISE, *_PRODUCTS, *_CONVOLUTIONS, *_NORMALISATIONS, *_WHOLE_LAYERS))
"""Names of the ATen operators whose operands move; of a tensor times a number nothing does."""
_MANTISSA = (1 << 52) - 1
"""The bits of a float64 after the first significant one."""
_KEPT = 1 << 24
"""Elements of moved weights that are kept, since a recurrent model reads the same ones at every step."""
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of SplitMix64 (Steele, Lea, Flood 2014), as signed numbers


class MovedOperands(TorchDispatchMode):
    """Inside, the floating-point operands of the operators in `MOVED` are moved; the same way for the same seed.

    Args:
        seed: draws the directions.
        step: by how many halves of a unit in the last place the largest moves are.
        weights: tensors that are read time and again; what becomes of them is kept.
    """

    def __init__(self, seed: int, step: float = 1.0, weights: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        first = torch.Generator().manual_seed(seed)
        self._key, self._step = int(torch.randint(-(2**62), 2**62, (1,), generator=first, device="cpu")), step
        self._weights = {_place(tensor): tensor for tensor in weights if _is_dense(tensor)}
        self._known: dict[Any, torch.Tensor] = {}
        self._left = _KEPT

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_moved(func, args):
            args, kwargs = tree_map_only(torch.Tensor, self._moved, (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _is_moved(func: Any, args: Any) -> bool:
        schema = getattr(func, "_schema", None)  # a higher-order operator has none
        if schema is None or schema.is_mutable:
            return False
        name = schema.name.partition("::")[2]
        if name in _ELEMENTWISE:
            return func._overloadname == "Tensor" and isinstance(args[1], torch.Tensor) and args[1].dim() > 0
        return name in MOVED

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        if not _is_dense(tensor):
            return tensor
        place = _place(tensor)
        if place not in self._weights:
            return moved(tensor, self._key, self._step)
        version = 0 if tensor.is_inference() else tensor._version
        key = (place, version, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        known = self._known.get(key)
        if known is None:
            known = moved(tensor, self._key, self._step)
            if known.numel() <= self._left:
                self._left -= known.numel()
                self._known[key] = known
        return known


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether it holds real floating-point numbers in one storage."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_nested


def _place(tensor: torch.Tensor) -> int:
    """Where the elements of a tensor come from."""
    return id(tensor.source) if isinstance(tensor, Lazy) else tensor.untyped_storage()._cdata


def moved(tensor: torch.Tensor, key: int, step: float = 1.0) -> torch.Tensor:
    """Each element moved by up to `step` halves of a unit in its last place (how, `key` says), rounded to the dtype.

    Numbers of few significant bits (`_few_bits`) and what is not finite stay what they are, and nothing becomes
    infinite. Tensors that are not dense or hold no real floating-point numbers are returned unchanged.
    """
    if not _is_dense(tensor) or not tensor.numel():
        return tensor
    if isinstance(tensor, Lazy):
        tensor = tensor.whole()
    result = torch.empty_like(tensor, memory_format=torch.preserve_format)
    if result.stride() != tensor.stride():  # it overlaps or has gaps
        tensor, result = tensor.contiguous(), torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    source, target = (one.as_strided((one.numel(),), (1,)) for one in (tensor, result))
    for block in row_blocks((source.numel(),)):
        wide = source[block].double()
        target[block] = wide + step * _half_units(wide, tensor.dtype, key)
    return result


def _half_units(wide: torch.Tensor, dtype: torch.dtype, key: int) -> torch.Tensor:
    """Up to half a unit in the last place of `dtype`; in arithmetic throughout, which is faster than choosing."""
    info = torch.finfo(dtype)
    size = wide.abs()
    mantissa = wide.view(torch.int64) & _MANTISSA
    is_moved = (mantissa & (_MANTISSA >> _few_bits(dtype))).clamp_max_(1)
    steps = size.clamp_min(info.tiny).mul_(info.eps).mul_(_hashed(mantissa, key)).mul_(is_moved)
    if not float(size.max()) <= info.max / 2:
        steps.masked_fill_(~(size <= info.max / 2), 0.0)
    return steps.mul_(wide.sign())


def _few_bits(dtype: torch.dtype) -> int:
    """So many bits after the first are exact: half of those of `dtype`, in float64 fewer than a float32 has."""
    return min(19, round(-math.log2(torch.finfo(dtype).eps)) // 2)


def _hashed(bits: torch.Tensor, key: int) -> torch.Tensor:
    """A number between -1/2 and 1/2 for each; equal ones for equal ones."""
    bits = bits ^ key
    for multiplier, shift in zip(_MULTIPLIERS, (30, 27), strict=True):
        bits = (bits ^ _shifted(bits, shift)) * multiplier
    return ((bits ^ _shifted(bits, 31)) >> 11).double().mul_(2.0**-53)


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, zeros coming in; torch's own shift repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
