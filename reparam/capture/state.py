"""What a forward leaves behind on its model.

A graph holds what nodes write into buffers. It does not hold what Python does meanwhile: attributes that are assigned,
lists that grow, counters that are no floating-point buffers. `Memory` finds those and undoes them on the traced copy,
and `answers_alike` runs the model itself, to see whether the second call answers as the first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from reparam.capture.copying import copied
from reparam.inputs import Inputs

CALLS = 3
# In units of the machine precision of the output: a repeated run is nearly always exactly equal.
_ALLOWED = 1024.0
_PLAIN = (bool, int, float, str, bytes)
_CONTAINERS = (dict, OrderedDict, list, set, deque)
_STRUCTURE = ("_parameters", "_buffers", "_modules")


class Memory:
    """The attributes of every module in `root`, as they are now."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = dict(root.named_modules())
        self._before = {name: _attributes(module) for name, module in self._modules.items()}
        self._tensors = {
            (name, key): (value, version(value))
            for name, attributes in self._before.items()
            for key, value in attributes.items()
            if isinstance(value, torch.Tensor)
        }

    @property
    def names(self) -> set[str]:
        """The attributes of the root itself."""
        return set(self._before[""])

    def changed_in(self, name: str) -> str | None:
        """The first attribute of the module `name` that was assigned since."""
        before, now = self._before[name], self._modules[name].__dict__
        for key, value in before.items():
            part = next((now[part] for part in _STRUCTURE if key in now[part]), now)
            if not _same(value, part.get(key, self)):
                return key
        return None

    def replaced(self, names: Iterable[str]) -> list[str]:
        """Which of these tensors (by full name) are others now."""
        found = []
        for full in names:
            name, _, key = full.rpartition(".")
            before = self._before.get(name, {}).get(key, self)
            if before is not self and _attributes(self._modules[name]).get(key) is not before:
                found.append(full)
        return found

    def changed(self, root: nn.Module, written: set[int]) -> list[str]:
        """Full names of what differs now; `written` are the addresses of storages that the graph itself writes to."""
        names = []
        for name, module in self._modules.items():
            now = _attributes(module)
            for key in sorted({*now, *self._before[name]}):
                if not _same(self._before[name].get(key, self), now.get(key, self)):
                    names.append(f"{name}.{key}".lstrip("."))
        for (name, key), (tensor, then) in self._tensors.items():
            if version(tensor) != then and tensor.untyped_storage().data_ptr() not in written:
                names.append(f"{name}.{key}".lstrip("."))
        return list(dict.fromkeys(names))

    def restore(self) -> None:
        """Puts the attributes back; the contents of tensors are not put back."""
        for name, module in self._modules.items():
            state, before = module.__dict__, self._before[name]
            for key in [key for key in state if key not in before and key not in _STRUCTURE]:
                del state[key]
            for part in _STRUCTURE:
                for key in [key for key in state[part] if key not in before]:
                    del state[part][key]
            for key, value in before.items():
                place = next((state[part] for part in _STRUCTURE if key in state[part]), state)
                if type(value) in _CONTAINERS and type(place.get(key)) is type(value):
                    _refill(place[key], value)
                else:
                    place[key] = value


def answers_alike(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a copy of `model`, called again on the same input, returns what it returned before."""
    twin = copied(model).eval()
    first: list[Any] | None = None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for _ in range(CALLS):
            torch.manual_seed(0)
            answer = [_kept(leaf) for leaf in pytree.tree_leaves(inputs.clone().call(twin))]
            if first is not None and not _alike(first, answer):
                return False
            first = first or answer
    return True


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Everything a module holds under a name; containers as copies of one level."""
    held = {key: value for key, value in module.__dict__.items() if key not in _STRUCTURE}
    for part in _STRUCTURE:
        held.update(module.__dict__[part])
    return {key: value.copy() if type(value) in _CONTAINERS else value for key, value in held.items()}


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, fx.Proxy) or isinstance(b, fx.Proxy) or type(a) is not type(b):
        return False
    if isinstance(a, _PLAIN):
        return bool(a == b) or a != a
    if type(a) in (dict, OrderedDict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if type(a) in (list, deque, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if type(a) is set:
        return bool(a == b)
    return False


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)


def version(tensor: torch.Tensor) -> int:
    """How often the tensor was written to, as far as it counts that."""
    return -1 if is_lazy(tensor) or tensor.is_inference() else tensor._version


def _kept(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _alike(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(_alike_leaf, a, b))


def _alike_leaf(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and (not isinstance(a, _PLAIN) or a == b or a != a)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    scale = float(a.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return torch.allclose(a, b, rtol=0.0, atol=_ALLOWED * torch.finfo(a.dtype).eps * scale, equal_nan=True)
