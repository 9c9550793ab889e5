"""What a model returns, flattened: every leaf with the name a user would write for it, and the containers around."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from reparam.errors import InputError
from reparam.inputs import not_dense


@dataclass(frozen=True)
class Flat:
    """A flattened output.

    Attributes:
        leaves: name (`output`, `output[0]`, `output['logits']`, `output.hidden`) to tensor or plain value, in order.
        containers: name to the kind of container that stands there (`tuple`, `dict`, ...).
    """

    leaves: Mapping[str, Any]
    containers: Mapping[str, str]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The leaves that are tensors."""
        return {name: leaf for name, leaf in self.leaves.items() if isinstance(leaf, torch.Tensor)}


def double(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of any real dtype as float64 on the CPU, where outputs are compared."""
    return tensor.detach().to("cpu", torch.float64)


def flatten(value: Any, root: str = "output") -> Flat:
    """Flattens tuples, lists, dicts, named tuples, dataclasses and whatever else is registered with pytree.

    Python floats become float64 tensors of shape []: they are results that are computed, and carry rounding noise.

    Raises:
        InputError: a tensor is sparse or nested.
    """
    leaves: dict[str, Any] = {}
    containers: dict[str, str] = {}
    _walk(value, root, leaves, containers)
    return Flat(leaves, containers)


def identical(a: Flat, b: Flat) -> bool:
    """Whether every leaf of one is the other's, bit for bit, NaN being NaN."""
    if list(a.leaves) != list(b.leaves):
        return False
    for x, y in zip(a.leaves.values(), b.leaves.values(), strict=True):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            if x.shape != y.shape or x.dtype != y.dtype or not bool(((x == y) | ((x != x) & (y != y))).all()):
                return False
        elif type(x) is not type(y) or x != y:
            return False
    return True


def structure_failures(expected: Flat, found: Flat) -> tuple[str, ...]:
    """Sentences on containers and outputs that are missing, extra or of another kind."""
    failures = []
    for name, kind in expected.containers.items():
        other = found.containers.get(name)
        if other is not None and other != kind:
            failures.append(f"{name} is a {other} and should be a {kind}")
        elif other is None and name in found.leaves:
            failures.append(f"{name} is a single {_kind(found.leaves[name])} and should be a {kind}")
    for name, other in found.containers.items():
        if name in expected.leaves:
            failures.append(f"{name} is a {other} and should be a single {_kind(expected.leaves[name])}")
    failures += [
        f"{name} is missing from the candidate's outputs" for name in expected.leaves if name not in found.leaves
    ]
    failures += [f"{name} is an extra output of the candidate" for name in found.leaves if name not in expected.leaves]
    return tuple(failures)


def renamed(found: Flat, expected: Flat) -> Flat:
    """`found` with the names of `expected`, position by position, and its containers: for flat lists of outputs."""
    names = list(expected.leaves)
    names += [f"output #{i}" for i in range(len(names), len(found.leaves))]
    return Flat(dict(zip(names, found.leaves.values(), strict=False)), expected.containers)


def _walk(value: Any, name: str, leaves: dict[str, Any], containers: dict[str, str]) -> None:
    if isinstance(value, torch.Tensor):
        kind = not_dense(value)
        if kind is not None:
            raise InputError(f"{name} is a {kind} tensor, which cannot be compared; return a dense one")
        leaves[name] = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
        return
    if isinstance(value, float):
        leaves[name] = torch.tensor(value, dtype=torch.float64, device="cpu")
        return
    children = _children(value)
    if children is None:
        leaves[name] = value
        return
    kind, items = children
    containers[name] = kind
    for suffix, item in items:
        _walk(item, name + suffix, leaves, containers)


def _children(value: Any) -> tuple[str, list[tuple[str, Any]]] | None:
    """Kind of container and its items with their suffixes; None for a leaf."""
    if isinstance(value, Mapping):
        kind = (
            "dict"
            if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections")
            else _kind(value)
        )
        return kind, [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        fields = getattr(value, "_fields", None)
        suffixes = [f".{field}" for field in fields] if fields else [f"[{i}]" for i in range(len(value))]
        return _kind(value), list(zip(suffixes, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _kind(value), [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    paths, _ = pytree.tree_flatten_with_path(value, is_leaf=lambda node: node is not value)
    if len(paths) == 1 and paths[0][1] is value:
        return None
    return _kind(value), [(pytree.keystr(path), item) for path, item in paths]


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, torch.Tensor) else type(value).__name__
