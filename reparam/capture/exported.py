"""A model, or an exported program, as a graph module in the words of torch; the tracer then reads it as any model.

What symbolic tracing cannot follow `torch.export` often can: it runs the model and writes down every operation. Batch
and image axes stay open where the model allows it; what it found about sizes is checked by the guards that it leaves.
"""

from __future__ import annotations

import inspect
import linecache
import re
from collections.abc import Iterator
from types import FrameType
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from reparam.answers import plain_answers
from reparam.capture.aten import spell_out
from reparam.capture.imports import printable
from reparam.checks import Guards
from reparam.copying import copied
from reparam.inputs import Inputs
from reparam.quiet import quiet

_MOST_CHARACTERS = 200
"""Of a name from a file, which can hold any text."""


def export(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """Exports a model (already a private copy, in eval mode).

    Raises:
        Exception: whatever torch.export raises for a model that it cannot capture.
    """
    error: Exception | None = None
    for example, shapes in _attempts(model, inputs):
        try:
            with quiet(), torch.no_grad(), torch.compiler.set_stance("default"):  # it compiles what torch.cond calls
                program = torch.export.export(
                    model, example.args, dict(example.kwargs), dynamic_shapes=shapes, strict=False
                )
                _require_no_transforms(program)
                return graph_module(program)
        except Exception as failed:
            error = error or failed
    assert error is not None
    raise error


def _require_no_transforms(program: torch.export.ExportedProgram) -> None:
    """Refuses what `torch.vmap` leaves in a program: calls that open a level, and calls that close it.

    Raises:
        NotImplementedError: there are such calls; a graph that stops between two of them leaves torch in that level.
    """
    for node in program.graph.nodes:
        if str(getattr(node.target, "__module__", "")).startswith("torch._functorch"):
            raise NotImplementedError(f"torch.func in a program ({node.target.__name__})")


def graph_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a module with named parameters, its operations in the words of torch."""
    return _in_words_of_torch(plain_answers(program).module())


def opened_programs(model: nn.Module) -> nn.Module:
    """The model with what `module()` of exported programs has given, itself or in it, as modules like any other.

    It is a copy that shares the parameters; `model` itself, if there is nothing of that kind.
    """
    if not any(map(_is_program, model.modules())):
        return model
    twin = copied(model)
    if _is_program(twin):
        return as_plain(_in_words_of_torch(twin))
    for part in [*twin.modules()]:
        programs = {name: child for name, child in part._modules.items() if child is not None and _is_program(child)}
        part._modules.update((name, as_plain(_in_words_of_torch(child))) for name, child in programs.items())
    return twin


def _is_program(module: nn.Module) -> bool:
    """Whether `module()` of an exported program has given it, and nobody has put hooks on it since."""
    if not isinstance(module, fx.GraphModule) or type(getattr(module, "_guards_fn", None)).__name__ != "GuardsFn":
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(getattr(hook, "__module__", "").startswith(("torch.export", "torch._export")) for hook in hooks)


def as_plain(module: fx.GraphModule) -> fx.GraphModule:
    """An exported program's module without what torch.export adds to it, so that it is used like any other."""
    plain = fx.GraphModule(module, module.graph, "ExportedProgram")
    for part in plain.modules():
        part.training = False
    return plain


def _in_words_of_torch(module: Any) -> fx.GraphModule:
    for hooks in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks):
        hooks.clear()  # checks of the inputs, which the guards in the graph repeat
    if hasattr(module, "_guards_fn"):
        module._guards_fn = Guards(module._guards_fn)
    graph = module.graph
    spell_out(graph)
    graph.lint()
    module.recompile()
    for part in module.modules():
        part.training = False  # an exported module refuses eval()
        if isinstance(part, fx.GraphModule):  # whoever unpickles one traces its code, and this tracer wants arguments
            part._tracer_cls = part.graph._tracer_cls = None
    return cast(fx.GraphModule, module)


def _attempts(model: nn.Module, inputs: Inputs) -> Iterator[tuple[Inputs, Any]]:
    """Examples and open axes to try: all sizes, the batch, none. torch.export takes an axis of size 1 for fixed."""
    try:
        arguments = dict(inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments)
    except (TypeError, ValueError):
        arguments = {}
    larger = of_two(inputs)
    auto = torch.export.Dim.AUTO

    def axes(leaf: Any, image: bool) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.ndim:
            return None
        return {axis: auto for axis in range(leaf.ndim) if axis == 0 or (image and axis > 1)}

    if arguments:
        for image in (True, False):
            yield larger, pytree.tree_map(lambda leaf, image=image: axes(leaf, image), arguments)
    yield inputs, None


def of_two(inputs: Inputs) -> Inputs:
    """The example as a batch of two if it is one of one: an axis of size 1 is taken for fixed."""
    batches = {tensor.shape[0] for tensor in inputs.tensors() if tensor.ndim}
    return inputs.map(lambda t: torch.cat([t, t]) if t.ndim else t) if batches == {1} else inputs


class Origins:
    """Where the nodes of an exported program stood in the user's model, found by the line of generated code."""

    def __init__(self, root: nn.Module) -> None:
        self._code = None
        if isinstance(root, fx.GraphModule):
            self._code = type(root).forward.__code__
            self._nodes = {node.name: node for node in root.graph.nodes}

    def find(self, frame: FrameType | None) -> tuple[str, str | None] | None:
        """Qualified module name and `file.py:line` of the node that a frame at or above this one executes."""
        if self._code is None:
            return None
        while frame is not None and frame.f_code is not self._code:
            frame = frame.f_back
        if frame is None:
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        node = self._nodes.get(line.partition(" = ")[0])
        return None if node is None else (_module_path(node), _source(node))


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for key, entry in stack.items() if not key.startswith("_empty")]
    return printable(paths[-1], _MOST_CHARACTERS) if paths else ""


def _source(node: fx.Node) -> str | None:
    """The last line of the user's own code in the node's stack trace."""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, line) for file, line in lines if "/torch/" not in file and not file.startswith("<")]
    return printable(f"{own[-1][0].rsplit('/', 1)[-1]}:{own[-1][1]}", _MOST_CHARACTERS) if own else None
