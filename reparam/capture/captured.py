"""`Captured`: a private copy of a model as a graph, with the shapes its example inputs give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reparam.inputs import Inputs


@dataclass(frozen=True)
class TensorInfo:
    """Shape, dtype and device of a tensor in the graph, for the example inputs."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Leaves:
    """What capture does not look into, besides torch's own layers and functions.

    Attributes:
        modules: classes, each for its exact instances.
        functions: Python functions; found where a `forward` calls them by a global name.
    """

    modules: frozenset[type] = frozenset()
    functions: tuple[Callable[..., Any], ...] = ()


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Each graph node carries in `meta`: `module_path` (qualified name of the module whose call it belongs to), `source`
    (`file.py:line` of the user's code, or None), and, where its value is a tensor, `tensor` (a `TensorInfo`). Where the
    value shares storage with inputs of the node, `aliases` names those inputs, and `same_view_as` those that are the
    very same view. Where it is a tensor of literals that the forward made, `exact` is that in float64.

    Attributes:
        root: the private copy that the graph's targets refer to, in eval mode; it shares the parameters of the
            caller's model, which nothing here writes to.
        graph: the captured graph.
        inputs: the example inputs.
        how: `symbolic`; later ways of capture have their own word.
        name: class name of the model.
        notes: what the user should know (for example that the model was in train mode).
    """

    root: torch.nn.Module
    graph: fx.Graph
    inputs: Inputs
    how: str
    name: str
    notes: tuple[str, ...] = ()
