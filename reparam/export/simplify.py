"""onnxsim's simplification of a graph, made in a process of its own, and taken only if it is worth it.

onnxsim is compiled code that runs shape inference and constant folding over whatever it is given: a graph can end its
process or keep it busy for very long. A process of its own with a limit keeps both away from the caller.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from reparam.errors import ExportError
from reparam.export.helper import Helper, HelperError
from reparam.export.proto import weight_bytes

if TYPE_CHECKING:
    import onnx

_HELPER = Helper()
SECONDS, SECONDS_PER_GB = 120.0, 240.0
"""What onnxsim may take: for a small file, and more for each 10^9 bytes of it."""
MOST_BYTES = 1_500_000_000
"""Above this the graph does not fit a message, and onnxsim's own limit, together with what it adds."""
MORE_BYTES, MORE_SHARE = 64 * 1024, 0.05
"""By how much a simplified file may be larger: constants that it computed once take room."""


class NotSimplifiedError(ExportError):
    """onnxsim is not there, failed, or made something that is not taken."""


def simplified(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto | None:
    """What onnxsim makes of the model, with the model's own metadata; None if it has no fewer nodes.

    Args:
        model: with its weights inside; not changed.
        folder: for temporary files.

    Raises:
        NotSimplifiedError: there is no such model, or it is not taken; the message says why.
    """
    import onnx

    if weight_bytes(model) > MOST_BYTES:  # beyond 2 GB the message itself cannot tell its size
        raise NotSimplifiedError("the weights exceed what onnxsim can hold")
    size = model.ByteSize()
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source, target = Path(place) / "model.onnx", Path(place) / "simplified.onnx"
        onnx.save_model(model, str(source))
        _run(source, target, SECONDS + SECONDS_PER_GB * size / 1e9)
        made = onnx.load(str(target))
    if len(made.graph.node) >= len(model.graph.node):
        return None
    if made.ByteSize() > size * (1.0 + MORE_SHARE) + MORE_BYTES:
        raise NotSimplifiedError(
            f"onnxsim's result was dropped, it takes {made.ByteSize():,} bytes instead of {size:,} for "
            f"{len(model.graph.node) - len(made.graph.node)} nodes less"
        )
    if interface(made) != interface(model):
        raise NotSimplifiedError("onnxsim changed the inputs, the outputs or their axes")
    made.producer_name, made.producer_version = model.producer_name, model.producer_version
    del made.metadata_props[:]
    made.metadata_props.extend(model.metadata_props)
    return made


def _run(source: Path, target: Path, seconds: float) -> None:
    """onnxsim from file to file.

    Raises:
        NotSimplifiedError: it is not installed, took too long, crashed, or raised.
    """
    try:
        why = _HELPER.ask([str(source), str(target)], seconds)
    except HelperError as error:
        raise NotSimplifiedError(f"onnxsim {error}") from error
    if why:
        raise NotSimplifiedError(str(why))


def interface(model: onnx.ModelProto) -> list[tuple[str, int, tuple[str, ...]]]:
    """Names, element types and axes of the inputs and outputs."""
    return [
        (
            value.name,
            value.type.tensor_type.elem_type,
            tuple(d.dim_param or str(d.dim_value) for d in value.type.tensor_type.shape.dim),
        )
        for value in [*model.graph.input, *model.graph.output]
    ]
