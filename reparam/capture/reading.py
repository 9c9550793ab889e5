"""How a pickled graph module is read back: torch runs its code once more, to find the graph."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from reparam.capture.calls import functions_of_numbers, traced_calls
from reparam.checks import CHECKS


class _Proxy(fx.Proxy):
    """A proxy that records item assignment and rounding too."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __round__(self, digits: int | None = None) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", round, (self, digits), {})


class ReadingTracer(fx.Tracer):
    """Traces code that was generated from a captured graph: straight lines, in which checks are calls."""

    makes_nodes = True
    """What makes a tensor stood in the graph that the code was written from."""
    executing = False

    def __init__(self) -> None:
        super().__init__(autowrap_functions=(*CHECKS, *functions_of_numbers()))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A proxy for a node."""
        return _Proxy(node, self)

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Traces with calls of sizes alone recorded as well."""
        with traced_calls(self, root if isinstance(root, nn.Module) else nn.Module()):
            return super().trace(root, concrete_args)
