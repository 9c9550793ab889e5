"""One exported program becomes one ONNX model in memory, with readable names and its provenance, and is saved."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import nn
from torch.utils import _pytree as pytree

from reparam.errors import ExportError
from reparam.export.place import place
from reparam.export.program import argument_names, axis_names, in_call_order, open_axes, range_notes, trace
from reparam.export.runtime import CALL_KEY, fixed_values
from reparam.export.shapes import Freedom, tensor_leaves
from reparam.export.spelling import Spelled
from reparam.inputs import Inputs
from reparam.quiet import deepest, quiet, reason

if TYPE_CHECKING:
    import onnx

# The first operator set in which convolution takes bfloat16.
BFLOAT16_OPSET = 22
# Smaller tensors stay in the model's own file; the others begin at a multiple of a page, so that they can be mapped.
LEAST_EXTERNAL_BYTES, EXTERNAL_ALIGNMENT = 1024, 4096


@dataclass(frozen=True)
class Plan:
    """What to build: a private copy of the module, its example, the names, the opset and the user's metadata.

    `prefix` is what stands before the names of the module's own weights, where it wraps the module of the user.
    """

    module: nn.Module
    inputs: Inputs
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    opset: int | None
    metadata: Mapping[str, str]
    prefix: str = ""


@dataclass(frozen=True)
class Built:
    """An ONNX model in memory and the axes that really stayed open."""

    proto: onnx.ModelProto
    dynamic_axes: Mapping[str, Mapping[int, str]]
    notes: tuple[str, ...]

    @property
    def open_batch(self) -> bool:
        return any(0 in axes for axes in self.dynamic_axes.values())

    @property
    def open_size(self) -> bool:
        return any(axis > 1 for axes in self.dynamic_axes.values() for axis in axes)


class _Flat(nn.Module):
    """Tensors in, tensors out: the form an ONNX graph has. Everything else in the call is fixed.

    An output that is also an input, or comes twice, is copied, because a graph's outputs need names of their own.
    """

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.module = module
        self.leaves, self.spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
        self.slots = [n for n, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]
        # Tensors among attributes would be exported as constants.
        self.leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = list(self.leaves)
        for slot, tensor in zip(self.slots, tensors, strict=True):
            leaves[slot] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        taken = list(tensors)
        outputs = []
        with Spelled():
            result = self.module(*args, **kwargs)
        for tensor in tensor_leaves(result):
            outputs.append(tensor.clone() if any(tensor is other for other in taken) else tensor)
            taken.append(tensor)
        return tuple(outputs)


def build(plan: Plan, freedom: Freedom) -> Built:
    """Traces and translates the plan's module with the axes of `freedom` open.

    Raises:
        ExportError: torch.export or the ONNX exporter cannot do it; `hopeless` is set where other axes would not help.
    """
    tensors = list(plan.inputs.tensors())
    # In the order of the arguments given, which is also the order in which the session flattens a call.
    names = in_call_order(plan.module, plan.inputs, plan.input_names)
    program = trace(_Flat(plan.module, plan.inputs), Inputs(tuple(tensors)), freedom, type(plan.module).__name__)
    proto = _translate(plan, program, names)
    axes = open_axes(program)
    readable = axis_names(tensors, names, axes)
    _rename_axes(proto, readable)
    _strip_prefix(proto, f"module.{plan.prefix}")
    _describe(proto, plan, names)
    dynamic = {
        name: {axis: readable.get(symbol, symbol) for axis, symbol in varying.items()}
        for name, varying in zip(names, axes, strict=True)
    }
    return Built(proto, dynamic, range_notes(program, readable))


def _translate(plan: Plan, program: torch.export.ExportedProgram, names: list[str]) -> onnx.ModelProto:
    opset = plan.opset
    if opset is None and any(t.dtype == torch.bfloat16 for t in program.state_dict.values()):
        opset = BFLOAT16_OPSET
    try:
        with quiet(), torch.no_grad():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=names,
                output_names=list(plan.output_names),
                verbose=False,
            )
            assert exported is not None
            # The exporter's own optimisation may put a constant behind its first reader.
            exported.model.graph.sort()
            _with_all_constants(exported.model.graph)
            _without_copies(exported.model)
            proto: onnx.ModelProto = exported.model_proto
    except ModuleNotFoundError as error:
        raise ExportError(
            f"ONNX export needs the package {error.name}; install it with `pip install {error.name}`"
        ) from error
    except Exception as error:
        raise _untranslatable(program, error, plan) from error
    got = next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    if plan.opset is not None and got != plan.opset:
        raise hopeless(
            f"opset {plan.opset} is not possible for this model, the exporter stays at {got}; choose {got} or none"
        )
    return proto


def _with_all_constants(graph: Any) -> None:
    """Holds the constants that nodes read and the exporter's optimisation has left out of the graph's own."""
    nodes = list(graph.all_nodes())
    made = {value.name for node in nodes for value in node.outputs} | {value.name for value in graph.inputs}
    for value in {id(value): value for node in nodes for value in node.inputs if value is not None}.values():
        if value.producer() is None and value.const_value is not None and not value.is_initializer():
            taken = made | set(graph.initializers)
            value.name = next(name for name in _names(value.name) if name not in taken)
            graph.register_initializer(value)


def _names(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in count(1))


def _without_copies(model: Any) -> None:
    """Removes Identity nodes, but for those that an output needs, to have a name of its own."""
    from onnx_ir.convenience import replace_all_uses_with

    for node in list(model.graph.all_nodes()):
        if node.op_type != "Identity" or node.domain not in ("", "ai.onnx"):
            continue
        source, copied = node.inputs[0], node.outputs[0]
        if copied.is_graph_output():
            outputs = node.graph.outputs
            if source.producer() is None or source.is_graph_output() or source.graph is not node.graph:
                continue
            replace_all_uses_with(copied, source)
            outputs[:] = [source if value is copied else value for value in outputs]
            copied.name, source.name = source.name, copied.name
        else:
            replace_all_uses_with(copied, source)
        node.graph.remove(node, safe=True)


def hopeless(message: str) -> ExportError:
    """An error that other axes would not help."""
    error = ExportError(message)
    error.hopeless = True  # type: ignore[attr-defined]
    return error


def _untranslatable(program: torch.export.ExportedProgram, error: BaseException, plan: Plan) -> ExportError:
    """One sentence that names the operator, the module it is called in and the source line, as far as known."""
    text = str(deepest(error))
    match = re.search(r"OpOverload\(op='(\w+)\.(\w+)'", text)
    if match is None:
        return ExportError(f"the ONNX exporter fails{_at_node(program, error, plan)}: {reason(error)}")
    operator = match.group(2)
    where, called = "", [node for node in program.graph.nodes if node.op == "call_function"]
    # The exporter may have put the operator in place of one of another rank.
    for name in (operator.strip("_"), re.sub(r"\dd$", "", operator.strip("_"))):
        found = next((node for node in called if name in str(node.target)), None)
        if found is not None:
            where = place(found, plan.module, f"module.{plan.prefix}")
            break
    return hopeless(
        f"operator {match.group(1)}::{operator}{where} has no ONNX form; replace it, or write a .pt2 archive instead"
    )


def _at_node(program: torch.export.ExportedProgram, error: BaseException, plan: Plan) -> str:
    """` on aten.histc in head.1 (net.py:12)`, where some error of the chain says which node was being translated."""
    step: BaseException | None = error
    while step is not None:
        match = re.search(r"translating node %?(\w+)", str(step))
        for node in program.graph.nodes if match else ():
            if match and node.name == match.group(1):
                return f" on {str(node.target).rpartition('.')[0]}{place(node, plan.module, f'module.{plan.prefix}')}"
        step = step.__cause__
    return ""


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """The graph and every graph inside its nodes."""
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found += _graphs(attribute.g)
            for inner in attribute.graphs:
                found += _graphs(inner)
    return found


def _rename_axes(proto: onnx.ModelProto, readable: Mapping[str, str]) -> None:
    """Replaces torch's symbols (`s77`) by readable names, also inside expressions (`(s53//8)`)."""
    for graph in _graphs(proto.graph):
        for value in [*graph.input, *graph.output, *graph.value_info]:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = re.sub(r"[A-Za-z_]\w*", lambda m: readable.get(m.group(), m.group()), dim.dim_param)


def _strip_prefix(proto: onnx.ModelProto, prefix: str) -> None:
    """Gives the weights the names they have in the model's state_dict, without the wrapper's prefix."""
    graphs = _graphs(proto.graph)
    used = {value.name for graph in graphs for value in [*graph.input, *graph.output, *graph.initializer]}
    used |= {name for graph in graphs for node in graph.node for name in node.output}
    new = {}
    for tensor in proto.graph.initializer:
        plain = tensor.name.removeprefix(prefix)
        if plain != tensor.name and plain not in used:
            new[tensor.name] = plain
            tensor.name = plain
    for graph in graphs:
        for value in graph.value_info:
            value.name = new.get(value.name, value.name)
        for value in graph.output:
            value.name = new.get(value.name, value.name)
        for node in graph.node:
            node.input[:] = [new.get(name, name) for name in node.input]


def _describe(proto: onnx.ModelProto, plan: Plan, names: list[str]) -> None:
    """Provenance, the user's metadata, and how a call of the module maps to the file's inputs and outputs."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("reparam")
    except PackageNotFoundError:
        own = "unknown"
    with quiet():
        result = plan.inputs.call(plan.module)
    leaves, spec = pytree.tree_flatten(result)
    structure: str | None = None
    # Numbers in a result usually count the batch; they are not in the file, so such a result comes back as a list.
    if all(leaf is None or isinstance(leaf, torch.Tensor) for leaf in leaves):
        try:
            structure = pytree.treespec_dumps(spec)
        except Exception:  # a container that cannot be written down comes back as a list
            structure = None
    call = {
        **_arguments(plan),
        "inputs": names,
        "outputs": list(plan.output_names),
        "structure": structure,
        "present": [leaf is not None for leaf in leaves],
    }
    props = {
        **plan.metadata,
        "reparam.version": own,
        "torch.version": torch.__version__,
        CALL_KEY: json.dumps(call),
    }
    proto.producer_name = "reparam"
    proto.producer_version = own
    del proto.metadata_props[:]
    for key, value in props.items():
        proto.metadata_props.add(key=str(key), value=str(value))


def _arguments(plan: Plan) -> dict[str, Any]:
    """How a call is flattened: names of the parameters, of the arguments given, and the values that are fixed."""
    parameters = inspect.signature(plan.module.forward).parameters
    listed = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    keywords = list(plan.inputs.kwargs)
    given = argument_names(plan.module, plan.inputs)
    arguments = keywords if listed else [*[n for n in given if n not in keywords], *keywords]
    return {
        "parameters": None if listed else list(parameters),
        "arguments": arguments,
        "fixed": {} if listed else {name: fixed_values(value) for name, value in given.items()},
    }


def weight_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of the weights that are inside the model."""
    return sum(len(tensor.raw_data) for tensor in proto.graph.initializer)


def save(proto: onnx.ModelProto, path: Path, threshold: int) -> bool:
    """Writes the model; weights beyond `threshold` bytes go to `<path>.data`. Returns whether they did."""
    import onnx

    path.with_name(path.name + ".data").unlink(missing_ok=True)
    if weight_bytes(proto) <= threshold:
        onnx.save_model(proto, str(path))
        return False
    with open(path.with_name(path.name + ".data"), "wb") as data:
        onnx.save_model(_with_weights_in(proto, data), str(path))
    return True


def _with_weights_in(proto: onnx.ModelProto, data: BinaryIO) -> onnx.ModelProto:
    """The model with its larger weights written to a file beside it; no second copy of them is held on the way."""
    import onnx
    from onnx.external_data_helper import set_external_data

    copied = onnx.ModelProto()
    _copy_fields(proto, copied, but="graph")
    _copy_fields(proto.graph, copied.graph, but="initializer")
    for tensor in proto.graph.initializer:
        kept = copied.graph.initializer.add()
        raw = tensor.raw_data  # read once: each time it is copied
        if len(raw) < LEAST_EXTERNAL_BYTES:
            kept.CopyFrom(tensor)
            continue
        _copy_fields(tensor, kept, but="raw_data")
        data.write(b"\0" * (-data.tell() % EXTERNAL_ALIGNMENT))
        kept.raw_data = b""  # what is not there cannot be external
        set_external_data(kept, Path(data.name).name, data.tell(), len(raw))
        kept.ClearField("raw_data")
        data.write(raw)
    return copied


def _copy_fields(source: Any, target: Any, but: str) -> None:
    """Copies every field of a message but one."""
    for field, value in source.ListFields():
        if field.name == but:
            continue
        if hasattr(value, "extend"):
            getattr(target, field.name).extend(value)
        elif field.message_type is not None:
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)
