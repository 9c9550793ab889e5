"""The values of a verification: `OutputComparison`, `CaseResult` and `Comparison`. Plain data, no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Location = Literal["interior", "border", "no spatial dims"]
Status = Literal["passed", "failed", "skipped", "no evidence"]

ULP_QUANTILES = (0.5, 0.9, 0.99, 0.999)
ULP_BOUNDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 256.0, 1024.0, math.inf)


@dataclass(frozen=True)
class OutputComparison:
    """One output tensor of one input case, measured and judged.

    Figures compare the candidate with the float64 truth unless they say otherwise; non-finite elements that both
    models share are left out of them.

    Attributes:
        name: where the output stands in what the model returns: `output`, `output[0]`, `output['logits']`.
        shape, dtype: of the original's output in the deployment dtype.
        elements: finite elements that were compared.
        max_abs, mean_abs, rms: of the error, in the output's own unit.
        max_rel: largest absolute error over the largest absolute value of the tensor.
        numeric_error: RMS of the error over RMS of the truth.
        original_noise: the same figure for the original in the deployment dtype.
        numeric_ratio: the error over its bar, at the place where it comes closest; at most 1 passes. None if not asked.
        algebra_per_tensor: largest float64 difference over the largest absolute value of the tensor. None if not asked.
        algebra_per_channel: the same with each channel's own largest value (never taken below the channel's rounding
            noise, so that a channel which cancels to nearly zero does not explode), worst channel.
        algebra_ratio: as `numeric_ratio`, for the float64 difference.
        cosine: cosine of the angle between candidate and truth (1.0 where both are zero).
        snr_db: 20 log10(RMS of the truth / RMS of the error); infinite where they are equal.
        max_ulp: largest error in units in the last place of the truth's value in the output's dtype.
        ulp_quantiles: the errors in that unit that `ULP_QUANTILES` of the elements do not exceed (where there are more
            than half a million elements, of an even subset of them).
        original_ulp_quantiles: the same of the original.
        ulp_histogram: for each of `ULP_BOUNDS`, how many elements have an error of at most that many units and more
            than the bound before it.
        top1_agreement: share of rows with the original's arg-max, where the output is [N, C] with C >= 2.
        top_k: how many of a row's largest values `topk_agreement` is about: 5, or C - 1 if that is less.
        topk_agreement: mean share of the original's `top_k` largest values of a row that are among the candidate's, in
            any order, where the output is [N, C] with C >= 3.
        tolerance: smallest t with |candidate - original| <= t + t * |original| everywhere, both as deployed.
        worst_index: index of the element with the largest absolute error.
        worst_location: whether that lies at a border of the dims behind batch and channel.
        untold: why nothing can be told, though the float64 difference is above its bar; empty if something can.
        failures: sentences; empty if the output passed.
        notes: sentences that are not failures.
    """

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    elements: int = 0
    max_abs: float = 0.0
    mean_abs: float = 0.0
    rms: float = 0.0
    max_rel: float = 0.0
    numeric_error: float = 0.0
    original_noise: float = 0.0
    numeric_ratio: float | None = None
    algebra_per_tensor: float | None = None
    algebra_per_channel: float | None = None
    algebra_ratio: float | None = None
    cosine: float = 1.0
    snr_db: float = math.inf
    max_ulp: float = 0.0
    ulp_quantiles: tuple[float, ...] = ()
    original_ulp_quantiles: tuple[float, ...] = ()
    ulp_histogram: tuple[int, ...] = ()
    top1_agreement: float | None = None
    top_k: int | None = None
    topk_agreement: float | None = None
    tolerance: float = 0.0
    worst_index: tuple[int, ...] = ()
    worst_location: Location = "no spatial dims"
    untold: str = ""
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against this output."""
        return not self.failures

    @property
    def algebra_error(self) -> float | None:
        """The larger of the two scaled float64 differences; None if the algebra was not asked."""
        if self.algebra_per_tensor is None or self.algebra_per_channel is None:
            return None
        return max(self.algebra_per_tensor, self.algebra_per_channel)

    @property
    def worst_ratio(self) -> float:
        """The larger of the two ratios of error to bar."""
        return max(self.numeric_ratio or 0.0, self.algebra_ratio or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """The output as plain JSON types."""
        extra = {"passed": self.passed, "algebra_error": self.algebra_error}
        return _plain({**asdict(self), **extra})  # type: ignore[no-any-return]


@dataclass(frozen=True)
class CaseResult:
    """One input case and its verdict.

    Attributes:
        name: what the inputs are (`example`, `random normal`, ...).
        seed: of the generator that drew the inputs; None where nothing was drawn.
        shapes: of the input tensors, in order.
        status: `skipped` if the original itself cannot run the case, the candidate refuses it with an
            `OtherInputError`, or the budget is spent (the notes say which);
            `no evidence` if both models gave the same non-finite values, or nothing could be told from the noise.
        outputs: one per output.
        failures, notes: sentences.
        cost: what the case cost, in float64 forward passes of the original on the example inputs.
    """

    name: str
    seed: int | None
    shapes: tuple[tuple[int, ...], ...]
    status: Status
    outputs: tuple[OutputComparison, ...] = ()
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cost: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the case (a skipped case says nothing either way)."""
        return not self.failures

    @property
    def is_untold(self) -> bool:
        """Whether of an output of it nothing can be told, since roundings alone explain what it differs by."""
        return any(output.untold for output in self.outputs)

    @property
    def only_noisy(self) -> bool:
        """Whether nothing speaks against the case but too much rounding noise."""
        return len(self.failures) == sum((output.numeric_ratio or 0.0) > 1.0 for output in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """The case as plain JSON types."""
        plain = {**asdict(self), "passed": self.passed, "outputs": [output.to_dict() for output in self.outputs]}
        return _plain(plain)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Parting:
    """Where two models part: the first tensor of the one that the other one does not compute.

    Attributes:
        place: qualified name of the original's module that computes that tensor; empty for the model itself.
        operation: what computes it.
        shape: of that tensor.
        after: the last module of the original that computes a tensor it is made from and that both have; empty if there
            is none.
    """

    place: str
    operation: str
    shape: tuple[int, ...]
    after: str = ""

    def __str__(self) -> str:
        behind = f", behind {self.after}, which both compute" if self.after and self.after != self.place else ""
        where = f"{self.operation} in {self.place}" if self.place else f"{self.operation} in the model itself"
        return f"the first tensor that only the original computes is that of {where}, {list(self.shape)}{behind}"

    def to_dict(self) -> dict[str, Any]:
        """The parting as plain JSON types."""
        return {**asdict(self), "shape": list(self.shape), "sentence": str(self)}


@dataclass(frozen=True)
class Comparison:
    """Whether a candidate computes what the original computes, and how that was found out.

    Attributes:
        passed: no failures.
        algebra_error: largest scaled float64 difference over outputs and cases; None if the candidate cannot be run
            in float64.
        algebra_tolerance: what `algebra_error` is held against. A candidate whose weights are stored in a narrower
            dtype is allowed what one rounding of its changed weights explains, besides (see `judge.py`).
        numeric_error: largest RMS error of the candidate in the deployment dtype against the float64 truth, over RMS
            of the truth, over outputs and cases.
        original_noise: the same figure for the original.
        noise_factor: multiple of the original's noise that the candidate may show.
        dtype: the deployment dtype.
        outputs: for each output, the case in which it came closest to its bar.
        cases: every input case.
        failures, notes: sentences.
        misrounded: sentences on weights that are not the float64 candidate's rounded; they are among the failures.
        level, seed: as given.
        cost: in float64 forward passes of the original on the example inputs; what looking for the parting costs is
            not counted, since only a failed comparison has one.
        parting: where the two models part on the first input case that failed; None if they agree, if it was not
            asked, or if that is not known: the candidate is no module, or has all tensors in float64.
    """

    passed: bool
    algebra_error: float | None
    algebra_tolerance: float
    numeric_error: float
    original_noise: float
    noise_factor: float
    dtype: str
    outputs: tuple[OutputComparison, ...]
    cases: tuple[CaseResult, ...]
    failures: tuple[str, ...]
    notes: tuple[str, ...] = ()
    misrounded: tuple[str, ...] = ()
    level: str = "standard"
    seed: int = 0
    cost: float = 0.0
    parting: Parting | None = None

    @property
    def lacks_evidence(self) -> bool:
        """Whether it fails for no difference that was found, but since an output could not be compared, or its noise
        was too large to tell."""
        return not self.passed and not self.misrounded and not any(case.failures for case in self.cases)

    @property
    def is_untold(self) -> bool:
        """Whether it fails since roundings alone explain what was found, so that nothing can be told."""
        return self.lacks_evidence and any(case.is_untold for case in self.cases)

    @property
    def only_noisy(self) -> bool:
        """Whether nothing speaks against the candidate but too much rounding noise."""
        return not self.misrounded and all(case.only_noisy for case in self.cases)

    @property
    def agreement(self) -> str:
        """The verdict as a predicate."""
        if self.passed:
            return "agrees with"
        return "was not shown to agree with" if self.lacks_evidence else "does not agree with"

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON types; infinities and NaN as the strings `Infinity`, `-Infinity`, `NaN`."""
        plain = {
            **{key: value for key, value in vars(self).items() if key not in ("outputs", "cases", "parting")},
            "parting": self.parting and self.parting.to_dict(),
            "outputs": [output.to_dict() for output in self.outputs],
            "cases": [case.to_dict() for case in self.cases],
            "summary": self.summary(),
        }
        return _plain(plain)  # type: ignore[no-any-return]

    def summary(self) -> str:
        """The verdict with its figures, as one sentence."""
        ran = sum(case.status != "skipped" for case in self.cases)
        figures = (
            f"{self.dtype} error {self.numeric_error:.2g} beside the original's own {self.original_noise:.2g}, "
            + ("not run in float64" if self.algebra_error is None else f"float64 error {self.algebra_error:.2g}")
        )
        if self.passed:
            return f"equivalent on {ran} input {'case' if ran == 1 else 'cases'}: {figures}."
        more = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        verdict = "NOT shown to be equivalent" if self.lacks_evidence else "NOT equivalent"
        return f"{verdict}: {self.failures[0].rstrip('.')}{more}; {figures}."


def _plain(value: Any) -> Any:
    """`value` in JSON types; JSON has no literal for non-finite numbers, so they become strings."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
