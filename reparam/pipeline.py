"""`fuse`: the one place that knows the order of the stages.

capture -> normal form -> passes -> module -> verification -> report
"""

from __future__ import annotations

import gc
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from reparam.capture.agreement import Answers
from reparam.capture.draws import failure, find_draws
from reparam.capture.exported import opened_programs
from reparam.capture.inference import Form, Said, in_inference_form
from reparam.capture.scripts import graph_of_script
from reparam.capture.trace import WAYS
from reparam.capture.trace import capture as capture_graph
from reparam.chance import refusal
from reparam.compiled import eager, entered, is_compiled, kept_until_done, nothing_compiled
from reparam.data import LIMIT, Batch, Data, read
from reparam.equivalence import difference
from reparam.equivalence import verify as verify_modules
from reparam.equivalence.session import Noises
from reparam.errors import CaptureError, InputError, NotEquivalentError, UnfitModelError
from reparam.graph.build import float64_twin, forget_float64
from reparam.graph.register import leaves
from reparam.inputs import ExampleInputs, Inputs, unusable
from reparam.partial import NothingCapturedError, assembled
from reparam.passes import Pass, pipeline
from reparam.passes.base import Place, Refusal, Rewrite, Undone
from reparam.passes.cost import CostModel, cost_model
from reparam.passes.explain import Choices
from reparam.passes.ledger import Ledger, current, kept_in
from reparam.piece import Piece, fused, total, under
from reparam.report import GraphView, OperationCounts, Report
from reparam.report.view import joined
from reparam.stages import Progress, Stages
from reparam.undo import Attempt, without_faults


@dataclass(frozen=True)
class FuseResult:
    """What `fuse` returns.

    Attributes:
        module: the fused model in eval mode, with the call signature of the original; shares no tensor with it.
        report: what was changed, what was left and why, and whether the two agree.
        reference: what it was compared with: the original, or, where `inference_form` or a registered form said what
            some of its modules are at inference, the original with that put in place (it shares the parameters).
    """

    module: nn.Module
    report: Report
    reference: nn.Module


@torch.inference_mode(False)  # its tensors do not tell what was written to
@nothing_compiled()
def fuse(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    verify: bool | str = "standard",
    seed: int = 0,
    capture: str = "auto",
    objective: str = "latency",
    machine: str | None = None,
    explain: bool = False,
    fixed_sizes: bool = False,
    inference_form: Mapping[str | type[nn.Module], Form] | None = None,
    passes: Sequence[Pass] | None = None,
    strict: bool = False,
    data: Data | None = None,
    data_limit: int = LIMIT,
    progress: Progress | None = None,
) -> FuseResult:
    """Turns a model into its inference form: the fewest layers that compute the same function.

    The model itself is not changed. Weights are combined in float64 and rounded to the model's dtype once; a float64
    model stays in float64 throughout.

    Args:
        model: any module, in Python or TorchScript; it is taken in eval mode, and without what `torch.compile` has made
            of it (compile the fused module anew).
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. Their sizes are examples: the
            fused model runs on every size that the original runs on.
        verify: how thoroughly the result is checked against the original: "quick", "standard" (default), "thorough",
            or "off". True is "standard", False is "off".
        seed: of the inputs that verification draws.
        capture: how the graph is captured: "symbolic" tracing, "export" (torch.export), "auto" (the first of these that
            can; if none can, the parts of the model that can be captured are fused in place), or "modules" (only parts:
            the model keeps its own class, methods and attributes).
        objective: what the fused model should have least of, where several forms compute the same: "latency",
            "macs" (multiply-adds) or "parameters". No form is chosen that is priced slower than the original.
        machine: whose prices count: "eager-cpu", "onnxruntime-cpu" or "cuda"; None is "cuda" for a model on CUDA, else
            "eager-cpu".
        explain: also report what was compared for each region and why one form won (`report.choices`); takes longer.
        fixed_sizes: let the fused model run at the example's sizes only, other than the batch; shifts in front of zero
            padding can then become one constant (`reparam.passes.bias_maps`). Other sizes raise `OtherInputError`.
        inference_form: what modules are at inference whose own eval mode does not say so, by class, class name or
            qualified name: "identity", a number (a constant scale), or a function that takes the module and returns
            what stands for it. The result is compared with the model in that form. A model that draws random numbers
            in eval mode is refused without it.
        passes: the passes to run, in order, in place of the usual ones; they bring their own prices.
        strict: whether a rewrite that verification finds at fault is an error; else it is undone (`report.undone`).
        data: inputs of your own on which the two are compared besides; as for `reparam.verify`.
        data_limit: the most rows, images or batches of it.
        progress: called with a few words when a stage starts.

    Returns:
        The fused module and the report.

    Raises:
        InputError: the model, the inputs or an option cannot be used.
        CaptureError: the model's graph cannot be captured, or it draws random numbers in eval mode.
        NotEquivalentError: the fused model does not agree with the original, and no undoing helps; or, with `strict`,
            something had to be undone. No module is returned.
    """
    _require_values(model)
    kept = kept_until_done(model)
    was_compiled, model = is_compiled(model), opened_programs(eager(model))
    level = _level(verify)
    _require_options(capture, explain, fixed_sizes, passes)
    prices = cost_model(objective, _machine_of(model) if machine is None else machine)
    stages = Stages(progress)
    inputs = Inputs.of(example_inputs)
    if data is not None and level == "off":
        raise InputError("data is there to be compared on, and verify is off; leave out one of the two")
    batches, prepared = read(data, model, inputs, limit=data_limit)
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        name = model.original_name
        with stages("converting from TorchScript"):
            model = graph_of_script(model, inputs)
    reference, said = in_inference_form(model, inference_form)
    own = Answers(reference, inputs)
    job = _Job(reference, inputs, own, capture, level, seed, stages, passes, prices, explain, fixed_sizes, batches)
    with _explained(model, reference, inputs), entered() as called:
        attempt = job.attempt(Ledger(judge=difference if level in _CHECKED else None), find_parting=True)
    if kept.put_back():
        raise UnfitModelError(
            f"{name} changes its own buffers, though a copy of it runs: a function that it keeps as an attribute is "
            "bound to it, or holds it in a closure; make that a method of its class"
        )
    undone: tuple[Undone, ...] = ()
    if not attempt.passed or attempt.faults:
        with stages("finding the fault"):
            right, undone = without_faults(attempt, job.attempt, difference, stages.tell)
        attempt = attempt if right is None else right
    made, comparison = attempt.made, attempt.comparison
    was_compiled |= bool(called) and made.how in ("symbolic", "export")  # in parts, what calls compiled code stays
    for piece in made.pieces:
        forget_float64(piece.module.graph)
    report = Report(
        model=name,
        capture=made.how,
        before=made.before,
        after=made.after,
        rewrites=(*map(_rewrite_of, said), *made.rewrites),
        refusals=made.refusals,
        undone=undone,
        choices=None if made.choices is None else tuple(made.choices.made),
        comparison=comparison,
        environment=_environment(),
        seconds=stages.seconds,
        notes=(
            *_notes_of(said),
            *((_COMPILED,) if was_compiled else ()),
            *prepared,
            *made.notes,
            *_checks_of(attempt.ledger),
        ),
        graph=joined([("", made.graph, len(said))]),
    )
    _require_equivalent(report, strict)
    return FuseResult(made.module, report, reference)


_COMPILED = "the model was compiled by torch.compile; the fused one is not: compile it anew"
_CHECKED = ("standard", "thorough")
"""Levels at which each rewrite is checked where it stands, whether or not something is wrong."""


def _require_options(capture: str, explain: bool, fixed_sizes: bool, passes: Sequence[Pass] | None) -> None:
    """Refuses options that are not known, or that do not go together.

    Raises:
        InputError: one is.
    """
    if capture not in WAYS:
        raise InputError(f"capture={capture!r} is not known; use {', '.join(WAYS)}")
    if explain and passes is not None:
        raise InputError("explain goes with the usual passes; of your own, give the Collapse a function to call")
    if fixed_sizes and passes is not None:
        raise InputError("fixed_sizes goes with the usual passes; of your own, give the Rounds its maps")
    if not isinstance(fixed_sizes, bool):
        raise InputError(f"fixed_sizes={fixed_sizes!r} is neither True nor False")


def _require_equivalent(report: Report, strict: bool) -> None:
    """Refuses to return a model that does not agree, or, with `strict`, one of which something had to be undone.

    Raises:
        NotEquivalentError: it is such a model.
    """
    comparison, undone = report.comparison, report.undone
    if comparison is not None and not comparison.passed:
        advice = "" if comparison.lacks_evidence else ", please report this with the report attached to this error"
        raise NotEquivalentError(
            f"the fused {report.model} {comparison.agreement} the original: {comparison.summary().rstrip('.')}; "
            f"no model was made{advice}",
            report,
        )
    if undone and strict:
        raise NotEquivalentError(
            f"{len(undone)} rewrite(s) of {report.model} at fault, the first at {undone[0].where} "
            f"({undone[0].failure.rstrip('.')}); without strict they are undone",
            report,
        )


@contextmanager
def _explained(model: nn.Module, reference: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Says so if a model does not run in the form that it was said to have.

    Raises:
        InputError: it does not.
    """
    try:
        yield
    except UnfitModelError:
        raise
    except Exception as error:
        wrong = None if reference is model else failure(reference, inputs)
        if wrong is None or failure(model, inputs) is not None:
            raise
        raise InputError(
            f"in the form that inference_form says, {type(reference).__name__} does not run on the example inputs: "
            f"{type(wrong).__name__}: {wrong}"
        ) from error


def _rewrite_of(said: Said) -> Rewrite:
    identity = f"{said.kind}(x) = {'x' if not said.form else said.form} at inference, as inference_form says"
    return Rewrite("inference form", Place(said.path), (f"{said.path}: {said.kind}",), said.form, identity)


def _notes_of(said: Sequence[Said]) -> tuple[str, ...]:
    if not said:
        return ()
    kinds = ", ".join(dict.fromkeys(f"{one.kind} as {one.form or 'identity'}" for one in said))
    return (f"inference_form was believed ({kinds}): what was fused is compared with the original in that form",)


def _checks_of(ledger: Ledger) -> tuple[str, ...]:
    """Where rewrites were not checked where they stand, and what such checks found that the whole does not show."""
    faults = (
        f"{one.tensor}{'' if one.difference is None else f': {one.difference.what}'}; the whole model does not show it"
        for one in ledger.faults
    )
    return (*(f"not each rewrite was checked where it stands; {why}" for why in ledger.unchecked), *faults)


@dataclass(frozen=True)
class _Made:
    """A fused model, whole or in parts."""

    module: nn.Module
    how: str
    pieces: tuple[Piece, ...]
    float64: Callable[[], nn.Module]
    before: OperationCounts
    after: OperationCounts
    rewrites: tuple[Rewrite, ...]
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]
    graph: GraphView
    choices: Choices | None = None


@dataclass(frozen=True)
class _Job:
    """What is fused, how, and how it is checked: everything but which rewrites are made.

    `known` is what the attempts found out about the original's noise, `own` what it answers to the example.
    """

    model: nn.Module
    inputs: Inputs
    own: Answers
    way: str
    level: str
    seed: int
    stages: Stages
    passes: Sequence[Pass] | None
    prices: CostModel
    explain: bool
    fixed_sizes: bool
    data: tuple[Batch, ...]
    known: dict[Any, Noises] = field(default_factory=dict)

    def attempt(self, ledger: Ledger, only: frozenset[str] | None = None, find_parting: bool = False) -> Attempt[_Made]:
        """Fuses as the ledger allows, and verifies on the input cases named, or on all of the level."""
        choices = Choices() if self.explain else None
        add = None if choices is None else choices.add
        usual = pipeline(self.prices, add, fixed_sizes=self.fixed_sizes)
        steps = tuple(usual if self.passes is None else self.passes)
        with kept_in(ledger):
            made = replace(
                _made(self.model, self.inputs, self.own, self.way, steps, self.stages, verified=self.level != "off"),
                choices=choices,
            )
        if self.level == "off":
            return Attempt(made, ledger, None)
        with self.stages("verifying"):
            twin = None if self._is_exact() else made.float64()
            comparison = verify_modules(
                *(self.model, made.module, self.inputs),
                level=self.level,
                seed=self.seed,
                candidate_float64=twin,
                only=only,
                data=self.data,
                find_parting=find_parting,
                spent=ledger.passes,
                known=self.known,
            )
        return Attempt(made, ledger, comparison)

    def _is_exact(self) -> bool:
        """Whether the weights are in float64 as they are."""
        return any(parameter.dtype == torch.float64 for parameter in self.model.parameters())


def _made(
    model: nn.Module, inputs: Inputs, own: Answers, way: str, steps: Sequence[Pass], stages: Stages, *, verified: bool
) -> _Made:
    if way == "modules":
        _refuse_random(model, inputs, None)
        try:
            return _made_of_parts(model, inputs, way, "asked for", steps, stages, verified)
        except NothingCapturedError:
            raise CaptureError(f"no child of {type(model).__name__} can be captured; use capture='auto'") from None
    try:
        with stages("capturing the graph"), _garbage_collection_paused():
            captured = capture_graph(model, inputs, leaves(), way, own)
    except CaptureError as error:
        _refuse_random(model, inputs, error)
        if way != "auto" or isinstance(error, UnfitModelError):
            raise
        try:
            why = str(error).partition("; rewrite that line")[0]
            return _made_of_parts(model, inputs, "partial", why, steps, stages, verified)
        except NothingCapturedError:
            raise error from None
    with stages("fusing"), _garbage_collection_paused():
        piece = fused(captured, model, steps)
    made = piece.module
    counts = (piece.before, piece.after)
    return _Made(
        *(made, captured.how, (piece,), lambda: float64_twin(made), *counts),
        *(piece.rewrites, piece.refusals, captured.notes, piece.graph),
    )


def _refuse_random(model: nn.Module, inputs: Inputs, error: CaptureError | None) -> None:
    """For a model that no graph holds whole; of a graph it is seen which draws matter, here all do.

    Raises:
        UnfitModelError: the model draws random numbers in eval mode.
    """
    draws = find_draws(model, inputs)
    if draws:
        raise UnfitModelError(refusal(type(model).__name__, draws)) from error


def _made_of_parts(
    model: nn.Module, inputs: Inputs, how: str, why: str, steps: Sequence[Pass], stages: Stages, verified: bool
) -> _Made:
    def fuse_one(path: str, part: nn.Module, given: Inputs) -> Piece:
        with current().within(path):
            return fused(capture_graph(part, given, leaves()), part, steps)

    with stages("fusing"), torch.no_grad():
        whole = assembled(model, inputs, fuse_one, why, verified=verified)
    pieces = whole.parts
    return _Made(
        whole.module,
        how,
        tuple(pieces.values()),
        whole.float64,
        total([piece.before for piece in pieces.values()]),
        total([piece.after for piece in pieces.values()]),
        tuple(one for path, piece in pieces.items() for one in under(path, piece.rewrites)),
        tuple(one for path, piece in pieces.items() for one in under(path, piece.refusals)),
        (
            *map(str, whole.outside),
            *(f"{path}: {note}" for path, piece in pieces.items() for note in piece.captured.notes),
        ),
        _graphs(pieces),
    )


def _graphs(pieces: Mapping[str, Piece]) -> GraphView:
    """The graphs of all parts."""
    parts, earlier = [], 0
    for path, piece in pieces.items():
        parts.append((path, piece.graph, earlier))
        earlier += len(piece.rewrites)
    return joined(parts)


def _require_values(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    wrong = unusable((*model.named_parameters(), *model.named_buffers()))
    if wrong is not None:
        raise InputError(wrong)


def _machine_of(model: nn.Module) -> str:
    return "cuda" if any(parameter.is_cuda for parameter in model.parameters()) else "eager-cpu"


def _level(requested: bool | str) -> str:
    level = {True: "standard", False: "off"}.get(requested, requested) if isinstance(requested, bool) else requested
    if level not in ("off", "quick", "standard", "thorough"):
        raise InputError(f"verify={requested!r} is not known; use 'off', 'quick', 'standard' or 'thorough'")
    return str(level)


def _environment() -> dict[str, str]:
    from reparam import __version__

    return {
        "reparam": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """A graph is many small objects that all stay alive; scanning them again and again is a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
