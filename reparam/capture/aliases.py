"""Which memory the nodes of a graph write to, and which of them are views of the same.

Both are seen when the nodes are run on the example: `meta["writes"]`, `meta["aliases"]` and `meta["same_view_as"]` hold
the other nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from reparam.capture.operations import (
    PERHAPS_VIEW,
    SAME_VIEW,
    SAME_VIEW_MODULES,
    WRITES_UNCOUNTED,
    names_a_write,
    renormalises,
)
from reparam.capture.proxies import UnfitError, WrittenConstantError
from reparam.capture.state import version
from reparam.capture.storage import fingerprint_of, storage_of, tensors_in, view_of


class Aliases:
    """Those of one graph.

    Attributes:
        values: parameters and buffers of the root, by name.
        written: storages (their addresses) that nodes of the graph write to.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self.values: dict[str, torch.Tensor] = {}
        for name, value in (*root.named_parameters(), *root.named_buffers()):
            self.values.setdefault(name, value)
        self._parameters = {storage_of(parameter): name for name, parameter in root.named_parameters()}
        self.written: set[int] = set()
        self._stored: dict[int, fx.Node] = {}

    def is_written(self, name: str) -> bool:
        """Whether a node writes to the storage of this parameter or buffer."""
        value = self.values.get(name)
        return value is not None and storage_of(value) in self.written

    def require_allowed(self, target: Any, args: Any, kwargs: Any) -> None:
        """Stops the trace before an operation writes to a parameter, which is the caller's own.

        Raises:
            UnfitError: the operation does that.
        """
        if renormalises(target, args, kwargs):
            written = tensors_in((args[1:2], kwargs.get("weight")))
            instead = "renormalise it once and set max_norm to None"
        elif names_a_write(target, kwargs):
            written = tensors_in((args[:1], kwargs.get("input"), kwargs.get("out")))
            instead = "do that once before, and leave it out of the forward"
        else:
            return
        for tensor in written:
            name = self._parameters.get(storage_of(tensor))
            if name is not None:
                raise UnfitError(f"the forward writes to the parameter {name}; {instead}")

    def note_writes(self, node: fx.Node, written: Sequence[tuple[fx.Node, torch.Tensor]]) -> None:
        """Notes which of its inputs a node wrote to.

        Raises:
            WrittenConstantError: a tensor that is no parameter, buffer or activation. It is made once, when the model
                is traced, and not in every call.
        """
        for other, tensor in written:
            self.written.add(storage_of(tensor))
            if other.op == "get_attr" and other.target not in self.values:
                raise WrittenConstantError(
                    "a tensor that does not depend on the input is written to in place; make it from the input "
                    "(x.new_zeros), register it as a buffer, or write the sum out of place"
                )
        if written:
            node.meta["writes"] = tuple(dict.fromkeys(other for other, _ in written))

    def note_stored(self, node: fx.Node, value: Any) -> None:
        """Two reads of tensors of the model that share a storage are aliases, though neither is made from the other."""
        for tensor in tensors_in(value):
            first = self._stored.setdefault(storage_of(tensor), node)
            if first is not node:
                node.meta["aliases"] = (first,)

    def note_views(self, node: fx.Node, value: Any, before: Before) -> None:
        """Storage is compared with that of the inputs only: elsewhere an equal address may be a re-used one."""
        if node.op == "get_attr":
            self.note_stored(node, value)
            return
        views = [view_of(t) for t in tensors_in(value)]
        storages = {view[0] for view in views}
        aliases = [other for view, other in before.views.items() if view[0] in storages]
        if not aliases and self._is(node, PERHAPS_VIEW, (nn.Flatten,)):
            aliases = node.all_input_nodes[:1]
        if aliases:
            node.meta["aliases"] = tuple(dict.fromkeys(aliases))
        if aliases and ("writes" in node.meta or self._is(node, SAME_VIEW, SAME_VIEW_MODULES)):
            node.meta["same_view_as"] = tuple(other for view, other in before.views.items() if view in views)

    def _is(self, node: fx.Node, names: tuple[str, ...], modules: tuple[type, ...]) -> bool:
        """Whether a node is a call of one of these methods or functions (by name) or modules."""
        if node.op == "call_module":
            return isinstance(self._root.get_submodule(str(node.target)), modules)
        if node.target is getattr:
            return node.args[1] in names
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return name.rstrip("_123d") in names or name in names


class Before:
    """What the inputs of an operation are before it runs.

    Args:
        target: the operation.
        used: its inputs, by the node that made them.

    Attributes:
        views: the node that made it, by the view that a tensor is.
    """

    def __init__(self, target: Any, used: Mapping[fx.Node, Any]) -> None:
        self._seen: Callable[[torch.Tensor], Any] = (
            fingerprint_of if getattr(target, "__name__", "") in WRITES_UNCOUNTED else version
        )
        tensors = [(other, t) for other, value in used.items() for t in tensors_in(value)]
        self.views = {view_of(t): other for other, t in tensors}
        self._versions = [(other, t, self._seen(t)) for other, t in tensors]

    def written(self) -> list[tuple[fx.Node, torch.Tensor]]:
        """Which of them have been written to since."""
        return [(other, t) for other, t, then in self._versions if self._seen(t) != then]
