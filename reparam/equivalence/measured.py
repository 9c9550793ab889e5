"""The values between running two models and judging them: `Rules`, `Runs`, `Measured`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reparam.equivalence.comparison import OutputComparison
from reparam.equivalence.judge import Spread
from reparam.equivalence.outputs import Flat

ALGEBRA_TOLERANCE = 1e-10
NOISE_FACTOR = 2.0


@dataclass(frozen=True)
class Rules:
    """How strict a comparison is.

    Attributes:
        noise_factor: multiple of the original's noise that is allowed.
        algebra_tolerance: scaled float64 difference that is allowed.
        dtype: the deployment dtype.
        check_dtypes, check_structure: whether the candidate must return the original's dtypes and containers.
        runtime: the candidate is no module but runs elsewhere, where kernels sum in another order than torch's.
    """

    noise_factor: float = NOISE_FACTOR
    algebra_tolerance: float = ALGEBRA_TOLERANCE
    dtype: torch.dtype = torch.float32
    check_dtypes: bool = True
    check_structure: bool = True
    runtime: bool = False


@dataclass(frozen=True)
class Runs:
    """What the models returned on one input; flattened.

    Attributes:
        truth: the original in float64; what it returns in the deployment dtype if it does not run in float64.
        original, candidate: in the deployment dtype.
        candidate64: the candidate in float64; None if the algebra is not asked.
        rounded64: the candidate in float64 with its changed weights disturbed by a rounding, to see what that costs;
            None if none were changed.
        algebra_is_exact: whether `candidate64` has unrounded weights, so that the algebra needs no allowance for that.
        given: how many different values the input has; None if that is not known.
        numeric: whether `candidate` is the deployed one; else it is `candidate64`, and only the algebra is asked.
        judged64: whether the float64 difference is held against a bar; else it is only measured.
        single: the original in float32, where half precision is too noisy to tell from it how noisy float64 is.
        noise: another run of the original in `noise_dtype`, where `original` shows no noise: the deployment dtype is
            float64, or the truth is not known better than by `original`.
    """

    truth: Flat
    original: Flat
    candidate: Flat
    candidate64: Flat | None = None
    rounded64: Flat | None = None
    given: int | None = None
    noise: Flat | None = None
    noise_dtype: torch.dtype | None = None
    algebra_is_exact: bool = False
    numeric: bool = True
    judged64: bool = True
    single: Flat | None = None


@dataclass(frozen=True)
class Measured:
    """One output, measured: its figures, and the spreads that a verdict needs (None: that question is not asked).

    Attributes:
        unit: of the spreads, in the output's own.
        amplified: RMS noise over RMS, in roundoffs of the dtype that showed it. Where that noise is at its ceiling
            (100% are 128 roundoffs of bfloat16), a run in float32 tells instead, if there was one.
        at_most: the most that other roundings were seen to change the original's answer by in float64, believed or not;
            None if that was not looked at.
        redrawn: noise of slices of few elements in further runs of the original (`few.py`); None if there were none.
    """

    figures: OutputComparison
    truth: Spread | None = None
    numeric: tuple[Spread, Spread] | None = None
    algebra: tuple[Spread, Spread] | None = None
    samples: int = 1
    dtype: torch.dtype = torch.float32
    shared_nonfinite: bool = False
    unit: float = 1.0
    amplified: float = 0.0
    at_most: Spread | None = None
    redrawn: Spread | None = None
