"""From measured cases to the `Comparison`: judges each output with the noise that all cases showed for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from reparam.equivalence.cases import Case
from reparam.equivalence.comparison import CaseResult, Comparison, OutputComparison
from reparam.equivalence.measure import verdict
from reparam.equivalence.measured import Measured, Rules
from reparam.equivalence.outputs import Flat

# An original whose own noise is a tenth of its output can vouch for nothing.
HOPELESS_NOISE = 0.1


@dataclass(frozen=True)
class Ran:
    """A case that was run (or skipped): its result so far, what the truth was, the measurements, and what was run."""

    result: CaseResult
    truth: Flat | None = None
    measured: tuple[Measured, ...] = ()
    case: Case | None = None


def gather(
    ran: Sequence[Ran],
    rules: Rules,
    *,
    asked_algebra: bool,
    misrounded: tuple[str, ...],
    notes: tuple[str, ...],
    level: str,
    seed: int,
    cost: float,
    typical: dict[str, float] | None = None,
) -> Comparison:
    """Judges the cases and sums up; `typical` as `typical_noise` has it, of these cases if it is not given."""
    typical = typical_noise(ran) if typical is None else typical
    cases = tuple(_judged(one, rules, typical) for one in ran)
    outputs = _nearest_to_its_bar(cases)
    every = [output for case in cases for output in case.outputs]
    failures = misrounded + tuple(f"{case.name}: {sentence}" for case in cases for sentence in case.failures)
    run = [case for case in cases if case.status != "skipped"]
    if not failures and not any(map(_has_elements, ran)):
        failures = (
            "the comparison is empty: the original returns no tensor with any element on any input; "
            "give it an example for which it does",
        )
    elif not failures:
        failures = _lack_of_evidence(run, every) or _held_against_nothing(ran)
    errors = [output.algebra_error for output in every if output.algebra_error is not None]
    return Comparison(
        passed=not failures,
        algebra_error=max(errors) if errors and asked_algebra else None,
        algebra_tolerance=rules.algebra_tolerance,
        numeric_error=max((output.numeric_error for output in every), default=math.inf),
        original_noise=max((output.original_noise for output in every), default=0.0),
        noise_factor=rules.noise_factor,
        dtype=str(rules.dtype).removeprefix("torch."),
        outputs=outputs,
        cases=cases,
        failures=failures,
        notes=(*notes, *_constant_outputs(ran)),
        misrounded=misrounded,
        level=level,
        seed=seed,
        cost=cost,
    )


def typical_noise(ran: Iterable[Ran]) -> dict[str, float]:
    """Median over the cases of the noise each output is allowed, over its RMS: one lucky case does not set its own bar.

    Where there are cases in which the cost of rounding the candidate's weights was measured, only those count.
    """
    seen: dict[tuple[str, bool], list[float]] = {}
    for one in ran:
        for measured in one.measured:
            if measured.numeric is not None and measured.truth is not None and measured.truth.rms > 0.0:
                key = (measured.figures.name, measured.algebra is not None)
                seen.setdefault(key, []).append(measured.numeric[1].rms / measured.truth.rms)
    names = {name for name, _ in seen}
    return {name: statistics.median_low(seen.get((name, True)) or seen[name, False]) for name in names}


def _judged(ran: Ran, rules: Rules, typical: dict[str, float]) -> CaseResult:
    if ran.result.status == "skipped":
        return ran.result
    outputs = tuple(verdict(one, rules, typical.get(one.figures.name, 0.0)) for one in ran.measured)
    failures = ran.result.failures + tuple(sentence for output in outputs for sentence in output.failures)
    notes = ran.result.notes + tuple(sentence for output in outputs for sentence in output.notes)
    hopeless = [output.name for output in outputs if output.numeric_ratio is not None and _hopeless(output)]
    notes += tuple(f"{name}: the original's own rounding noise is too large to tell anything from" for name in hopeless)
    untold = tuple(output.untold for output in outputs if output.untold)
    notes += untold
    if ran.truth is not None and not _has_elements(ran):
        notes += ("the original returns no tensor with any element, so that only shapes were compared",)
    without = (
        any(one.shared_nonfinite for one in ran.measured)
        or bool(hopeless)
        or bool(untold)
        or not any(o.elements for o in outputs)
    )
    status = "failed" if failures else "no evidence" if without else "passed"
    return replace(ran.result, status=status, outputs=outputs, failures=failures, notes=notes)  # type: ignore[arg-type]


def _has_elements(ran: Ran) -> bool:
    """Whether the original returned any element: a detector that finds nothing returns none."""
    return ran.truth is not None and any(tensor.numel() for tensor in ran.truth.tensors().values())


def _held_against_nothing(ran: Sequence[Ran]) -> tuple[str, ...]:
    """Outputs whose errors had no bar on any input."""
    measured = [one for each in ran for one in each.measured if one.truth is not None]
    judged = {one.figures.name for one in measured if one.numeric is not None or one.algebra is not None}
    names = dict.fromkeys(one.figures.name for one in measured)
    return tuple(f"{name}: its error was held against no bar on any input" for name in names if name not in judged)


def _hopeless(output: OutputComparison) -> bool:
    return output.algebra_ratio is None and not output.original_noise <= HOPELESS_NOISE


def _lack_of_evidence(run: Sequence[CaseResult], outputs: Sequence[OutputComparison]) -> tuple[str, ...]:
    """A comparison that could not have failed has not passed."""
    if not any(output.elements for output in outputs):
        overflow = any("the original itself overflows" in note for case in run for note in case.notes)
        why = " (the original itself overflows: give it smaller inputs, or a wider dtype)" if overflow else ""
        return (f"nothing finite was compared, so nothing is known{why}",)
    untold = [f"{case.name}: {output.untold}" for case in run for output in case.outputs if output.untold]
    if untold:
        return tuple(untold)
    first = next(case for case in run if any(output.elements for output in case.outputs))
    drowned = [output.name for output in first.outputs if output.numeric_ratio is not None and _hopeless(output)]
    if drowned:
        return (
            f"{drowned[0]}: the original's own rounding noise on {first.name} is so large that nothing can be told",
        )
    by_name: dict[str, int] = {}
    for output in outputs:
        if math.prod(output.shape):  # an output that is always empty has been compared: its shape is
            by_name[output.name] = by_name.get(output.name, 0) + output.elements
    return tuple(f"{name}: no finite element was compared on any input" for name, count in by_name.items() if not count)


def _nearest_to_its_bar(cases: Iterable[CaseResult]) -> tuple[OutputComparison, ...]:
    worst: dict[str, OutputComparison] = {}
    for case in cases:
        for output in case.outputs:
            best = worst.get(output.name)
            key = (bool(output.failures), output.worst_ratio, output.elements)
            if best is None or key > (bool(best.failures), best.worst_ratio, best.elements):
                worst[output.name] = output
    return tuple(worst.values())


def _constant_outputs(ran: Sequence[Ran]) -> tuple[str, ...]:
    """Notes on outputs of the original that are the same whatever goes in: comparing them proves little."""
    ranges: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for one in ran:
        for name, tensor in ({} if one.truth is None else one.truth.tensors()).items():
            if tensor.dim() >= 2 and tensor.numel():
                # Per channel, so that outputs of different batch and image sizes can be compared.
                others = [d for d in range(tensor.dim()) if d != 1]
                ranges.setdefault(name, []).append((tensor.amin(others).cpu(), tensor.amax(others).cpu()))
    notes = []
    for name, pairs in ranges.items():
        first = pairs[0][0]
        if all(
            low.shape == first.shape and torch.equal(low, first) and torch.equal(high, first) for low, high in pairs
        ):
            notes.append(f"{name}: the original returns the same constants for every input that was tried")
    return tuple(notes)
