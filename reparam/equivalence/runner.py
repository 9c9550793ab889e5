"""`verify`: runs original and candidate on every case of a level, and gathers the verdict.

What a forward pass costs is counted in float64 forward passes of the original on the example inputs: one pass of either
model costs the number of input elements over the example's, half of that in a narrower dtype (half the bytes, twice the
lanes; a CPU that only emulates half precision is slower than that). The candidate counts like the original, though a
fused one is cheaper. `standard` stays within `BUDGET` of them: a case that no longer fits is asked one question only,
which needs fewer passes, or left out with a note. That is the algebra where the candidate's weights before rounding are
at hand: borders and constants are there for faults of the algebra, and what rounding the weights costs on such inputs,
coherent as they are, would have to be measured too. Else it is the numeric question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import nn

from reparam.equivalence.cases import Case, Slot, plan
from reparam.equivalence.comparison import CaseResult, Comparison, Parting
from reparam.equivalence.gather import Ran, gather
from reparam.equivalence.measure import measure
from reparam.equivalence.measured import ALGEBRA_TOLERANCE, NOISE_FACTOR, Rules, Runs
from reparam.equivalence.metrics import distinct_values
from reparam.equivalence.outputs import Flat, identical
from reparam.equivalence.parting import parting
from reparam.equivalence.precision import (
    PrivateCopy,
    deployment_dtype,
    disturbed,
    first_line,
    rounding_failures,
    run,
)
from reparam.errors import InputError, OtherInputError
from reparam.inputs import ExampleInputs, Inputs

Model: TypeAlias = "Callable[..., Any] | PrivateCopy"

BUDGET = 10.0
_NARROW_COST = 0.5


def verify(
    original: nn.Module,
    candidate: nn.Module | Callable[..., Any],
    example_inputs: ExampleInputs,
    *,
    level: str = "standard",
    seed: int = 0,
    noise_factor: float = NOISE_FACTOR,
    algebra_tolerance: float = ALGEBRA_TOLERANCE,
    candidate_float64: nn.Module | None = None,
    vary_shapes: bool = True,
    check_dtypes: bool = True,
    check_structure: bool = True,
    only: frozenset[str] | None = None,
    find_parting: bool = True,
) -> Comparison:
    """Whether `candidate` computes what `original` computes, judged against the original's own rounding noise.

    Two questions, kept apart. *Algebra*: both run in float64 and agree to `algebra_tolerance`, scaled per tensor and
    per channel. *Numeric*: in the deployment dtype, the candidate's error against the float64 truth is at most
    `noise_factor` times the original's own, by the rule in `judge.py`. A candidate that is no `nn.Module`
    (a runtime session) is asked the second question only. The caller's modules are never changed or run.

    Args:
        original: the reference; run in eval mode.
        candidate: a module, or a callable with the same signature.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        level: `quick` runs the example inputs alone; `standard` also other batch and image sizes, random inputs,
            borders and constants, within ten forward passes of the original in float64; `thorough` more of each,
            without a bound.
        seed: of the drawn inputs and of the models' own random numbers.
        noise_factor: multiple of the original's noise that the candidate may show.
        algebra_tolerance: scaled float64 difference that is allowed.
        candidate_float64: the candidate before its weights were rounded to the deployment dtype. With it the algebra
            is held to `algebra_tolerance` alone, and the candidate's weights must be its weights rounded once.
            Without it a candidate in a narrower dtype is also allowed what rounding its changed weights explains.
        vary_shapes: False keeps to the example's shapes, for a candidate that was made for these alone.
        only: names of the cases to run besides the example; None for all of the level.
        check_dtypes, check_structure: whether the candidate must return the original's dtypes and containers.
        find_parting: whether, if they do not agree and both are modules, the first tensor is looked for that only the
            original computes (`Comparison.parting`); for two float64 passes that the ten do not count.

    Raises:
        InputError: the level does not exist, the original cannot run on the example inputs, a module cannot be
            copied, or the original draws random numbers from elsewhere than torch, so that no seed repeats its answers.
    """
    inputs = Inputs.of(example_inputs)
    dtype = deployment_dtype(original, inputs)
    runtime = not isinstance(candidate, nn.Module)
    rules = Rules(noise_factor, algebra_tolerance, dtype, check_dtypes, check_structure, runtime)
    session = _session(original, candidate, candidate_float64, rules, seed)
    misrounded = () if candidate_float64 is None else rounding_failures(candidate, candidate_float64)
    ran, given = [], {}
    for slot in plan(inputs, level, seed, vary_shapes):
        given.update({case.name: case.inputs for case in slot})
        if only is not None and not any(case.seed is None or case.name in only for case in slot):
            continue
        ran.append(_run_slot(session, slot, BUDGET if level == "standard" else float("inf")))
    comparison = gather(
        ran,
        rules,
        asked_algebra=session.candidate64 is not None and isinstance(candidate, nn.Module),
        misrounded=misrounded,
        notes=tuple(session.notes),
        level=level,
        seed=seed,
    )
    if comparison.passed or runtime or not find_parting:
        return comparison
    exact = candidate if candidate_float64 is None else candidate_float64
    failed = next((case.name for case in comparison.cases if case.failures), "")
    return replace(comparison, parting=_parting(original, exact, given.get(failed, inputs), seed))


def _parting(original: nn.Module, candidate: Any, inputs: Inputs, seed: int) -> Parting | None:
    """Where two models part; None if that cannot be told, for one that does not run in float64."""
    try:
        return parting(original, candidate, inputs, seed)
    except Exception:
        return None


@dataclass
class _Session:
    """Private copies of the models, and what has been spent. `candidate64` is None once the algebra cannot be asked."""

    rules: Rules
    seed: int
    original64: PrivateCopy
    original: PrivateCopy | None
    noise: PrivateCopy | None
    candidate: Model
    candidate64: Model | None
    rounded64: Model | None
    exact: bool = False
    spent: float = 0.0
    notes: list[str] = field(default_factory=list)


class Asked(Enum):
    """Which of the two questions a case is asked."""

    BOTH = "both"
    ALGEBRA = "algebra"
    NUMERIC = "numeric"


class _RefusedError(Exception):
    """A case that cannot be compared: the original cannot run it, or the candidate says that it is not for it."""


def _session(
    original: nn.Module, candidate: Callable[..., Any], candidate_float64: nn.Module | None, rules: Rules, seed: int
) -> _Session:
    wide = rules.dtype == torch.float64
    module = candidate if isinstance(candidate, nn.Module) else None
    session = _Session(
        rules,
        seed,
        original64=PrivateCopy(original, "original", torch.float64),
        original=PrivateCopy(original, "original"),
        noise=PrivateCopy(original, "original", torch.float32) if wide else None,
        candidate=candidate if module is None else PrivateCopy(module, "candidate"),
        candidate64=None,
        rounded64=None,
    )
    if wide:
        session.candidate64 = session.candidate
    elif candidate_float64 is not None:
        session.candidate64 = PrivateCopy(candidate_float64, "candidate", torch.float64)
        session.exact = True
        # With both at hand, what rounding costs is measured and not estimated.
        session.rounded64 = (
            disturbed(candidate_float64, original, rules.dtype, seed)
            if module is None
            else PrivateCopy(module, "candidate", torch.float64)
        )
    elif module is not None:
        session.candidate64 = PrivateCopy(module, "candidate", torch.float64)
        session.rounded64 = disturbed(module, original, rules.dtype, seed)
    return session


def _run_slot(session: _Session, slot: Slot, budget: float) -> Ran:
    """The first alternative that the original can run; the reasons against the others become notes."""
    notes: list[str] = []
    for case in slot:
        asked = _affordable(session, case, budget)
        if asked is None:
            notes.append(f"{case.name}: left out, the budget of {budget:g} forward passes would be exceeded")
            continue
        before = session.spent
        try:
            ran = _run_case(session, case, asked)
        except _RefusedError as reason:
            if case.seed is None:
                raise InputError(
                    f"the original cannot run on the example inputs: {reason}; check their shapes and dtypes"
                ) from reason
            notes.append(f"{case.name}: {reason}")
            continue
        if asked is not Asked.BOTH and session.candidate64 is not None:
            only = "float64" if asked is Asked.ALGEBRA else "the deployment dtype"
            notes.append(f"{case.name}: run in {only} only, to stay within the budget")
        result = replace(ran.result, notes=(*notes, *ran.result.notes), cost=session.spent - before)
        return replace(ran, result=result)
    last = slot[-1]
    return Ran(CaseResult(last.name, last.seed, last.shapes, "skipped", notes=tuple(notes)))


def _affordable(session: _Session, case: Case, budget: float) -> Asked | None:
    """The most that can be asked of a case; None if nothing can. Of the example everything is."""
    if case.seed is None or session.spent + _price(session, case, Asked.BOTH) <= budget:
        return Asked.BOTH
    fewer = Asked.ALGEBRA if session.exact and session.candidate64 is not None else Asked.NUMERIC
    return fewer if session.spent + _price(session, case, fewer) <= budget else None


def _price(session: _Session, case: Case, asked: Asked) -> float:
    """What a case costs."""
    if session.rules.dtype == torch.float64:
        return case.relative_size * (2.0 + _NARROW_COST)
    exact, rounded = session.candidate64 is not None, session.rounded64 is not None
    wide, narrow = {
        Asked.BOTH: (1 + exact + rounded, 2),
        Asked.NUMERIC: (1, 2),
        Asked.ALGEBRA: (1 + exact, 1),
    }[asked]
    return case.relative_size * (wide + narrow * _NARROW_COST)


def _run_case(session: _Session, case: Case, asked: Asked) -> Ran:
    """Runs one case.

    Raises:
        _RefusedError: the original cannot run it, or the candidate refuses it.
    """
    truth, original, noise = _run_original(session, case)
    result = CaseResult(case.name, case.seed, case.shapes, "failed")
    candidate64: Flat | None = None
    wide_only = asked is Asked.ALGEBRA and session.rules.dtype != torch.float64
    try:
        if wide_only:
            assert session.candidate64 is not None
            candidate = candidate64 = _call(session, session.candidate64, case, torch.float64)
        else:
            candidate = _call(session, session.candidate, case, None)
    except OtherInputError as error:
        if case.seed is not None:
            raise _RefusedError(f"the candidate refuses it ({str(error).rstrip('.')})") from error
        return Ran(replace(result, failures=(f"the candidate refuses the example ({error})",)), truth)
    except Exception as error:
        sentence = f"the candidate cannot run it, the original can ({first_line(error)})"
        return Ran(replace(result, failures=(sentence,)), truth)
    rounded64: Flat | None = None
    if session.rules.dtype == torch.float64 and session.original is None:
        candidate64 = candidate
    elif asked is Asked.BOTH and session.candidate64 is not None:
        candidate64, rounded64 = _run_float64(session, case)
    runs = Runs(
        truth,
        truth if original is None else original,
        candidate,
        candidate64,
        rounded64,
        distinct_values(case.inputs),
        noise,
        None if noise is None else torch.float32,
        session.exact,
        not wide_only,
    )
    measured, failures = measure(runs, session.rules)
    return Ran(replace(result, failures=failures), truth, measured)


def _run_original(session: _Session, case: Case) -> tuple[Flat, Flat | None, Flat | None]:
    """Truth, deployment run (None if it is the truth), and the run that shows the noise of a float64 model."""
    drawn: list[str] | None = [] if case.seed is None else None
    try:
        original = None if session.original is None else _call(session, session.original, case, None, drawn)
        if original is not None and drawn:
            _note_chance(session, case, original, drawn)
        truth = _call(session, session.original64, case, torch.float64)
        if original is not None and session.rules.dtype == torch.float64 and identical(original, truth):
            original = session.original = None  # there is no cast in it that the truth leaves out
    except InputError:
        raise
    except Exception as error:
        raise _RefusedError(f"the original itself cannot run it ({first_line(error)})") from error
    noise = None
    if session.noise is not None:
        try:
            noise = _call(session, session.noise, case, torch.float32)
        except Exception as error:
            session.notes.append(f"no float32 run to estimate the rounding noise from ({first_line(error)})")
            session.noise = None
    return truth, original, noise


def _note_chance(session: _Session, case: Case, answer: Flat, drawn: list[str]) -> None:
    """Both models get the same random numbers of torch; from elsewhere they would get different ones.

    Raises:
        InputError: the original draws from elsewhere, and answers otherwise when it is run again.
    """
    assert session.original is not None
    others = sorted({name for name in drawn if not name.startswith("torch")})
    if others and not identical(answer, run(session.original, case.inputs, seed=session.seed)):
        raise InputError(
            f"the original draws random numbers in eval mode (from {', '.join(others)}) and answers the same input "
            "otherwise each time, so that nothing can be compared with it; put in place of what draws them what it is "
            "at inference, and compare with that"
        )
    session.notes.append(
        "the original draws random numbers in eval mode; both models were given the same ones, and with others they "
        "were not compared"
    )


def _run_float64(session: _Session, case: Case) -> tuple[Flat | None, Flat | None]:
    """The candidate in float64, and with its changed weights disturbed; if that cannot run, the algebra is dropped."""
    assert session.candidate64 is not None
    try:
        exact = _call(session, session.candidate64, case, torch.float64)
        rounded = None
        if session.rounded64 is not None:
            rounded = _call(session, session.rounded64, case, torch.float64)
    except Exception as error:
        session.notes.append(
            f"the candidate does not run in float64, so the algebra is not asked ({first_line(error)})"
        )
        session.candidate64 = session.rounded64 = None
        return None, None
    return exact, rounded


def _call(
    session: _Session, model: Model, case: Case, dtype: torch.dtype | None, drawn: list[str] | None = None
) -> Flat:
    wide = session.rules.dtype == torch.float64 if dtype is None else dtype == torch.float64
    session.spent += case.relative_size * (1.0 if wide else _NARROW_COST)
    default = session.rules.dtype != dtype
    return run(model, case.inputs, seed=session.seed, dtype=dtype, drawn=drawn, default=default)
