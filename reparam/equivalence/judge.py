"""When is an error too large? One rule for both questions: error <= factor * luck * noise + floor * scale.

The three tensors are compared as `Spread`s: RMS and peak of the whole and of every slice along every axis, so that
neither a huge channel hides a fault in another one, nor a large interior a fault at the border. Held against its bar is

* the whole tensor by RMS, with the stated factor;
* each slice by RMS and by peak, with the factor times what chance alone does to the largest of many slices.

`luck` is 1 for many independent values and grows where the comparison has few: the logarithm of the ratio of two RMS
values of m normal samples each has standard deviation 1/sqrt(m) (Fisher 1924); three of those are allowed. Samples are
counted as distinct values, because a constant input makes all positions of a channel one sample; and not many for each
distinct value of the input. Slices are granted it only where the kernels are not the original's: else the two errors
share what chance did.

A slice whose own noise is small by luck, or because its values cancel to nearly nothing, is granted the noise that is
typical of its peers: the median of noise over scale times its own scale, and the (lower) medians of noise and of scale.
They are medians and not maxima, so a few huge or noisy channels lend nothing to the others. Of a handful of values that
are left among zeros (two of five logits, behind a ReLU) there is no median to speak of; their floor is that of the
tensor's RMS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Deviations of log(RMS ratio) that are put down to chance; the factor 2 on top makes a false alarm rarer still.
LUCK_DEVIATIONS = 3.0
# A value is stored with half a ULP of error, and folding rounds one weight and one bias once, each half a ULP of the
# terms that are summed; the original may have none of the three (it can be exact). Twice their sum of 3/2, rounded up.
FLOOR_ULPS = 4.0
# A runtime's kernels sum in another order than the original's: over k terms that alone moves a result by up to
# sqrt(k)/2 ULP, of which the original's own noise on few outputs says little. 12 more ULP is k = 576 terms; beyond that
# kernels sum in blocks. They are ULP of what is summed in: float32, for half precision too.
RUNTIME_ULPS = 12.0
# Multiple of the original's noise up to which the rounding of the candidate's own weights is excused.
MAX_WEIGHT_ROUNDING = 4.0
FEW_ELEMENTS = 16


@dataclass(frozen=True)
class Spread:
    """How large a tensor is, as a whole and slice by slice.

    Attributes:
        rms, peak: root of the mean square, largest absolute value.
        slices: for each axis, RMS and peak of every slice, each of shape [size of the axis].
    """

    rms: float
    peak: float
    slices: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def scaled(self, factor: float) -> Spread:
        """The spread of `factor` times the tensor, factor >= 0."""
        slices = tuple((rms * factor, peak * factor) for rms, peak in self.slices)
        return Spread(self.rms * factor, self.peak * factor, slices)

    def plus(self, other: Spread) -> Spread:
        """A bound on the spread of the sum."""
        pairs = zip(self.slices, other.slices, strict=True)
        slices = tuple((a_rms + b_rms, a_peak + b_peak) for (a_rms, a_peak), (b_rms, b_peak) in pairs)
        return Spread(self.rms + other.rms, self.peak + other.peak, slices)

    def larger(self, other: Spread) -> Spread:
        """The larger of both, slice by slice."""
        pairs = zip(self.slices, other.slices, strict=True)
        slices = tuple((torch.maximum(a[0], b[0]), torch.maximum(a[1], b[1])) for a, b in pairs)
        return Spread(max(self.rms, other.rms), max(self.peak, other.peak), slices)


def spread(values: torch.Tensor) -> Spread:
    """The spread of a float64 tensor of any shape with at least one element."""
    values = values.reshape(1) if values.dim() == 0 else values
    square, magnitude = values.square(), values.abs()
    slices = []
    for axis in range(values.dim()):
        others = [d for d in range(values.dim()) if d != axis]
        rms = (square.mean(others) if others else square).sqrt()
        slices.append((rms, magnitude.amax(others) if others else magnitude))
    return Spread(math.sqrt(float(square.mean())), float(magnitude.max()), tuple(slices))


def with_weight_rounding(noise: Spread, rounding: Spread, truth: Spread, eps: float) -> Spread:
    """The original's noise, or what rounding the candidate's changed weights once explains, whichever is larger.

    Rounded weights are wrong in the same way at every position, so where a network averages they cost more than the
    rounding of activations does. No candidate can avoid that; but one whose weights lose more than
    `MAX_WEIGHT_ROUNDING` times the original's noise is badly conditioned, and is not excused.
    """
    limit = MAX_WEIGHT_ROUNDING * max(noise.rms, eps * truth.rms)
    return noise.larger(rounding.scaled(min(1.0, limit / rounding.rms) if rounding.rms > 0.0 else 1.0))


def numeric_floor(dtype: torch.dtype, runtime: bool) -> float:
    """The share of the scale that is allowed whatever the noise, for results in `dtype`."""
    summed_in = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return FLOOR_ULPS * torch.finfo(dtype).eps + (RUNTIME_ULPS * summed_in if runtime else 0.0)


@dataclass(frozen=True)
class Judgement:
    """The largest ratio of error to bar, and where: `the whole tensor`, `index 3 of dim 1`. At most 1 passes."""

    ratio: float
    where: str

    @property
    def passed(self) -> bool:
        """Whether the error stays within its bar everywhere."""
        return self.ratio <= 1.0


def judge(
    error: Spread,
    noise: Spread,
    truth: Spread,
    *,
    factor: float,
    floor: float,
    samples: int,
    typical: float = 0.0,
    paired: bool = True,
    by_peers: bool = False,
    redrawn: Spread | None = None,
) -> Judgement:
    """Holds an error against the noise.

    Args:
        error, noise, truth: spreads of tensors of one shape.
        factor: multiple of the noise that is allowed.
        floor: share of the scale (RMS for RMS, peak for peak) that is allowed besides.
        samples: independent values in the tensor.
        typical: noise over scale that is known to be typical of this output, from other inputs.
        paired: whether both errors are of the same kernels.
        by_peers: whether the floor of a slice of fewer than `FEW_ELEMENTS` is that of its peers, if that is larger: one
            logit of a thousand is nearly zero by chance, which says nothing of the terms it was summed from. Of
            fewer than `FEW_ELEMENTS` single values among zeros it is that of the tensor, whatever `by_peers` says.
        redrawn: noise of slices in several further runs; 0 where there were none. A slice is granted its own, no other.
    """
    luck = math.exp(LUCK_DEVIATIONS / math.sqrt(max(samples, 1)))
    elements = math.prod(rms.numel() for rms, _ in truth.slices)
    slice_factor = factor if paired else factor * luck
    bar = factor * luck * max(noise.rms, typical * truth.rms) + floor * truth.rms
    worst = Judgement(_ratio(error.rms, bar), "the whole tensor")
    for axis, (errors, noises, truths) in enumerate(zip(error.slices, noise.slices, truth.slices, strict=True)):
        if errors[0].numel() < 2:
            continue
        in_each = elements // errors[0].numel()
        handful = in_each == 1 and 0 < int((truths[0] > 0).sum()) < min(FEW_ELEMENTS, truths[0].numel())
        few = by_peers and in_each < FEW_ELEMENTS
        for kind in (0, 1):
            peers = truth.rms if handful else float(truths[kind].median()) if few else 0.0
            least = floor * truths[kind].clamp_min(peers)
            bars = _noise_bars(truths[kind], noises[kind], slice_factor, typical)
            if redrawn is not None:
                bars = torch.maximum(bars, slice_factor * _largest_of(bars.numel()) * redrawn.slices[axis][kind])
            bars += least
            ratios = torch.where(errors[kind] == 0, 0.0, errors[kind] / bars)
            index = int(ratios.argmax())
            if float(ratios[index]) > worst.ratio:
                worst = Judgement(float(ratios[index]), f"index {index} of dim {axis}")
    return worst


def effective_scale(
    truth: torch.Tensor, noise: torch.Tensor, factor: float, floor: float, elements: int
) -> torch.Tensor:
    """What the error of each slice is divided by when it is reported.

    Its peak; or, if larger, the scale at which `floor` is what its noise explains. The peak of a few elements says
    nothing of the scale of the terms they were summed from (one logit of a thousand is nearly zero by chance), so a
    slice of fewer than `FEW_ELEMENTS` takes its peers' median if that is larger.
    """
    scale = truth + _noise_bars(truth, noise, factor, 0.0) / floor
    return scale.clamp_min(float(truth.median())) if elements < FEW_ELEMENTS else scale


def _noise_bars(truths: torch.Tensor, noises: torch.Tensor, factor: float, typical: float) -> torch.Tensor:
    live = truths > 0
    relative = float((noises[live] / truths[live]).median()) if bool(live.any()) else 0.0
    relative = max(relative, typical)
    typical_level = max(float(noises.median()), relative * float(truths.median()))
    level = torch.maximum(noises, truths * relative).clamp_min(typical_level)
    luck = 2.0 + _largest_of(noises.numel())  # 2 more deviations for the noise itself being a sample
    return factor * luck * level


def _largest_of(count: int) -> float:
    """About how large the largest of so many normal samples is, in standard deviations."""
    return math.sqrt(2.0 * math.log(max(count, 2)))


def _ratio(error: float, bar: float) -> float:
    if error == 0.0:
        return 0.0
    return error / bar if bar > 0.0 else math.inf
