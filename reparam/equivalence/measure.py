"""Outputs that were already computed become measurements, and measurements become verdicts.

Two steps, because the verdict on one input may lean on the noise seen with the others: `measure` holds the tensors only
long enough to take their spreads, `verdict` judges. `compare_outputs` is both in one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from reparam.equivalence import metrics
from reparam.equivalence.comparison import OutputComparison
from reparam.equivalence.judge import (
    Judgement,
    Spread,
    effective_scale,
    judge,
    numeric_floor,
    spread,
    with_weight_rounding,
)
from reparam.equivalence.measured import ALGEBRA_TOLERANCE, NOISE_FACTOR, Measured, Rules, Runs
from reparam.equivalence.nonfinite import count, nonfinite, same_nonfinite
from reparam.equivalence.outputs import Flat, double, flatten, renamed, structure_failures

# Rounding noise scales with a dtype's unit roundoff; the factor allows for kernels of two dtypes summing in different
# orders.
_NOISE_MARGIN = 8.0
# The disturbed weights show one rounding. Folding within the deployment dtype, as most tools do, rounds several times
# and the factor of a channel coherently; that is still rounding and not wrong algebra. Measured ratios reach 1.8.
FOLD_ROUNDINGS = 3.0
# Relative noise of an output from which on it no longer tells how much its roundings are amplified.
AT_ITS_CEILING = 0.25
_EPS64, _EPS32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps


def compare_outputs(
    truth: Any,
    original: Any,
    candidate: Any,
    *,
    candidate_float64: Any = None,
    noise_factor: float = NOISE_FACTOR,
    algebra_tolerance: float = ALGEBRA_TOLERANCE,
    dtype: torch.dtype | None = None,
    check_dtypes: bool = True,
    check_structure: bool = True,
) -> tuple[OutputComparison, ...]:
    """Compares outputs that were already computed on one input.

    Args:
        truth: what the original returns in float64; tensors of any shape in any nesting of containers.
        original: what it returns in the deployment dtype, of the same structure.
        candidate: what the candidate returns in the deployment dtype.
        candidate_float64: what it returns in float64; None leaves the algebra unasked.
        noise_factor: multiple of the original's noise that the candidate may show.
        algebra_tolerance: scaled float64 difference that is allowed.
        dtype: the deployment dtype; None takes the coarsest floating-point dtype among the original's outputs.
        check_dtypes: whether the candidate must return the original's dtypes.
        check_structure: False compares the tensors in order and ignores the containers (a runtime that returns a list).

    Returns:
        One value per output. Whatever concerns no single output (containers, extra outputs, an empty comparison) is a
        failure of a value named `output`.
    """
    runs = Runs(flatten(truth), flatten(original), flatten(candidate))
    if candidate_float64 is not None:
        runs = replace(runs, candidate64=flatten(candidate_float64))
    floats = [leaf.dtype for leaf in runs.original.tensors().values() if leaf.is_floating_point()]
    coarsest = max(floats, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)
    rules = Rules(noise_factor, algebra_tolerance, dtype or coarsest, check_dtypes, check_structure)
    measured, failures = measure(runs, rules)
    outputs = tuple(verdict(output, rules) for output in measured)
    if failures:
        outputs = (*outputs, OutputComparison("output", failures=failures))
    return outputs


SAMPLES_PER_VALUE = 16
"""Independent rounding errors for each different value of the input: where it repeats itself the first layers repeat
their errors, one for each of their channels, of which there are rarely fewer."""


def measure(runs: Runs, rules: Rules) -> tuple[tuple[Measured, ...], tuple[str, ...]]:
    """Measures every output that both models return; also sentences on what is missing, extra or of another kind."""
    if not rules.check_structure:
        runs = replace(
            runs,
            candidate=renamed(runs.candidate, runs.original),
            candidate64=runs.candidate64 and renamed(runs.candidate64, runs.original),
            rounded64=runs.rounded64 and renamed(runs.rounded64, runs.original),
        )
    failures = list(structure_failures(runs.original, runs.candidate))
    measured = []
    for name, original in runs.original.leaves.items():
        if name not in runs.candidate.leaves:
            continue
        candidate = runs.candidate.leaves[name]
        if isinstance(original, torch.Tensor) and isinstance(candidate, torch.Tensor):
            measured.append(_measure_tensor(name, original, candidate, runs, rules))
        elif type(original) is not type(candidate) or not _same(original, candidate):
            failures.append(f"{name} is {candidate!r:.60} and should be {original!r:.60}")
    return tuple(measured), tuple(failures)


def verdict(measured: Measured, rules: Rules, typical: float = 0.0) -> OutputComparison:
    """Judges a measured output; `typical` is the noise over RMS that other inputs showed for it."""
    figures, truth = measured.figures, measured.truth
    failures = list(figures.failures)
    numeric = algebra = None
    if truth is not None and measured.numeric is not None:
        floor = numeric_floor(measured.dtype, rules.runtime)
        numeric = _judged(
            measured, measured.numeric, rules.noise_factor, floor, typical, not rules.runtime, redrawn=measured.redrawn
        )
        if not numeric.passed:
            failures.append(
                f"{figures.name}: the error of the candidate is {numeric.ratio:.3g} times what is allowed, "
                f"at {numeric.where} ({_name(rules.dtype)} error {figures.numeric_error:.2g}, the original's own "
                f"{figures.original_noise:.2g}); worst element {list(figures.worst_index)}, {figures.worst_location}"
            )
    if truth is not None and measured.algebra is not None:
        tolerance = rules.algebra_tolerance
        algebra = _judged(measured, measured.algebra, rules.noise_factor, tolerance, by_peers=True)
        untold = "" if algebra.passed or failures else _untold(measured, rules)
        figures = replace(figures, untold=untold)
        if not algebra.passed and not untold:
            failures.append(
                f"{figures.name}: the float64 results differ by {figures.algebra_error or 0.0:.2g}, "
                f"{algebra.ratio:.3g} times what is allowed, at {algebra.where}; "
                f"worst element {list(figures.worst_index)}, {figures.worst_location}"
            )
    return replace(
        figures,
        numeric_ratio=None if numeric is None else numeric.ratio,
        algebra_ratio=None if algebra is None else algebra.ratio,
        failures=tuple(failures),
    )


def _untold(measured: Measured, rules: Rules) -> str:
    """Says so if the difference would pass, were all that other roundings did to the original its noise in float64."""
    assert measured.truth is not None
    assert measured.algebra is not None
    if measured.at_most is None:
        return ""
    error, known = measured.algebra
    most = known.larger(measured.at_most.scaled(FOLD_ROUNDINGS))
    if not _judged(measured, (error, most), rules.noise_factor, rules.algebra_tolerance, by_peers=True).passed:
        return ""
    own, differs = (metrics.relative(one.rms, measured.truth.rms) for one in (measured.at_most, error))
    return (
        f"{measured.figures.name}: the float64 results differ by {differs:.2g} (RMS), which roundings alone may do to "
        f"the original (in the few runs that were made, up to {own:.2g}), so nothing can be told"
    )


def _judged(
    measured: Measured,
    pair: tuple[Spread, Spread],
    factor: float,
    floor: float,
    typical: float = 0.0,
    paired: bool = True,
    by_peers: bool = False,
    redrawn: Spread | None = None,
) -> Judgement:
    assert measured.truth is not None
    return judge(
        *(*pair, measured.truth),
        factor=factor,
        floor=floor,
        samples=measured.samples,
        typical=typical,
        paired=paired,
        by_peers=by_peers,
        redrawn=redrawn,
    )


def _measure_tensor(name: str, original: torch.Tensor, candidate: torch.Tensor, runs: Runs, rules: Rules) -> Measured:
    """Measures one tensor: shape and dtype, then elements that are not finite, then the rest."""
    figures = OutputComparison(name, tuple(original.shape), _name(original.dtype))
    truth = runs.truth.leaves.get(name)
    if not isinstance(truth, torch.Tensor) or truth.shape != original.shape:
        return _failed(figures, f"{name}: the original itself returns something else in float64")
    if candidate.shape != original.shape:
        return _failed(figures, f"{name} has shape {list(candidate.shape)} and should have {list(original.shape)}")
    if rules.check_dtypes and runs.numeric and candidate.dtype != original.dtype:
        return _failed(figures, f"{name} is {_name(candidate.dtype)} and should be {_name(original.dtype)}")
    if original.numel() == 0:
        return Measured(replace(figures, notes=(f"{name} has no elements",)))
    if not (original.is_floating_point() and candidate.is_floating_point()):
        return _measure_exact(figures, truth, original, candidate, runs, rules)
    coarse = max(original.dtype, rules.dtype, key=lambda kind: torch.finfo(kind).eps)
    return _measure_floats(figures, truth, original, candidate, runs, rules, coarse)


def _measure_floats(
    figures: OutputComparison,
    truth: torch.Tensor,
    original: torch.Tensor,
    candidate: torch.Tensor,
    runs: Runs,
    rules: Rules,
    dtype: torch.dtype,
) -> Measured:
    t, o, c = double(truth), double(original), double(candidate)
    c64 = _leaf(runs.candidate64, figures.name, t)
    failures, notes, usable, shared = nonfinite(figures.name, t, o, c)
    if runs.candidate64 is not None and c64 is None:
        failures.append(f"{figures.name}: the candidate returns no such output in float64")
    if c64 is not None:
        odd = ~same_nonfinite(t, c64)
        if bool(odd.any()):
            failures.append(f"{figures.name}: {count(odd)} not finite in one float64 result only")
        usable &= c64.isfinite()
    figures = replace(figures, elements=int(usable.sum()), failures=tuple(failures), notes=tuple(notes))
    if figures.elements == 0:
        return Measured(figures, shared_nonfinite=shared)
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    t, o, c = (torch.where(usable, x, zero) for x in (t, o, c))
    c64 = None if c64 is None else torch.where(usable, c64, zero)
    noise, noise_dtype = o - t, dtype
    other = _leaf(runs.noise, figures.name, t)
    if other is not None and runs.noise_dtype is not None:
        noise, noise_dtype = torch.where(usable & other.isfinite(), other - t, zero), runs.noise_dtype
    rounding = _leaf(runs.rounded64, figures.name, t)
    if rounding is not None and c64 is not None:
        rounding = torch.where(usable & rounding.isfinite(), rounding - c64, zero)
    small = torch.finfo(torch.float64).eps / torch.finfo(noise_dtype).eps
    other_dtype = runs.noise is not None and runs.noise_dtype != rules.dtype
    figures = metrics.filled(
        figures, t, o, c, noise * small if other_dtype and runs.judged64 else noise, original.dtype
    )
    # Dividing by the scale first keeps squares in range; ratios do not notice.
    unit = float(t.abs().max()) or 1.0
    s_truth, s_noise = spread(t / unit), spread(noise / unit)
    s_rounding = None if rounding is None else spread(rounding / unit)
    amplified = metrics.relative(s_noise.rms, s_truth.rms) / torch.finfo(noise_dtype).eps
    numeric = algebra = None
    narrow_inside = rules.dtype == torch.float64 and not runs.judged64  # it rounds as `noise` does, whatever it is in
    if (rules.dtype != torch.float64 or narrow_inside) and runs.numeric:
        allowed = s_noise
        if s_rounding is not None:
            allowed = with_weight_rounding(s_noise, s_rounding, s_truth, torch.finfo(dtype).eps)
        numeric = (spread((c - t) / unit), allowed)
    if c64 is not None:
        s_exact, s_error = s_noise.scaled(_NOISE_MARGIN * small), spread((c64 - t) / unit)
        single = _leaf(runs.single, figures.name, t)
        if single is not None:
            linear = spread(torch.where(usable & single.isfinite(), single - t, zero) / unit)
            s_exact = s_exact.larger(linear.scaled(_NOISE_MARGIN * _EPS64 / _EPS32))
            if s_noise.rms >= AT_ITS_CEILING * s_truth.rms:
                amplified = max(amplified, metrics.relative(linear.rms, s_truth.rms) / _EPS32)
        algebra = (s_error, s_exact)
        if s_rounding is not None and not runs.algebra_is_exact:
            algebra = (s_error, s_exact.plus(s_rounding.scaled(FOLD_ROUNDINGS)))
        algebra = algebra if runs.judged64 else None
        per_channel = _per_channel(s_error, s_exact, s_truth, t.numel(), rules)
        per_tensor = metrics.relative(s_error.peak, s_truth.peak)
        figures = replace(figures, algebra_per_tensor=per_tensor, algebra_per_channel=per_channel)
    samples = metrics.distinct(t, dtype)
    if runs.given is not None:
        samples = min(samples, SAMPLES_PER_VALUE * runs.given)
    return Measured(figures, s_truth, numeric, algebra, samples, dtype, shared, unit, amplified)


def _measure_exact(
    figures: OutputComparison,
    truth: torch.Tensor,
    original: torch.Tensor,
    candidate: torch.Tensor,
    runs: Runs,
    rules: Rules,
) -> Measured:
    """Integers and booleans: equal to the truth, but for a multiple of the ties that rounding breaks there as well."""
    t, o, c = double(truth), double(original), double(candidate)
    wrong, own, failures = int((c != t).sum()), int((o != t).sum()), []
    if wrong > rules.noise_factor * own and bool((c != o).any()):
        failures.append(f"{figures.name}: {wrong} of {t.numel()} values differ ({own} in the original itself)")
    exact = _leaf(runs.candidate64, figures.name, t)
    if exact is not None and runs.numeric and runs.rounded64 is None and bool((exact != t).any()):
        failures.append(f"{figures.name}: {int((exact != t).sum())} of {t.numel()} values differ in float64")
    figures = replace(figures, elements=t.numel(), failures=tuple(failures))
    figures = metrics.filled(figures, t, o, c, o - t, torch.float64)
    return Measured(replace(figures, top1_agreement=None, top_k=None, topk_agreement=None))


def _per_channel(error: Spread, noise: Spread, truth: Spread, elements: int, rules: Rules) -> float:
    """Largest error of a slice over its own scale, over all slices of all axes."""
    worst = 0.0
    for (_, errors), (_, noises), (_, truths) in zip(error.slices, noise.slices, truth.slices, strict=True):
        each = elements // truths.numel()
        scale = effective_scale(truths, noises, rules.noise_factor, rules.algebra_tolerance, each)
        worst = max(worst, float(torch.where(errors == 0, torch.zeros_like(errors), errors / scale).max()))
    return worst


def _leaf(flat: Flat | None, name: str, like: torch.Tensor) -> torch.Tensor | None:
    leaf = None if flat is None else flat.leaves.get(name)
    return double(leaf) if isinstance(leaf, torch.Tensor) and leaf.shape == like.shape else None


def _failed(figures: OutputComparison, sentence: str) -> Measured:
    return Measured(replace(figures, failures=(*figures.failures, sentence)))


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # a type of the user's whose equality raises is not equal to anything
        return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
