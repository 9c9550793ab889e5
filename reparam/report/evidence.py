"""What a comparison measured, output by output and case by case, as rows of text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reparam.equivalence import CaseResult, Comparison, OutputComparison


def output_rows(output: OutputComparison) -> list[tuple[str, str]]:
    """Name and value of every figure of one output, the original's own beside where there is one."""
    rows = [
        ("elements", f"{output.elements:,} of shape {'x'.join(map(str, output.shape)) or 'a number'}, {output.dtype}"),
        ("largest, mean, RMS error", f"{_short(output.max_abs)}, {_short(output.mean_abs)}, {_short(output.rms)}"),
        ("largest error over largest value", _short(output.max_rel)),
        ("relative RMS error", f"{_short(output.numeric_error)} (the original's own {_short(output.original_noise)})"),
        ("signal to noise", "no error" if output.snr_db == math.inf else f"{output.snr_db:.1f} dB"),
        ("1 - cosine", _short(max(0.0, 1.0 - output.cosine))),
    ]
    if output.ulp_quantiles:
        own = ", ".join(map(_short, output.original_ulp_quantiles))
        quantiles = ", ".join(map(_short, output.ulp_quantiles))
        rows.append(
            ("error in ULP, 50/90/99/99.9%, most", f"{quantiles}, {_short(output.max_ulp)} (the original's own {own})")
        )
    if output.algebra_error is not None:
        rows.append(("float64 difference, scaled", _short(output.algebra_error)))
    if output.numeric_ratio is not None:
        rows.append(("error over what is allowed", _short(output.numeric_ratio)))
    if output.algebra_ratio is not None:
        rows.append(("float64 difference over what is allowed", _short(output.algebra_ratio)))
    if output.top1_agreement is not None:
        rows.append(("same top-1", f"{output.top1_agreement:.2%}"))
    if output.topk_agreement is not None:
        rows.append((f"same top-{output.top_k}", f"{output.topk_agreement:.2%}"))
    where = f"{list(output.worst_index)}, {output.worst_location}" if output.worst_index else output.worst_location
    rows += [("tolerance that would pass", _short(output.tolerance)), ("worst element", where)]
    return rows


def case_line(case: CaseResult) -> str:
    """One input case in a line: what it is, its shapes and seed, the verdict and the first reason."""
    shapes = ", ".join("x".join(map(str, shape)) or "a number" for shape in case.shapes)
    seed = "" if case.seed is None else f", seed {case.seed}"
    reasons = (*case.failures, *case.notes)
    reason = f": {reasons[0].removeprefix(f'{case.name}: ').rstrip('.')}." if reasons else ""
    return f"{case.name} ({shapes}{seed}): {case.status}{reason}"


def outputs_of(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each output its name with the case that came closest to its bar, and the figures there."""
    found = []
    for output in comparison.outputs:
        case = next((case.name for case in comparison.cases if output in case.outputs), "")
        found.append((f"{output.name} on {case}" if case else output.name, output_rows(output)))
    return found


def _short(value: float) -> str:
    return f"{value:.3g}"
