"""What the inputs of an ONNX file are: names, dtypes, sizes, and how large integers may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reparam.errors import ExportError

if TYPE_CHECKING:
    import onnx

_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
_MOST = 100


@dataclass(frozen=True)
class OnnxInput:
    """One input of a file.

    Attributes:
        name: in the file.
        dtype: of its elements.
        shape: its sizes; a name, or `?`, for an axis that is open.
        most: integers are below this, since they choose rows of a table of that length; 2 where no table is known.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    most: int = 2

    def __str__(self) -> str:
        return f"{self.name}={'x'.join(map(str, self.shape))}:{str(self.dtype).removeprefix('torch.')}"


def onnx_inputs(proto: onnx.ModelProto) -> tuple[OnnxInput, ...]:
    """The inputs of a file that no initializer fills, in the file's order.

    Raises:
        ExportError: one is no tensor of a type that torch has.
    """
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    found = []
    for value in proto.graph.input:
        if value.name in stored:
            continue
        kind = value.type.tensor_type.elem_type if value.type.HasField("tensor_type") else 0
        if kind not in _DTYPES:
            raise ExportError(f"the input {value.name!r} of the ONNX file is no tensor that torch can make")
        dims = value.type.tensor_type.shape.dim
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)
        found.append(OnnxInput(value.name, _DTYPES[kind], shape, _most(proto, value.name)))
    return tuple(found)


def _most(proto: onnx.ModelProto, name: str) -> int:
    """The length of the shortest stored table that the input chooses rows of, at most 100; 2 without one."""
    lengths = {tensor.name: tensor.dims[0] for tensor in proto.graph.initializer if len(tensor.dims) == 2}
    names, tables = {name}, []
    for node in proto.graph.node:  # in the order in which they run
        if node.op_type in ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze") and node.input[0] in names:
            names.add(node.output[0])
        elif node.op_type == "Gather" and len(node.input) > 1 and node.input[1] in names and node.input[0] in lengths:
            tables.append(lengths[node.input[0]])
    return min([*tables, _MOST]) if tables else 2
