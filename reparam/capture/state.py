"""What a forward leaves behind on its model.

A graph holds what nodes write into buffers. It does not hold what Python does meanwhile: attributes that are assigned,
lists that grow, counters that are no floating-point buffers. `Memory` finds those and undoes them on the traced copy.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

_PLAIN = (bool, int, float, str, bytes)
_CONTAINERS = (dict, OrderedDict, list, set, deque)
_STRUCTURE = ("_parameters", "_buffers", "_modules")
_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"}


class Memory:
    """What every module in `root` holds: attributes (containers one level deep), parameters, buffers, submodules."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = {
            name: module for name, module in root.named_modules() if not isinstance(module, torch.jit.ScriptModule)
        }
        self._before = {name: _held(module) for name, module in self._modules.items()}
        self._contents: dict[str, dict[str, Any]] = {}
        self._versions: list[tuple[str, torch.Tensor, int]] = []
        for name, held in self._before.items():
            for key, value in held.items():
                if isinstance(value, torch.Tensor):
                    self._versions.append((_full(name, key), value, version(value)))
                elif type(value) in _CONTAINERS:
                    self._contents.setdefault(name, {})[key] = value.copy()

    @property
    def names(self) -> set[str]:
        """The attributes of the root itself."""
        return set(self._before[""])

    def changed_in(self, name: str) -> list[str]:
        """The attributes of the module `name` that are others now."""
        if name not in self._before:
            return []
        before, now, contents = self._before[name], _held(self._modules[name]), self._contents.get(name, {})
        keys = [key for key, value in now.items() if before.get(key, self) is not value]
        keys = [key for key in keys if not _same(before.get(key, self), now[key])]
        keys += [key for key in before if key not in now]
        return keys + [key for key, value in contents.items() if key not in keys and not _same(value, now[key])]

    def replaced(self, names: Iterable[str]) -> list[str]:
        """Which of these tensors (by full name) are others now."""
        found = []
        for full in names:
            name, _, key = full.rpartition(".")
            before = self._before.get(name, {}).get(key, self)
            if before is not self and _held(self._modules[name]).get(key) is not before:
                found.append(full)
        return found

    def changed(self, written: set[int]) -> list[str]:
        """Full names of what differs now; `written` are the addresses of storages that the graph itself writes to."""
        names = [_full(name, key) for name in self._modules for key in self.changed_in(name)]
        for full, tensor, then in self._versions:
            if version(tensor) != then and tensor.untyped_storage().data_ptr() not in written:
                names.append(full)
        return list(dict.fromkeys(names))

    def restore(self) -> None:
        """Puts the attributes back; the contents of tensors are not put back."""
        for name, module in self._modules.items():
            for key in self.changed_in(name):
                place = _place(module, key)
                if key not in self._before[name]:
                    del place[key]
                    continue
                place[key] = value = self._before[name][key]
                if key in self._contents.get(name, {}):
                    _refill(value, self._contents[name][key])


def _full(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _held(module: nn.Module) -> dict[str, Any]:
    """Everything a module holds under a name; its own bookkeeping (hooks) left out."""
    state = module.__dict__
    held = {key: value for key, value in state.items() if key not in _BOOKKEEPING}
    held.update(state["_parameters"])
    held.update(state["_buffers"])
    held.update(state["_modules"])
    return held


def _place(module: nn.Module, key: str) -> dict[str, Any]:
    state = module.__dict__
    return next((state[part] for part in _STRUCTURE if key in state[part]), state)


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
