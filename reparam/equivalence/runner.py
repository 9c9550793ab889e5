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
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from reparam.buffers import Kept
from reparam.compiled import as_deployed, eager, is_compiled, nothing_compiled
from reparam.data import LIMIT, Data, read
from reparam.equivalence.cases import Case, Slot, plan
from reparam.equivalence.comparison import CaseResult, Comparison, Parting
from reparam.equivalence.conditioning import looked_at_again
from reparam.equivalence.few import with_few_redrawn
from reparam.equivalence.gather import Ran, gather, typical_noise
from reparam.equivalence.measure import measure
from reparam.equivalence.measured import ALGEBRA_TOLERANCE, NOISE_FACTOR, Rules, Runs
from reparam.equivalence.metrics import distinct_values, rms
from reparam.equivalence.outputs import Flat, identical
from reparam.equivalence.parting import parting
from reparam.equivalence.precision import PrivateCopy, deployment_dtype, first_line, rounding_failures, run
from reparam.equivalence.session import Asked, Elsewhere, Noises, Session, session_of
from reparam.errors import InputError, OtherInputError
from reparam.inputs import ExampleInputs, Inputs, unusable

BUDGET = 10.0
_Model = TypeVar("_Model")
SATURATED = 0.05
"""Relative noise from which on it is no longer proportional to the rounding that it comes from."""


@torch.inference_mode(False)  # its tensors do not tell what was written to
@nothing_compiled()
def verify(
    original: nn.Module | Elsewhere,
    candidate: nn.Module | Elsewhere | Callable[..., Any],
    example_inputs: ExampleInputs,
    *,
    level: str = "standard",
    seed: int = 0,
    noise_factor: float = NOISE_FACTOR,
    algebra_tolerance: float = ALGEBRA_TOLERANCE,
    candidate_float64: nn.Module | None = None,
    deployed: nn.Module | None = None,
    vary_shapes: bool | str = True,
    check_dtypes: bool = True,
    check_structure: bool = True,
    only: frozenset[str] | None = None,
    find_parting: bool = True,
    data: Data | None = None,
    data_limit: int = LIMIT,
    spent: float = 0.0,
    known: dict[Any, Noises] | None = None,
) -> Comparison:
    """Whether `candidate` computes what `original` computes, judged against the original's own rounding noise.

    Two questions, kept apart. *Algebra*: both run in float64 and agree to `algebra_tolerance`, scaled per tensor and
    per channel. *Numeric*: in the deployment dtype, the candidate's error against the float64 truth is at most
    `noise_factor` times the original's own, by the rule in `judge.py`. A candidate that is no `nn.Module`
    (a runtime session) is asked the second question only. The caller's modules are never changed, and only one that
    calls compiled code is run itself. While this works torch's default dtype may be float64, and what is compiled runs
    uncompiled, in the whole process; other threads that fuse, verify or export wait.

    Args:
        original: the reference; run in eval mode. One that runs elsewhere than in torch is an `Elsewhere`; if that
            cannot be run in float64, the algebra is not asked, and its noise is estimated (a note says so).
        candidate: a module, or a callable with the same signature. What `torch.compile` has made is run as it is
            in the deployment dtype (itself, in eval mode; its modes and buffers are put back), its inside in float64.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        level: `quick` runs the example inputs alone; `standard` also other batch and image sizes, random inputs,
            borders and constants, within ten forward passes of the original in float64; `thorough` more of each,
            without a bound. A case that fails by little is looked at again (`conditioning.py`), whatever that costs.
        seed: of the drawn inputs and of the models' own random numbers.
        noise_factor: multiple of the original's noise that the candidate may show.
        algebra_tolerance: scaled float64 difference that is allowed.
        candidate_float64: the candidate before its weights were rounded to the deployment dtype. With it the algebra
            is held to `algebra_tolerance` alone, and the candidate's weights must be its weights rounded once.
            Without it a candidate in a narrower dtype is also allowed what rounding its changed weights explains.
        deployed: the original as it is deployed, where that is in a narrower dtype than its own: its noise against the
            float64 truth of `original` is what is allowed.
        vary_shapes: False keeps to the example's shapes, for a candidate that was made for these alone; "batch" varies
            the batch alone.
        only: names of the cases to run besides the example; None for all.
        check_dtypes, check_structure: whether the candidate must return the original's dtypes and containers.
        find_parting: whether, if they do not agree and both are modules, the first tensor is looked for that only the
            original computes (`Comparison.parting`); for two float64 passes that the ten do not count.
        data: inputs of your own that are compared besides, each a case named after where it comes from: a folder of
            images, a `.npy` or `.npz` file, `package.module:function`, a function, or an iterable of batches (see
            `reparam.data.read`). They are run whatever they cost.
        data_limit: the most rows, images or batches of it.
        spent: forward passes that were spent on checking the candidate before; they count.
        known: what comparisons of other candidates with this original, on these inputs and with this seed, found out
            about its noise; it is added to.

    Raises:
        InputError: the level does not exist, the original cannot run on the example inputs or on the data, the data
            cannot be read or does not fit the example, a module cannot be copied, or calls itself from its copy, or the
            original draws random numbers from elsewhere than torch, so that no seed repeats its answers.
    """
    inputs = Inputs.of(example_inputs)
    _require_usable(original=original, candidate=candidate, deployed=deployed)
    given = candidate
    original, candidate, deployed = _looked_into(original), _looked_into(candidate), _looked_into(deployed)
    candidate_float64 = _looked_into(candidate_float64)
    if deployed is not None:
        dtype = deployment_dtype(deployed, inputs)
    else:
        dtype = original.dtype if isinstance(original, Elsewhere) else deployment_dtype(original, inputs)
    runtime = not (isinstance(original, nn.Module) and isinstance(candidate, nn.Module))
    rules = Rules(noise_factor, algebra_tolerance, dtype, check_dtypes, check_structure, runtime)
    misrounded = () if candidate_float64 is None else rounding_failures(candidate, candidate_float64)
    batches, prepared = read(data, original, inputs, limit=data_limit)
    slots = [
        slot
        for slot in plan(inputs, level, seed, vary_shapes, batches)
        if only is None or any(case.is_example or case.name in only for case in slot)
    ]

    def begun(before: float, compiled: bool) -> Session:
        session = session_of(original, candidate, candidate_float64, rules, seed)
        session.spent = before
        session.known = session.known if known is None else known
        session.notes += prepared
        if deployed is not None:
            session.original = PrivateCopy(deployed, "original")
        if compiled and isinstance(given, nn.Module):
            _run_as_deployed(session, given)
        return session

    budget = BUDGET if level == "standard" else float("inf")
    session = begun(spent, is_compiled(given))
    own = Kept(original, given, deployed, candidate_float64, but=given if is_compiled(given) else None)
    ran = _run_of_copies(session, slots, budget, own)
    if session.compiled:  # all again: both begin with the state that they have now
        session = begun(session.spent, True)
        ran = _run_slots(session, slots, budget + session.spent - spent)
    rules = session.rules

    def judged(cases: list[Ran]) -> Comparison:
        return gather(
            cases,
            rules,
            asked_algebra=session.candidate64 is not None and isinstance(candidate, (nn.Module, Elsewhere)),
            misrounded=misrounded,
            notes=tuple(session.notes),
            level=level,
            seed=seed,
            cost=session.spent,
            typical=typical,
        )

    typical = typical_noise(ran)
    comparison = judged(ran)
    if not comparison.passed and isinstance(original, nn.Module):
        for look in (partial(with_few_redrawn, session), partial(looked_at_again, session, original)):
            if not comparison.passed:
                ran = look(deployed or original, ran, comparison.cases)
                comparison = judged(ran)
    told = comparison.passed or comparison.lacks_evidence
    if told or not isinstance(original, nn.Module) or rules.runtime or not find_parting:
        return comparison
    exact = candidate if candidate_float64 is None else candidate_float64
    failed = next((one.case for one, case in zip(ran, comparison.cases, strict=True) if case.failures), None)
    tried = inputs if failed is None else failed.inputs
    return replace(comparison, parting=_parting(original, exact, tried, seed))


def _run_of_copies(session: Session, slots: list[Slot], budget: float, own: Kept) -> list[Ran]:
    """Leaves the models themselves as they were; `own` are the buffers that copies of them do not share.

    Raises:
        InputError: a copy has changed these, so that it is not what it was taken for.
    """
    try:
        ran = _run_slots(session, slots, budget)
    finally:
        changed = own.put_back()
    if changed and not session.compiled:
        raise InputError(
            "the forward of a model changes the buffers of the model itself, though a copy of it runs: a function that "
            "it keeps as an attribute is bound to it, or holds it in a closure; make that a method of its class"
        )
    return ran


def _run_slots(session: Session, slots: list[Slot], budget: float) -> list[Ran]:
    """Stops where a copy of the candidate has called what `torch.compile` has made."""
    ran: list[Ran] = []
    for slot in slots:
        ran.append(_run_slot(session, slot, budget))
        if session.compiled:
            break
    return ran


def _run_as_deployed(session: Session, candidate: nn.Module) -> None:
    """From now on the candidate itself is called, and runs as `torch.compile` has made it.

    Raises:
        InputError: that cannot be, within a mode that looks at every operation.
    """
    if modes := _get_current_dispatch_mode_stack():
        mode = type(modes[-1]).__name__.strip("_")
        raise InputError(f"within {mode} what torch.compile has made does not run; call verify outside of it")
    session.candidate = as_deployed(candidate)
    session.rules = replace(session.rules, runtime=True)
    session.notes.append("the candidate was run as torch.compile has made it, in float64 as it was before")


def _require_usable(**models: Any) -> None:
    """Refuses what cannot be compared.

    Raises:
        InputError: the original is no module, or a tensor of a model has no values, or is not dense.
    """
    for what, model in models.items():
        if what == "original" and not isinstance(model, (nn.Module, Elsewhere)):
            raise InputError(f"the original is a {type(model).__name__}; give a torch.nn.Module to compare with")
        if what == "candidate" and not callable(model):
            raise InputError(f"the candidate is a {type(model).__name__}; give a module or a function")
        if isinstance(model, nn.Module):
            wrong = unusable((*model.named_parameters(), *model.named_buffers()))
            if wrong is not None:
                raise InputError(f"the {what} cannot be compared: {wrong}")


def _looked_into(model: _Model) -> _Model:
    return cast(_Model, eager(model)) if isinstance(model, nn.Module) else model


def _parting(original: nn.Module, candidate: Any, inputs: Inputs, seed: int) -> Parting | None:
    """Where two models part; None if that cannot be told, for one that does not run in float64."""
    try:
        return parting(original, candidate, inputs, seed)
    except Exception:
        return None


class _RefusedError(Exception):
    """A case that cannot be compared: the original cannot run it, or the candidate says that it is not for it.

    Args:
        why: in a few words.
        remedy: what to do about it.
    """

    def __init__(self, why: str, remedy: str = "check their shapes and dtypes") -> None:
        super().__init__(why)
        self.remedy = remedy


def _run_slot(session: Session, slot: Slot, budget: float) -> Ran:
    """The first alternative that the original can run; the reasons against the others become notes."""
    notes: list[str] = []
    for case in slot:
        asked = session.affordable(case, budget)
        if asked is None:
            notes.append(f"{case.name}: left out, the budget of {budget:g} forward passes would be exceeded")
            continue
        before = session.spent
        try:
            ran = _run_case(session, case, asked)
        except _RefusedError as reason:
            if case.is_given:
                what = "the example inputs" if case.is_example else case.name
                raise InputError(f"the original cannot run on {what}: {reason}; {reason.remedy}") from reason
            notes.append(f"{case.name}: {reason}")
            continue
        if asked is not Asked.BOTH and session.candidate64 is not None:
            only = "float64" if asked is Asked.ALGEBRA else "the deployment dtype"
            notes.append(f"{case.name}: run in {only} only, to stay within the budget")
        result = replace(ran.result, notes=(*notes, *ran.result.notes), cost=session.spent - before)
        return replace(ran, result=result, case=case)
    last = slot[-1]
    return Ran(CaseResult(last.name, last.seed, last.shapes, "skipped", notes=tuple(notes)))


def _run_case(session: Session, case: Case, asked: Asked) -> Ran:
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
            candidate = candidate64 = session.call(session.candidate64, case, torch.float64)
        else:
            candidate = session.call(session.candidate, case, None)
    except OtherInputError as error:
        if not case.is_given:
            raise _RefusedError(f"the candidate refuses it ({str(error).rstrip('.')})") from error
        what = "the example" if case.is_example else "it"
        return Ran(replace(result, failures=(f"the candidate refuses {what} ({error})",)), truth)
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
        None if noise is None else torch.float32 if session.original64 is not None else session.rules.dtype,
        session.exact,
        not wide_only,
        session.judged64,
        None if original is None else _single(session, case, truth, original),
    )
    measured, failures = measure(runs, session.rules)
    return Ran(replace(result, failures=failures), truth, measured)


def _run_original(session: Session, case: Case) -> tuple[Flat, Flat | None, Flat | None]:
    """Truth, deployment run (None if it is the truth), and the run that shows the noise of a float64 model."""
    drawn: list[str] | None = [] if case.is_example else None
    original: Flat | None = None
    try:
        original = None if session.original is None else session.call(session.original, case, None, drawn)
        if original is not None and drawn:
            _note_chance(session, case, original, drawn)
        if session.original64 is None:
            assert original is not None
            return original, original, _noise(session, case, None)
        truth = session.call(session.original64, case, torch.float64)
        if original is not None and session.rules.dtype == torch.float64 and identical(original, truth):
            original = session.original = None  # there is no cast in it that the truth leaves out
    except InputError:
        raise
    except Exception as error:
        if original is None:
            raise _RefusedError(f"the original itself cannot run it ({first_line(error)})") from error
        raise _RefusedError(
            f"it runs them as it is, and not in float64, which is held to be the truth ({first_line(error)})",
            "usual reasons are operations without float64, and weights that .double() does not reach: those of frozen "
            "TorchScript, or of modules that are held in a plain list or a closure",
        ) from error
    return truth, original, _noise(session, case, torch.float32)


def _single(session: Session, case: Case, truth: Flat, original: Flat) -> Flat | None:
    """The original in float32, where noise in half precision has grown too large to grow in proportion any more."""
    if session.single is None or session.candidate64 is None:
        return None
    answers = original.tensors()
    pairs = [(tensor.double(), answers[name].double()) for name, tensor in truth.tensors().items() if name in answers]
    noise = [rms(o - t) / rms(t) for t, o in pairs if o.shape == t.shape and rms(t) > 0.0]
    if all(relative <= SATURATED for relative in noise):
        return None
    try:
        return session.call(session.single, case, torch.float32)
    except Exception:  # a model that insists on half precision
        session.single = None
        return None


def _noise(session: Session, case: Case, dtype: torch.dtype | None) -> Flat | None:
    """The run that shows the original's noise where its float64 and deployment runs do not."""
    if session.noise is None:
        return None
    try:
        return session.call(session.noise, case, dtype)
    except Exception as error:
        session.notes.append(f"no other run to estimate the rounding noise from ({first_line(error)})")
        session.noise = None
    return None


def _note_chance(session: Session, case: Case, answer: Flat, drawn: list[str]) -> None:
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


def _run_float64(session: Session, case: Case) -> tuple[Flat | None, Flat | None]:
    """The candidate in float64, and with its changed weights disturbed; if that cannot run, the algebra is dropped."""
    assert session.candidate64 is not None
    try:
        exact = session.call(session.candidate64, case, torch.float64)
        rounded = None
        if session.rounded64 is not None:
            rounded = session.call(session.rounded64, case, torch.float64)
    except Exception as error:
        session.notes.append(
            f"the candidate does not run in float64, so the algebra is not asked ({first_line(error)})"
        )
        session.candidate64 = session.rounded64 = None
        return None, None
    return exact, rounded
