"""`OnnxFile`: what is known about a file that was written. A plain value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any

from reparam.equivalence import Comparison
from reparam.export.leftovers import Leftover


@dataclass(frozen=True)
class OnnxFile:
    """What was written.

    Attributes:
        path: the file; weights beyond 2 GB are beside it in `<path>.data`.
        opset: version of the default operator set.
        nodes: number of nodes by operator type.
        bytes: size on disk, external data included.
        inputs, outputs: names, in order.
        shapes: of each input and output: its axes, a number or the name of an axis that may vary.
        dtypes: of each input and output, as `float32`.
        dynamic_axes: for each input, the axes that may vary and the name of each.
        float16: whether weights and activations are float16 where the module has them in another dtype.
        simplified: whether the file is onnxsim's simplification of the exporter's graph.
        checked: whether onnxruntime ran the file and agreed with the module at every size tried.
        comparison: the file in onnxruntime against the original module; None if not asked, or not possible.
        leftovers: nodes that inference does not need, and why they stay.
        notes: sentences on what was asked for and not achieved, and why.
    """

    path: Path
    opset: int
    nodes: Mapping[str, int]
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    simplified: bool
    checked: bool
    notes: tuple[str, ...] = field(default=())
    shapes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    float16: bool = False
    comparison: Comparison | None = None
    leftovers: tuple[Leftover, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The value as plain JSON types."""
        plain = {one.name: getattr(self, one.name) for one in fields_of(self)}
        return {
            **plain,
            "path": str(self.path),
            "nodes": dict(self.nodes),
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "dynamic_axes": {n: {str(a): s for a, s in axes.items()} for n, axes in self.dynamic_axes.items()},
            "notes": list(self.notes),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "dtypes": dict(self.dtypes),
            "comparison": self.comparison and self.comparison.to_dict(),
            "leftovers": [str(one) for one in self.leftovers],
        }

    def moved(self, path: Path) -> OnnxFile:
        """The value for the same file in another place."""
        return replace(self, path=path)
