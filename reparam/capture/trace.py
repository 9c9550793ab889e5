"""From a module and example inputs to `Captured`.

The model is copied first, because tracing may leave things behind on it; the copy shares the parameters (they are
never written to) and has its own buffers. Arguments that hold no tensor, and those that the example leaves at such a
default, are fixed: `forward(x, embed=False)` is captured for `embed=False` and says so when called otherwise.

What the forward leaves on the model is undone on the copy. If the next call would answer otherwise because of it, the
model is refused; if not, a note names it.
"""

from __future__ import annotations

import inspect
import os
import re
import traceback
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from reparam.capture.agreement import Answers, answers_alike, graph_answers_as
from reparam.capture.captured import Captured, Leaves
from reparam.capture.execution import ExecutionError
from reparam.capture.exported import export
from reparam.capture.facts import check_facts, facts_asked
from reparam.capture.literals import note_exact
from reparam.capture.notes import batch_notes, compiled_notes, listed, mode_notes, size_notes
from reparam.capture.proxies import UnfitError, WrittenConstantError
from reparam.capture.state import Memory, version
from reparam.capture.storage import storage_of
from reparam.capture.tracer import ValueTracer
from reparam.chance import Generators
from reparam.checks import Guards, require_value
from reparam.copying import copied, parameters_kept, twin_of
from reparam.errors import CaptureError, InputError, ReparamError, UnfitModelError
from reparam.inputs import ExampleInputs, Inputs, cannot_run, unusable

__all__ = ["capture", "private_copy", "require_value"]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


WAYS = ("auto", "symbolic", "export", "modules")


def capture(
    model: nn.Module,
    example_inputs: ExampleInputs,
    leaves: Leaves = Leaves(),
    way: str = "auto",
    own: Answers | None = None,
) -> Captured:
    """Captures `model` for inference, not looking into `leaves`. The model itself is not changed.

    Args:
        model: the model.
        example_inputs: what it is run on.
        leaves: classes and functions to leave whole.
        way: "symbolic" tracing, `torch.export` ("export"), or the first of the two that can ("auto").
        own: what `model` answers to the example, for a caller who captures it more than once.

    Raises:
        InputError: the model is no module, has hooks on itself, or cannot run on the example inputs.
        CaptureError: its graph cannot be captured; the message names the line that stopped it.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not _has_forward(model):
        raise InputError(f"{type(model).__name__} has no forward; pass the module that calls what is in it")
    if model._forward_hooks or model._forward_pre_hooks:
        raise InputError(
            f"{type(model).__name__} has forward hooks on the model itself, which the fused model would lose; "
            "remove them, or wrap the model in another module"
        )
    inputs = Inputs.of(example_inputs)
    _check_tensors(model, inputs)
    own = Answers(model, inputs) if own is None else own
    if way == "export":
        return _exported(model, inputs, leaves, own, None)
    try:
        return _symbolic(model, inputs, leaves, own)
    except CaptureError as error:
        if way == "symbolic" or isinstance(error, UnfitModelError):
            raise
        return _exported(model, inputs, leaves, own, error)


def _has_forward(model: nn.Module) -> bool:
    """Whether the module can be called: containers of modules and of parameters cannot."""
    containers = (nn.ParameterList, nn.ParameterDict)
    return not (type(model) in containers or type(model).forward is nn.Module.forward) or "forward" in vars(model)


def _check_tensors(model: nn.Module, inputs: Inputs) -> None:
    held = dict((*model.named_parameters(), *model.named_buffers()))
    wrong = unusable((*held.items(), *(("an example input", tensor) for tensor in inputs.tensors())), meta=True)
    if wrong is not None:
        raise InputError(wrong)
    first = {tensor.device: name for name, tensor in reversed(held.items())}
    if len(first) > 1:
        where = " and ".join(f"{name} on {device}" for device, name in [*first.items()][-2:])
        raise InputError(f"the model has weights on several devices ({where}); move it to one, with .to(device)")
    for device, name in first.items():
        others = [tensor.device for tensor in inputs.tensors() if tensor.device != device and tensor.dim()]
        if others:
            raise InputError(
                f"the model is on {device} ({name}) and an example input on {others[0]}; move one with .to(device)"
            )


def _symbolic(model: nn.Module, inputs: Inputs, leaves: Leaves, own: Answers) -> Captured:
    real = False
    try:
        traced = _traced(model, inputs, leaves, compute=False)
    except ExecutionError:
        # A shape may depend on values (a selection by score): then every layer has to run.
        traced = _traced_or_explained(model, inputs, leaves)
    except Exception as error:
        found = _with_real_parameters(model, inputs, leaves, error)
        if found is None:
            raise _capture_error(model, error) from error
        traced, real = found, True
    _restore_buffers(traced, model)
    about_state = _state_notes(model, inputs, traced)
    if not graph_answers_as(own, inputs, traced.root, traced.graph):
        # What it asks the values of activations for it was told of stand-ins; now every layer runs.
        traced = _traced_or_explained(model, inputs, leaves)
        _restore_buffers(traced, model)
        about_state = _state_notes(model, inputs, traced)
        if not graph_answers_as(own, inputs, traced.root, traced.graph):
            raise CaptureError(f"{type(model).__name__} cannot be traced: its graph answers the example otherwise")
    _require_a_function(own, traced.graph)
    note_exact(model, inputs, traced.root, traced.graph, traced.literals, partial(_graph_of, leaves=leaves, real=real))
    notes = (
        *mode_notes(model),
        *batch_notes(traced.graph),
        *compiled_notes(traced.root, traced.graph),
        *size_notes(traced.decided, traced.decided_by),
        *_guards(traced.root, inputs),
        *about_state,
    )
    return Captured(traced.root, traced.graph, inputs, "symbolic", type(model).__name__, notes)


def _exported(model: nn.Module, inputs: Inputs, leaves: Leaves, own: Answers, before: CaptureError | None) -> Captured:
    """By torch.export; `before` is what stopped symbolic tracing.

    Raises:
        InputError: the model does not run on the inputs.
        CaptureError: `before`, if there is one, else what stopped torch.export.
    """
    name = type(model).__name__
    _require_answer(own, inputs)
    try:
        asked = facts_asked(model, inputs)
        twin = private_copy(model)
        generators = Generators(twin)
        try:
            program = export(twin, inputs.clone())
            drawn = [name for name in generators.moved() if not name.startswith("torch")]
        finally:
            generators.restore()
        if drawn:
            raise UnfitModelError(f"{name} draws a random number ({drawn[0]}), which the graph would repeat")
        captured = _program(program, inputs, leaves)
        note_exact(model, inputs, captured.root, captured.graph, _strangers(captured, model), _graph_exported)
        if not graph_answers_as(own, inputs, captured.root, captured.graph):
            raise CaptureError(f"{name} cannot be exported: the program answers the example otherwise")
    except (InputError, UnfitModelError):
        raise
    except Exception as error:
        if before is not None:
            raise before from error
        raise CaptureError(f"{name} cannot be exported: {_first_line(error)}{_at(error)}") from error
    check_facts(captured.graph, asked)
    if not answers_alike(model, inputs):
        raise UnfitModelError(f"{name} answers the same input otherwise when called again, which a graph cannot hold")
    notes = (
        captured.notes if before is None else (f"{_stopped(before)}; it was captured by torch.export", *captured.notes)
    )
    if asked:
        what, lines = _joined({f"{fact}s" for fact in asked}), ", ".join(dict.fromkeys(asked.values()))
        notes += (f"the program is for the {what} of the example, as the forward asks for them ({lines})",)
    return replace(captured, how="export", name=name, notes=(*mode_notes(model), *notes))


def _require_answer(own: Answers, inputs: Inputs) -> None:
    """Sees that the model runs at all: what torch.export says of one that does not may be anything.

    Raises:
        InputError: it does not.
    """
    try:
        _ = own.first
    except ReparamError:
        raise
    except Exception as error:
        raise cannot_run(error, inputs, own.name) from error


def _program(program: nn.Module, inputs: Inputs, leaves: Leaves) -> Captured:
    """Traces an exported program; where that fails it is the program that is unfit, not what the user gave."""
    try:
        return _symbolic(program, inputs, leaves, Answers(program, inputs))
    except InputError as error:
        raise CaptureError(f"its program is of no use: {error}") from error


_FIXED_SIZE = re.compile(r"(\w+)\.size\(\)\[(\d+)\] == (\d+)")


class _Check(nn.Module):
    """A guard of torch.export, as a module that can be traced."""

    def __init__(self, guard: nn.Module) -> None:
        super().__init__()
        self.guard = guard

    def forward(self, *inputs: Any) -> None:
        self.guard(*inputs)


def _guards(root: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Makes the guards of an exported program, a function made at run time, a graph, which can be pickled.

    Returns:
        A note on the sizes that they hold fixed.
    """
    guards = root._modules.get("_guards_fn")
    if not isinstance(guards, Guards):
        return ()
    given = Inputs(tuple(pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))))
    if not isinstance(guards.check, fx.GraphModule):
        traced = _traced(_Check(guards.check), given, Leaves(), compute=False)
        guards.check = fx.GraphModule(traced.root, traced.graph)
    ranks = {tensor.ndim for tensor in given.tensors()}
    fixed = [
        f"{name}.shape[{axis}] == {size}"
        for node in guards.check.graph.find_nodes(op="call_function", target=torch._assert)
        for name, axis, size in _FIXED_SIZE.findall(str(node.args[1]))
        if axis == "0" or (int(axis) > 1 and min(ranks) > 3)
    ]
    if not fixed:
        return ()
    return (f"torch.export fixed what may vary in other models: {', '.join(dict.fromkeys(fixed))}",)


def _stopped(error: CaptureError) -> str:
    return f"symbolic tracing stopped: {str(error).partition('; rewrite that line')[0]}"


@dataclass(frozen=True)
class _Traced:
    """A graph, and what tracing it left behind.

    Attributes:
        changed: what the forward changed on the model in Python.
        frozen: buffers that the graph writes to and whose values the trace depended on.
        written: addresses of the storages that the graph writes to.
        decided: lines where sizes of the example, or what else its tensors are, decided what was traced.
        decided_by: which of these: "sizes", "dtypes and devices".
        spoilt: arguments that the forward writes to.
        literals: attributes of the root: tensors that the forward made without the input.
    """

    root: nn.Module
    graph: fx.Graph
    changed: tuple[str, ...]
    frozen: tuple[str, ...]
    written: frozenset[int]
    decided: tuple[str, ...]
    decided_by: str
    spoilt: tuple[str, ...]
    literals: tuple[str, ...]


def _graph_of(
    model: nn.Module, inputs: Inputs, leaves: Leaves = Leaves(), real: bool = False
) -> tuple[nn.Module, fx.Graph]:
    traced = _traced(model, inputs, leaves, compute=False, real=real)
    return traced.root, traced.graph


def _graph_exported(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, fx.Graph]:
    return _graph_of(export(model, inputs.clone()), inputs)


def _strangers(captured: Captured, model: nn.Module) -> list[str]:
    """The attributes of a traced program that its model does not have by that name."""
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    read = {str(node.target) for node in captured.graph.find_nodes(op="get_attr")}
    return sorted(name for name in read - own if "." not in name)


def _require_a_function(own: Answers, graph: fx.Graph) -> None:
    """What a graph holds of state and of random numbers it shows; this is for what it would hold as constants.

    Raises:
        UnfitModelError: the model answers otherwise when it is called again, and no node of the graph says why.
    """
    if any(node.meta.get("writes") for node in graph.nodes):
        return
    draws = any(node.meta.get("draws") for node in graph.nodes)  # these get the same numbers again
    if own.differ_again(0 if draws else 1):
        raise UnfitModelError(
            f"{own.name} answers the same input otherwise when it is called again, which a graph cannot "
            "hold: it keeps state, or draws random numbers from a generator of its own; make it a function of its input"
        )


def _state_notes(model: nn.Module, inputs: Inputs, traced: _Traced) -> tuple[str, ...]:
    """What the user should know of the state that the forward changes.

    Raises:
        CaptureError: the answer depends on that state.
    """
    notes: tuple[str, ...] = ()
    if traced.spoilt:
        names = ", ".join(traced.spoilt)
        notes = (f"the forward writes to its argument {names}, which the fused model may leave as it was",)
    if traced.frozen:
        raise UnfitModelError(
            f"{type(model).__name__} cannot be traced: its forward writes to {traced.frozen[0]} and takes a Python "
            "number or a decision from its value, which a graph would repeat"
        )
    if not traced.changed:
        return notes
    names = listed(traced.changed)
    if not answers_alike(model, inputs):
        raise UnfitModelError(
            f"{type(model).__name__} cannot be traced: its forward changes {names} on the model and then answers the "
            "same input otherwise, which a graph cannot hold; make it a function of its input, or a buffer that is "
            "written to in place"
        )
    return (*notes, f"the forward changes {names} on the model; the fused model leaves it as it was")


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _joined(kinds: set[str]) -> str:
    """ "sizes, dtypes and devices"."""
    *first, last = sorted(kinds, reverse=True) or ["sizes"]
    return f"{', '.join(first)} and {last}" if first else last


def _traced_or_explained(model: nn.Module, inputs: Inputs, leaves: Leaves) -> _Traced:
    try:
        return _traced(model, inputs, leaves, compute=True)
    except ExecutionError as error:
        raise cannot_run(error.error, inputs, error.where or type(model).__name__) from error.error
    except Exception as error:
        raise _capture_error(model, error) from error


def _with_real_parameters(model: nn.Module, inputs: Inputs, leaves: Leaves, error: Exception) -> _Traced | None:
    """Another trace, for code that trips over proxies of parameters: `np.flip(weight.numpy())`.

    None if it fails as well, or if the error is none that this can help with.
    """
    if isinstance(error, (InputError, UnfitError)):
        return None
    try:
        return _traced(model, inputs, leaves, compute=False, real=True)
    except Exception:
        return None


def _traced(model: nn.Module, inputs: Inputs, leaves: Leaves, compute: bool, real: bool = False) -> _Traced:
    try:
        return _traced_once(model, inputs, leaves, compute, real, makes_nodes=False)
    except WrittenConstantError:
        pass
    try:  # a kernel made of parameters is then a constant like any other
        return _traced_once(model, inputs, leaves, compute, real=True, makes_nodes=False)
    except (WrittenConstantError, UnfitModelError):
        return _traced_once(model, inputs, leaves, compute, real, makes_nodes=True)


def _traced_once(
    model: nn.Module, inputs: Inputs, leaves: Leaves, compute: bool, real: bool, makes_nodes: bool
) -> _Traced:
    root = private_copy(model)
    if real:
        root = twin_of(root)  # what the forward does to the data of its parameters stays here
    memory = Memory(root)
    arguments = _bound(model, inputs.clone())
    tracer = ValueTracer(root, arguments, _fixed(model, arguments), memory, compute, leaves, makes_nodes, real)
    with warnings.catch_warnings(), torch.no_grad(), parameters_kept(root) if real else nullcontext():
        warnings.simplefilter("ignore")
        graph = tracer.trace(root)
    # What fx itself has put there: tensors that the forward made without the input.
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr" and node.users}
    spoilt = tuple(name for name, value in arguments.items() if any(map(version, _tensors(value))))
    replaced = memory.replaced(sorted(read))
    if replaced:
        raise UnfitError(f"the forward assigns {replaced[0]} and then uses it; a graph cannot hold that")
    constants = read & set(vars(root)) - memory.names
    kept = {name: vars(root).pop(name) for name in constants}
    changed = memory.changed(tracer.aliases.written)
    memory.restore()
    vars(root).update(kept)
    checks = [node for node in graph.nodes if node.meta.get("decides") and node.args[2]]
    decided = dict.fromkeys(str(node.args[2]) for node in checks)
    kinds = {kind for node in checks for kind in str(node.meta["decides"]).split(" and ")}
    frozen = [name for name in sorted(tracer.read) if tracer.aliases.is_written(name)]
    found = (tuple(changed), tuple(frozen), frozenset(tracer.aliases.written), tuple(decided), _joined(kinds))
    return _Traced(root, graph, *found, spoilt, tuple(sorted(constants)))


def _capture_error(model: nn.Module, error: Exception) -> Exception:
    if isinstance(error, InputError):
        return error
    if isinstance(error, WrittenConstantError):  # torch.export and Python itself may hold that
        return CaptureError(f"{type(model).__name__} cannot be traced: {_first_line(error)}{_at(error)}")
    if isinstance(error, UnfitError):
        return UnfitModelError(f"{type(model).__name__} cannot be traced: {_first_line(error)}{_at(error)}")
    return CaptureError(
        f"{type(model).__name__} cannot be traced: {_first_line(error)}{_at(error)}; "
        "rewrite that line without Python control flow on tensor values, or fuse the submodules that can be traced"
    )


def private_copy(model: nn.Module) -> nn.Module:
    """A structural copy in eval mode that shares the parameters and copies everything else.

    Raises:
        InputError: the model cannot be copied.
    """
    try:
        return copied(model).eval()
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({_first_line(error)}); remove tensors that are results of a "
            "computation with gradients, and other objects that copy.deepcopy does not take, from its attributes"
        ) from error


def _bound(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The example's arguments by parameter name, defaults included."""
    try:
        bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward: {_first_line(error)}"
        ) from error
    bound.apply_defaults()
    return dict(bound.arguments)


def _fixed(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are plain values, which Python control flow may depend on."""
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in arguments.items() if isinstance(value, plain)}


def _restore_buffers(traced: _Traced, model: nn.Module) -> None:
    """Undoes what running the graph may have written into buffers (counters, caches)."""
    theirs = dict(model.named_buffers())
    for name, buffer in traced.root.named_buffers():
        touched = buffer._version or storage_of(buffer) in traced.written
        if touched and name in theirs and buffer.shape == theirs[name].shape:
            with torch.no_grad():
                buffer.copy_(theirs[name])


def _at(error: BaseException) -> str:
    lines = [
        f"{os.path.basename(entry.filename)}:{entry.lineno}"
        for entry in traceback.extract_tb(error.__traceback__)
        if not entry.filename.startswith((_TORCH, _HERE, "<"))
    ]
    return f" ({lines[-1]})" if lines else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
