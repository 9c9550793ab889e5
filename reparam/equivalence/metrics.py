"""Error metrics between two tensors. Pure functions; every tensor is finite and float64 unless said otherwise."""

from __future__ import annotations

import math
from typing import Any

import torch

from reparam.equivalence.comparison import Location
from reparam.inputs import Inputs

# Enough to tell one sample from many; counting more costs a sort of the whole tensor.
_MAX_COUNTED = 1 << 14


def rms(values: torch.Tensor) -> float:
    """Root of the mean square."""
    return math.sqrt(float(values.square().mean())) if values.numel() else 0.0


def error_metrics(candidate: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The metrics of `OutputComparison` that need the candidate and the truth alone, both [any shape].

    Args:
        dtype: of the output in deployment; its ULP is the unit of `max_ulp`.
    """
    error = candidate - truth
    magnitude = error.abs()
    scale, error_rms, truth_rms = float(truth.abs().max()), rms(error), rms(truth)
    return {
        "max_abs": float(magnitude.max()),
        "mean_abs": float(magnitude.mean()),
        "rms": error_rms,
        "max_rel": relative(float(magnitude.max()), scale),
        "numeric_error": relative(error_rms, truth_rms),
        "cosine": cosine(candidate, truth),
        "snr_db": snr_db(truth_rms, error_rms),
        "max_ulp": float((magnitude / ulp(truth, dtype)).max()),
    }


def relative(error: float, scale: float) -> float:
    """`error / scale`; 0 where both are 0."""
    if error == 0.0:
        return 0.0
    return error / scale if scale > 0.0 else math.inf


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of the angle between two tensors read as vectors; 1 if both are zero, 0 if only one is."""
    norm_a, norm_b = float(a.norm()), float(b.norm())
    if norm_a == 0.0 or norm_b == 0.0:
        return 1.0 if norm_a == norm_b else 0.0
    return max(-1.0, min(1.0, float(((a / norm_a) * (b / norm_b)).sum())))


def snr_db(signal_rms: float, error_rms: float) -> float:
    """Signal-to-noise ratio in decibel; infinite without error, minus infinite for an error without signal."""
    if error_rms == 0.0:
        return math.inf
    return 20.0 * math.log10(signal_rms / error_rms) if signal_rms > 0.0 else -math.inf


def ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance from each value to the next larger number of `dtype`, float64; subnormals share the smallest one."""
    info = torch.finfo(dtype)
    # frexp's mantissa lies in [1/2, 1), so the leading bit of a value is worth 2^(exponent - 1).
    exponent = torch.frexp(values.abs().clamp_min(info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


def top1_agreement(candidate: torch.Tensor, original: torch.Tensor) -> float | None:
    """Share of rows with the same arg-max; None where the output is not [N, C] with C >= 2."""
    if original.dim() != 2 or original.shape[1] < 2 or original.shape[0] == 0:
        return None
    return float((candidate.argmax(1) == original.argmax(1)).double().mean())


def passing_tolerance(candidate: torch.Tensor, original: torch.Tensor) -> float:
    """Smallest t with |candidate - original| <= t + t * |original| for every element."""
    return float(((candidate - original).abs() / (1.0 + original.abs())).max())


def location(index: tuple[int, ...], shape: tuple[int, ...]) -> Location:
    """Where an element lies in the dims behind batch and channel."""
    if len(shape) < 3:
        return "no spatial dims"
    at_border = any(i in (0, size - 1) for i, size in zip(index[2:], shape[2:], strict=True))
    return "border" if at_border else "interior"


def distinct_values(inputs: Inputs) -> int:
    """How many different values the tensors of an input have, of those that `distinct` counts, together."""
    return sum(distinct(tensor.double(), torch.float32) for tensor in inputs.tensors() if tensor.numel())


def distinct(values: torch.Tensor, dtype: torch.dtype) -> int:
    """How many different values of `dtype` there are, counted over at most 16,384 evenly spaced elements."""
    flat = values.flatten()
    flat = flat[:: max(1, flat.numel() // _MAX_COUNTED)]
    # Rounding first: equal values computed at different positions may differ in float64's last bits.
    coarse = dtype if torch.finfo(dtype).bits < 64 else torch.float32
    return int(torch.unique(flat.to(coarse).double()).numel())
