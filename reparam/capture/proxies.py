"""Values that stand in for tensors and sizes while a model is traced, and what Python may ask of them.

A `ValueProxy` is a node of the graph with the value that the example inputs give it. What only depends on sizes (and on
parameters) is answered from the example: a condition, a number of repetitions, the elements of a loop. A check in the
graph then stops the captured model on inputs for which the answer would be another one. What depends on the values of
activations stays symbolic, and stops the trace where Python needs it.
"""

from __future__ import annotations

import dis
import operator
import os
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from reparam.capture.asking import asks_in_python
from reparam.checks import require_value

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
# What is the same for every input of a kind; of some the value is asked for, of others it is computed with.
_FACTS = ("dtype", "device", "layout")
_ANSWERS = ("is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_meta", "requires_grad", "itemsize")
READS = ("shape", *_FACTS, *_ANSWERS)
"""What a tensor is, in attributes: nothing of it depends on values."""
_RANK_CALLS = ("dim", "ndimension")
# What a proxy may be assigned.
_OWN = (
    "node",
    "tracer",
    "reparam_value",
    "reparam_constant",
    "reparam_of_sizes",
    "root",
    "attr",
    "_node",
    "_read",
    "__dict__",
)
_OF_DICT = ("get", "keys", "values", "items")


class UnfitError(Exception):
    """The model does something that no graph can hold; the message says what, and what to do instead."""


class WrittenConstantError(UnfitError):
    """The forward makes a tensor without the input, and writes to it: the graph has to make it in every call."""


class _Readable:
    """A number made of sizes that is hashed or written out decides something: its value is asked for, and checked."""

    def __hash__(self) -> int:
        return hash(self._number_or_text()) if _is_number(self) else id(self)

    def __str__(self) -> str:
        return str(self._number_or_text())

    def __format__(self, specification: str) -> str:
        return format(self._number_or_text(), specification)

    def _number_or_text(self) -> Any:
        proxy: Any = self
        return proxy.tracer.number(proxy) if _is_number(proxy) else repr(proxy)


class ValueProxy(_Readable, fx.Proxy):
    """Proxy with the value that the example inputs give it.

    Attributes:
        reparam_value: the value.
        reparam_constant: whether it depends on parameters and buffers only.
        reparam_of_sizes: whether it is made of numbers that depend on sizes of tensors, parameters and buffers only.
    """

    tracer: Any
    reparam_value: Any = None
    reparam_constant: bool = False
    reparam_of_sizes: bool = False

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class of the value: a model that asks `isinstance(x, torch.Tensor)` has to get its answer.

        Compiled code that asks would take the proxy for a tensor and read its memory.
        """
        return type(self.reparam_value) if asks_in_python(sys._getframe(1)) else type(self)

    def __getattr__(self, k: str) -> Any:
        return _attribute_of(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN:
            raise UnfitError(f"a graph cannot hold the assignment of {name!r} to a tensor; write out of place")
        object.__setattr__(self, name, value)

    def __getitem__(self, key: Any) -> Any:
        value = self.reparam_value
        if isinstance(value, (tuple, list, dict)) and type(key) in (int, str, bool):
            try:
                item = value[key]
            except (IndexError, KeyError):
                if is_argument(self):
                    self.tracer.check_members(self)
                raise
            if item is None and not is_argument(self):
                return None
            if item is None or type(item) in (bool, str):
                proxy = self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})
                self.tracer.create_proxy("call_function", require_value, (proxy, item, f"[{key!r}]"), {})
                return item
        return self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if issubclass(type(leaf), fx.Proxy):
                leaf.tracer.is_traced()
                break
        return super().__torch_function__(orig_method, types, args, kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __contains__(self, key: Any) -> bool:
        if is_argument(self) and isinstance(self.reparam_value, dict):
            return key in self.tracer.keys(self)
        return any(item is key or item == key for item in self)

    def __len__(self) -> int:
        value = self.reparam_value
        if isinstance(value, torch.Size):
            self.tracer.check_rank(self)
        elif not self.reparam_constant and isinstance(value, (tuple, list, dict, torch.Tensor)):
            self.tracer.check_length(self)
        return len(value)

    def __int__(self) -> int:
        return int(self.tracer.number(self))

    def __float__(self) -> float:
        return float(self.tracer.number(self))

    def __index__(self) -> int:
        return int(self.tracer.index(self, sys._getframe(1)))

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, digits), {})

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other


class ValueAttribute(_Readable, fx.proxy.Attribute):
    """Attribute of a value proxy: a call of a method, or a read that becomes a node when it is used."""

    tracer: Any

    def __init__(self, root: Any, attr: str) -> None:
        super().__init__(root, attr)
        self._read: Any = None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class of the value, as for `ValueProxy`."""
        return type(self.reparam_value) if asks_in_python(sys._getframe(1)) else type(self)

    def _root_value(self) -> Any:
        return self.root.reparam_value

    @property
    def reparam_value(self) -> Any:
        return getattr(self._root_value(), self.attr)

    @property
    def reparam_constant(self) -> bool:
        return bool(self.root.reparam_constant)

    @property
    def reparam_of_sizes(self) -> bool:
        return self.is_fact() or (self.attr in READS and _is_tensor(self.root))

    def __getattr__(self, k: str) -> Any:
        return _attribute_of(self, k)

    __setattr__ = ValueProxy.__setattr__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.attr == "size" and self.reparam_constant and _is_tensor(self.root):
            return self.root.reparam_value.size(*args, **kwargs)
        if self.attr in _RANK_CALLS and not args and not kwargs and _is_tensor(self.root):
            self.tracer.check_rank(self.root)
            return getattr(self.root.reparam_value, self.attr)()
        if self.attr in _OF_DICT and type(self._root_value()) is dict and is_argument(self.root):
            return self._of_dict(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _of_dict(self, *args: Any) -> Any:
        """`get`, `keys`, `values`, `items` of a dict argument, whose keys the example fixes."""
        argument: Any = self.root
        present = self.tracer.keys(argument)
        if self.attr == "get":
            return argument[args[0]] if args[0] in present else args[1] if len(args) > 1 else None
        if self.attr == "keys":
            return present
        return [argument[key] if self.attr == "values" else (key, argument[key]) for key in present]

    def __len__(self) -> int:
        value: Any = self.reparam_value
        if type(value) is torch.Size:
            self.tracer.check_rank(self.root)
            return len(value)
        return int(super().__len__())

    def is_fact(self) -> bool:
        """Whether it is what every input of a kind has in common: `x.dtype`, `x.device.type`."""
        root: Any = self.root
        return (self.attr in _FACTS and _is_tensor(root)) or (issubclass(type(root), ValueAttribute) and root.is_fact())


def _is_number(proxy: Any) -> bool:
    """Whether it may become a Python value: it depends on no activation, and is none."""
    return bool(proxy.reparam_of_sizes or proxy.reparam_constant) and not _is_tensor(proxy)


def is_argument(proxy: Any) -> bool:
    """Whether it is an argument of the model (`*args` and lists among them) or part of one that is a container."""
    return not isinstance(proxy, fx.proxy.Attribute) and is_from_argument(proxy.node)


def is_from_argument(node: fx.Node) -> bool:
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if "tensor" in node.meta:
            return False
    return node.op == "placeholder"


def _is_tensor(proxy: Any) -> bool:
    return isinstance(proxy.reparam_value, torch.Tensor)


def _attribute_of(proxy: Any, name: str) -> Any:
    value = proxy.reparam_value
    if name == "ndim" and isinstance(value, torch.Tensor):
        proxy.tracer.check_rank(proxy)
        return value.ndim
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(name)
    found = getattr(value, name)
    if name == "shape" and proxy.reparam_constant:
        return found  # no input changes the shape of a parameter
    if found is None:
        return None
    attribute = ValueAttribute(proxy, name)
    if name in ("dtype", "layout") and isinstance(value, torch.Tensor):
        proxy.tracer.note_fact(attribute)
    if name in _FACTS and isinstance(value, torch.Tensor):
        if proxy.reparam_constant:
            return found
        if _asks_for_identity(sys._getframe(2).f_code):
            return proxy.tracer.number(attribute)
    return attribute


@cache
def _asks_for_identity(code: CodeType) -> bool:
    """Whether a function has an `is` other than `is None`: `x.dtype is torch.half` cannot be told from outside."""
    instructions = list(dis.get_instructions(code))
    return any(
        after.opname == "IS_OP" and not (before.opname == "LOAD_CONST" and before.argval is None)
        for before, after in pairwise(instructions)
    )


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    """`x += y` as Python runs it on tensors: in place. A plain proxy would trace `x = x + y` and lose x's aliases."""

    def apply(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow"):
    for _class in (ValueProxy, ValueAttribute):
        setattr(_class, f"__{_name}__", _in_place(getattr(operator, _name)))


def user_line() -> str | None:
    """`file.py:line` of the innermost frame that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        filename = frame.f_code.co_filename
        if filename.startswith(_HERE) and not frame.f_code.co_name.startswith("_") and "/capture/" not in filename:
            return None
        if not filename.startswith((_TORCH, _HERE)):
            return None if filename.startswith("<") else f"{os.path.basename(filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return None
