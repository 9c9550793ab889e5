"""From a module and example inputs to `Captured`.

The model is copied first, because tracing may leave things behind on it; the copy shares the parameters (they are
never written to) and has its own buffers. Arguments that the example leaves at their default and that hold no tensor
are fixed to that default: `forward(x, embed=False)` is captured for `embed=False` and says so when called otherwise.
"""

from __future__ import annotations

import copy
import inspect
import os
import sys
import traceback
import warnings
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from reparam.capture.captured import Captured, TensorInfo
from reparam.errors import CaptureError, InputError
from reparam.inputs import ExampleInputs, Inputs

View: TypeAlias = "tuple[int, int, tuple[int, ...], tuple[int, ...]]"

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.abspath(__file__)


def require_value(actual: Any, expected: Any, name: str) -> None:
    """Stands in a captured graph where an argument was fixed to its default.

    Raises:
        ValueError: the argument is given another value than the one the graph was captured for.
    """
    if actual is not expected and actual != expected:
        raise ValueError(f"this model was captured for {name}={expected!r} and cannot run with {name}={actual!r}")


def capture(model: nn.Module, example_inputs: ExampleInputs) -> Captured:
    """Captures `model` for inference. The model itself is not changed.

    Raises:
        InputError: the model is no module, or cannot run on the example inputs.
        CaptureError: its graph cannot be traced; the message names the line that stopped it.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    inputs = Inputs.of(example_inputs)
    root = private_copy(model)
    notes = ("the model was in train mode; its inference form was taken (eval mode)",) if model.training else ()
    tracer = _Tracer(_fixed_defaults(model, inputs))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            graph = tracer.trace(root)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be traced: {_first_line(error)}{_at(error)}; "
            "rewrite that line without Python control flow on tensor values, or fuse the submodules that can be traced"
        ) from error
    captured = Captured(root, graph, inputs, "symbolic", type(model).__name__, notes)
    record_shapes(captured)
    _restore_buffers(root, model)
    return captured


def private_copy(model: nn.Module) -> nn.Module:
    """A structural copy in eval mode that shares the parameters and copies everything else.

    Raises:
        InputError: the model cannot be copied.
    """
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    try:
        return copy.deepcopy(model, shared).eval()
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({_first_line(error)}); remove tensors that are results of a "
            "computation with gradients, and other objects that copy.deepcopy does not take, from its attributes"
        ) from error


def record_shapes(captured: Captured) -> None:
    """Runs the graph once on the example inputs and notes shape, dtype and device of every tensor.

    Raises:
        InputError: the model fails on the example inputs; the message names the shapes and the module that failed.
    """
    recorder = _Recorder(captured.root, captured.graph)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            captured.inputs.call(lambda *args, **kwargs: recorder.run(*_bound(captured.graph, args, kwargs)))
    except Exception as error:
        node = recorder.current
        where = node.meta.get("module_path") or node.name if node is not None else captured.name
        shapes = ", ".join("x".join(map(str, t.shape)) for t in captured.inputs.tensors())
        raise InputError(
            f"the model cannot run on the example input of shape {shapes}: {where}: {_first_line(error)}; "
            "pass inputs shaped as the model expects them"
        ) from error


class _Tracer(fx.Tracer):
    """Symbolic tracer that notes the source line of each node and fixes arguments left at their defaults."""

    def __init__(self, fixed: dict[str, Any]) -> None:
        super().__init__()
        self._fixed = fixed

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy: fx.Proxy = super().create_proxy(*args, **kwargs)
        proxy.node.meta["module_path"] = self.scope.module_path
        proxy.node.meta["source"] = _user_line()
        return proxy

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn_for_analysis: Any = None) -> Any:
        proxy = super()._proxy_placeholder(name, concrete_args, sig, fn_for_analysis)
        if name not in self._fixed:
            return proxy
        value = self._fixed[name]
        self.create_proxy("call_function", require_value, (proxy, value, name), {})
        return value


class _Recorder(fx.Interpreter):
    """Interpreter that notes a `TensorInfo` on every node."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        before = {_view(t): node for node in n.all_input_nodes for t in _tensors(self.env[node])}
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            n.meta["tensor"] = TensorInfo(tuple(value.shape), value.dtype, value.device)
        self._note_aliases(n, value, before)
        return value

    def _note_aliases(self, n: fx.Node, value: Any, before: dict[View, fx.Node]) -> None:
        """Storage is compared with that of the inputs only: elsewhere an equal address may be a re-used one."""
        if n.op in ("placeholder", "output", "get_attr") or not before:
            return
        views = [_view(t) for t in _tensors(value)]
        storages = {view[0] for view in views}
        aliases = [node for view, node in before.items() if view[0] in storages]
        if aliases:
            n.meta["aliases"] = tuple(dict.fromkeys(aliases))
            n.meta["same_view_as"] = tuple(node for view, node in before.items() if view in views)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def _view(tensor: torch.Tensor) -> View:
    if tensor.layout is not torch.strided:
        return (id(tensor), 0, (), ())
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _bound(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Arguments in the order of the graph's placeholders, which is how an interpreter takes them."""
    names = [node.target for node in graph.nodes if node.op == "placeholder"]
    plain = [str(name).lstrip("*") for name in names]
    unknown = [name for name in kwargs if name not in plain]
    if unknown:
        raise TypeError(f"forward has no argument {unknown[0]!r}")
    bound = list(args)
    for node in [node for node in graph.nodes if node.op == "placeholder"][len(args) :]:
        if node.target in kwargs:
            bound.append(kwargs[str(node.target)])
        elif node.args:
            bound.append(node.args[0])
        elif not str(node.target).startswith("*"):
            raise TypeError(f"forward needs the argument {node.target!r}")
    return bound


def _fixed_defaults(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Parameters of `forward` that the example leaves at a default without tensors."""
    try:
        signature = inspect.signature(model.forward)
        given = signature.bind(*inputs.args, **inputs.kwargs).arguments
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward: {_first_line(error)}"
        ) from error
    fixed = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in given and parameter.default is not inspect.Parameter.empty
    }
    plain = (bool, int, float, str, type(None))
    fixed.update({name: value for name, value in given.items() if isinstance(value, plain)})
    return {name: value for name, value in fixed.items() if isinstance(value, plain)}


def _restore_buffers(root: nn.Module, model: nn.Module) -> None:
    """Undoes what running the graph may have written into buffers (counters, caches)."""
    theirs = dict(model.named_buffers())
    for name, buffer in root.named_buffers():
        if buffer._version and name in theirs and buffer.shape == theirs[name].shape:
            buffer.copy_(theirs[name])


def _user_line() -> str | None:
    frame = sys._getframe(2)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(_TORCH) and filename != _HERE:
            return None if filename.startswith("<") else f"{os.path.basename(filename)}:{frame.f_lineno}"
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def _at(error: BaseException) -> str:
    lines = [
        f"{os.path.basename(entry.filename)}:{entry.lineno}"
        for entry in traceback.extract_tb(error.__traceback__)
        if not entry.filename.startswith(_TORCH) and entry.filename != _HERE and not entry.filename.startswith("<")
    ]
    return f" ({lines[-1]})" if lines else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
