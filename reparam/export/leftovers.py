"""What an ONNX graph holds that inference does not need: BatchNorms, dropouts, copies, chance, constants computed anew.

Each finding says where it stands and, where that is known, why it cannot go. The counts are asserted over the models of
the tests, and a table of them is made by `tools/onnx_graphs.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
KINDS = ("BatchNormalization", "Dropout", "Identity", "random", "constant")


@dataclass(frozen=True)
class Leftover:
    """One node that does nothing for the answer, or whose answer is known before the graph runs.

    Attributes:
        kind: one of `KINDS`: three operators by name, `random` for draws of random numbers, and `constant` for a node
            whose result does not depend on the graph's inputs.
        operator: the node's operator.
        node: its name, or that of its first output.
        module: qualified name of the module whose weights it has; empty if it has none.
        needed: why it cannot go; empty if it could.
    """

    kind: str
    operator: str
    node: str
    module: str = ""
    needed: str = ""

    def __str__(self) -> str:
        return f"{self.operator} {self.node} ({self.kind}{': ' + self.needed if self.needed else ''})"


def leftovers(model: onnx.ModelProto) -> tuple[Leftover, ...]:
    """Every node of `KINDS` in the graph, in the order of the graph, those of inner graphs behind their node.

    Args:
        model: the file's content; external data need not be loaded.
    """
    return tuple(_in_graph(model.graph, set()))


def counted(found: Iterable[Leftover]) -> dict[str, int]:
    """How many of each kind; every kind is named."""
    counts = Counter(one.kind for one in found)
    return {kind: counts[kind] for kind in KINDS}


def _in_graph(graph: onnx.GraphProto, outer: set[str]) -> Iterator[Leftover]:
    """`outer` names the constants that an inner graph sees."""
    constants = (
        outer | {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    )
    fixed = _fixed_shapes(graph)
    given, results = {value.name for value in graph.input} - constants, [value.name for value in graph.output]
    for node in graph.node:
        kind = _kind(node, constants, fixed)
        if kind is not None or node.op_type == "Constant":
            constants |= set(node.output) if kind in (None, "constant") else set()
        if kind is not None:
            name, module = node.name or node.output[0], ""
            if kind == "BatchNormalization" and node.input[1] in constants:
                module = node.input[1].rpartition(".")[0]
            yield Leftover(kind, node.op_type, name, module, _needed(node, given, constants, results))
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _in_graph(inner, constants)


def _kind(node: onnx.NodeProto, constants: set[str], fixed: set[str]) -> str | None:
    if node.op_type in RANDOM:
        return "random"
    if node.op_type in KINDS:
        return str(node.op_type)
    inner = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
    if node.op_type == "Constant" or inner:
        return None
    known = all(name in constants for name in node.input if name)
    if known or (node.op_type in ("Shape", "Size") and node.input[0] in fixed):
        return "constant"
    return None


def _fixed_shapes(graph: onnx.GraphProto) -> set[str]:
    """Tensors all of whose sizes stand in the file."""
    return {
        value.name
        for value in [*graph.input, *graph.value_info, *graph.output]
        if value.type.tensor_type.HasField("shape")
        and all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    }


def _needed(node: onnx.NodeProto, given: set[str], constants: set[str], results: list[str]) -> str:
    """An output of a graph needs a name of its own, so what is returned as it came in, or twice, is a copy."""
    if node.op_type != "Identity" or node.output[0] not in results:
        return ""
    source = node.input[0]
    if source in given:
        return "the model returns an input"
    if source in results:
        return "the model returns the same tensor twice"
    return "the model returns a constant" if source in constants else ""
