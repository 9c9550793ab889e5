"""Error metrics between two tensors. Pure functions; every tensor is finite and float64 unless said otherwise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from reparam.equivalence.comparison import ULP_BOUNDS, ULP_QUANTILES, Location, OutputComparison
from reparam.inputs import Inputs

# Enough to tell one sample from many; counting more costs a sort of the whole tensor.
_MAX_COUNTED = 1 << 14
_MAX_SORTED = 1 << 18
MOST_TOP = 5


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
    ulps = (magnitude / ulp(truth, dtype)).flatten()
    return {
        "max_abs": float(magnitude.max()),
        "mean_abs": float(magnitude.mean()),
        "rms": error_rms,
        "max_rel": relative(float(magnitude.max()), scale),
        "numeric_error": relative(error_rms, truth_rms),
        "cosine": cosine(candidate, truth),
        "snr_db": snr_db(truth_rms, error_rms),
        "max_ulp": float(ulps.max()),
        "ulp_quantiles": ulp_quantiles(ulps),
        "ulp_histogram": ulp_histogram(ulps),
    }


def filled(
    figures: OutputComparison,
    t: torch.Tensor,
    o: torch.Tensor,
    c: torch.Tensor,
    noise: torch.Tensor,
    dtype: torch.dtype,
) -> OutputComparison:
    """`figures` with all that depend on no verdict, of truth, original and candidate.

    Args:
        noise: of the original, which need not be `o - t`.
        dtype: as for `error_metrics`.
    """
    worst = (c - t).abs().argmax()
    k, agreement = topk_agreement(c, o)
    index = tuple(map(int, torch.unravel_index(worst, t.shape))) if t.dim() else ()
    return replace(
        figures,
        **error_metrics(c, t, dtype),
        original_noise=relative(rms(noise), rms(t)),
        original_ulp_quantiles=ulp_quantiles(((o - t).abs() / ulp(t, dtype)).flatten()),
        top1_agreement=top1_agreement(c, o),
        top_k=k,
        topk_agreement=agreement,
        tolerance=passing_tolerance(c, o),
        worst_index=index,
        worst_location=location(index, tuple(t.shape)),
    )


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


def ulp_quantiles(ulps: torch.Tensor) -> tuple[float, ...]:
    """For each of `ULP_QUANTILES` the smallest error that at least this share of the errors [n], n >= 1, is within.

    Above 2^19 errors those of an even subset of more than half as many: sorting more takes longer than the model does.
    """
    ordered = ulps[:: max(1, ulps.numel() // _MAX_SORTED)].sort().values
    return tuple(float(ordered[math.ceil(share * ordered.numel()) - 1]) for share in ULP_QUANTILES)


def ulp_histogram(ulps: torch.Tensor) -> tuple[int, ...]:
    """How many of the errors [n] lie between each of `ULP_BOUNDS` (included) and the bound before it."""
    bounds = torch.tensor(ULP_BOUNDS, dtype=ulps.dtype, device="cpu")
    return tuple(torch.bincount(torch.bucketize(ulps, bounds), minlength=len(ULP_BOUNDS)).tolist())


def top1_agreement(candidate: torch.Tensor, original: torch.Tensor) -> float | None:
    """Share of rows with the same arg-max; None where the output is not [N, C] with C >= 2."""
    if original.dim() != 2 or original.shape[1] < 2 or original.shape[0] == 0:
        return None
    return float((candidate.argmax(1) == original.argmax(1)).double().mean())


def topk_agreement(candidate: torch.Tensor, original: torch.Tensor) -> tuple[int | None, float | None]:
    """k, and the mean share of a row's k largest values that are so in both; None unless [N, C] with C >= 3."""
    if original.dim() != 2 or original.shape[1] < 3 or original.shape[0] == 0:
        return None, None
    k = min(MOST_TOP, original.shape[1] - 1)
    ours, theirs = candidate.topk(k, 1).indices, original.topk(k, 1).indices
    return k, float((ours[:, :, None] == theirs[:, None, :]).any(1).double().mean())


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
