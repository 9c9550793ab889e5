"""Symbolic tracing beside a real run.

Every proxy carries the value that the example inputs give it. So one pass yields the graph and all shapes, activations
live no longer than in an ordinary forward, and a few questions have an answer while tracing: the rank of a tensor, the
length of a shape, and anything about parameters and buffers. Sizes and values of activations stay symbolic: control
flow on them stops the trace, because it would be frozen to the example.
"""

from __future__ import annotations

import builtins
import operator
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from reparam.capture.captured import TensorInfo
from reparam.capture.shapes import stand_in

View: TypeAlias = "tuple[int, int, tuple[int, ...], tuple[int, ...]]"

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_FACTS = ("ndim", "dtype", "device")
_RANK_CALLS = ("dim", "ndimension", "is_floating_point", "is_complex")


class ExecutionError(Exception):
    """The model failed on the example inputs while it was traced; `where` is the module that failed."""

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(str(error))
        self.where = where
        self.error = error


def require_value(actual: Any, expected: Any, name: str) -> None:
    """Stands in a captured graph where an argument was fixed to the value of the example.

    Raises:
        ValueError: the argument is given another value than the one the graph was captured for.
    """
    if actual is not expected and actual != expected:
        raise ValueError(f"this model was captured for {name}={expected!r} and cannot run with {name}={actual!r}")


def require_length(actual: Any, expected: int) -> None:
    """Stands in a captured graph where the elements of an argument were taken one by one.

    Raises:
        ValueError: the argument has another number of elements than the example had.
    """
    if len(actual) != expected:
        raise ValueError(
            f"this model was captured for {expected} elements in an argument and cannot take {len(actual)}"
        )


class ValueTracer(fx.Tracer):
    """Tracer whose proxies carry values.

    Args:
        root: the module to trace.
        arguments: the example's arguments, by parameter name of `forward`.
        fixed: parameters of `forward` to fix to a value.
        compute: whether to compute what `stand_in` knows the shape of.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, root: nn.Module, arguments: Mapping[str, Any], fixed: Mapping[str, Any], compute: bool = True
    ) -> None:
        super().__init__()
        self._compute = compute
        self._arguments = arguments
        self._fixed = fixed
        self._executing = False
        self._values: dict[str, Any] = {}
        for name, parameter in root.named_parameters():
            self._values.setdefault(name, parameter)
        for name, buffer in root.named_buffers():
            self._values.setdefault(name, buffer)
        self._names = {id(value): name for name, value in reversed(self._values.items())}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ValueProxy(node, self)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> fx.Proxy:
        proxy: Any = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        node: fx.Node = proxy.node
        node.meta["module_path"] = self.scope.module_path
        node.meta["source"] = _user_line()
        used: dict[fx.Node, Any] = {}
        constant: list[bool] = [True]

        def value_of(argument: Any) -> Any:
            if isinstance(argument, fx.Proxy):
                traced: Any = argument
                used[argument.node] = traced.reparam_value
                constant[0] = constant[0] and traced.reparam_constant
                return traced.reparam_value
            return argument

        plain_args = fx.node.map_aggregate(args, value_of)
        plain_kwargs = fx.node.map_aggregate(kwargs, value_of)
        before = {_view(t): other for other, value in used.items() for t in _tensors(value)}
        value = self._execute(kind, target, plain_args, plain_kwargs)
        proxy.reparam_value = value
        proxy.reparam_constant = constant[0] and (kind == "get_attr" or bool(used))
        if isinstance(value, torch.Tensor):
            node.meta["tensor"] = TensorInfo(tuple(value.shape), value.dtype, value.device)
        elif type(value) is int:
            node.meta["number"] = value
        _note_aliases(node, value, before)
        return proxy  # type: ignore[no-any-return]

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._executing else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self._executing or not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self._names.get(id(attr_val))
        if name is None or not (isinstance(attr_val, nn.Parameter) or attr_val.dtype.is_floating_point):
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def to_bool(self, obj: Any) -> bool:
        return bool(obj.reparam_value) if obj.reparam_constant else super().to_bool(obj)

    def iter(self, obj: Any) -> Iterator[Any]:
        value = obj.reparam_value
        if _is_argument(obj) and isinstance(value, (tuple, list)):
            self.create_proxy("call_function", require_length, (obj, len(value)), {})
            return builtins.iter([obj[index] for index in range(len(value))])
        if isinstance(value, torch.Size) or obj.reparam_constant:
            return builtins.iter([obj[index] for index in range(len(value))])
        return super().iter(obj)

    def keys(self, obj: Any) -> Any:
        if _is_argument(obj) and isinstance(obj.reparam_value, dict):
            self.create_proxy("call_function", require_length, (obj, len(obj.reparam_value)), {})
            return list(obj.reparam_value)
        return super().keys(obj)

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn_for_analysis: Any = None) -> Any:
        proxy = super()._proxy_placeholder(name, concrete_args, sig, fn_for_analysis)
        if name not in self._fixed:
            return proxy
        self.create_proxy("call_function", require_value, (proxy, self._fixed[name], name), {})
        return self._fixed[name]

    def _execute(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return self._arguments.get(str(target).lstrip("*"))
        if kind == "get_attr":
            return self._values[target] if target in self._values else _attribute(self.root, target)
        if kind == "output":
            return None
        self._executing = True
        try:
            with torch.no_grad():
                if kind == "call_function":
                    return target(*args, **kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                module = self.root.get_submodule(target)
                known = None if self._compute else stand_in(module, args, kwargs)
                return module(*args, **kwargs) if known is None else known
        except Exception as error:
            raise ExecutionError(self.scope.module_path, error) from error
        finally:
            self._executing = False


class ValueProxy(fx.Proxy):
    """Proxy with the value that the example inputs give it.

    Attributes:
        reparam_value: the value.
        reparam_constant: whether it depends on parameters and buffers only.
    """

    reparam_value: Any = None
    reparam_constant: bool = False

    def __getattr__(self, k: str) -> Any:
        return _attribute_of(self, k)

    def __len__(self) -> int:
        if _is_argument(self) and isinstance(self.reparam_value, (tuple, list, dict)):
            length = len(self.reparam_value)
            self.tracer.create_proxy("call_function", require_length, (self, length), {})
            return length
        if isinstance(self.reparam_value, torch.Size) or self.reparam_constant:
            return len(self.reparam_value)
        return int(super().__len__())

    def __int__(self) -> int:
        return int(self._constant_value())

    def __float__(self) -> float:
        return float(self._constant_value())

    def _constant_value(self) -> Any:
        if not self.reparam_constant:
            raise fx.proxy.TraceError("the value of a traced tensor cannot be turned into a Python number")
        return self.reparam_value


class ValueAttribute(fx.proxy.Attribute):
    """Attribute of a value proxy: a call of a method, or a read that becomes a node when it is used."""

    def __init__(self, root: Any, attr: str) -> None:
        super().__init__(root, attr)
        self._read: Any = None

    @property
    def reparam_value(self) -> Any:
        return getattr(self.root.reparam_value, self.attr)

    @property
    def reparam_constant(self) -> bool:
        return bool(self.root.reparam_constant)

    def __getattr__(self, k: str) -> Any:
        return _attribute_of(self, k)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.attr in _RANK_CALLS and not args and not kwargs and _is_tensor(self.root):
            return getattr(self.root.reparam_value, self.attr)()
        return super().__call__(*args, **kwargs)

    def __len__(self) -> int:
        value: Any = self.reparam_value
        return len(value) if type(value) is torch.Size else int(super().__len__())

    def __eq__(self, other: object) -> Any:
        if self.attr in _FACTS and _is_tensor(self.root):
            return self.reparam_value == getattr(other, "reparam_value", other)
        return super().__eq__(other)

    def __ne__(self, other: object) -> Any:
        if self.attr in _FACTS and _is_tensor(self.root):
            return self.reparam_value != getattr(other, "reparam_value", other)
        return super().__ne__(other)

    __hash__ = fx.proxy.Attribute.__hash__


def _is_argument(proxy: Any) -> bool:
    """Whether it is an argument of the model (`*args` and lists among them), whose structure the example fixes."""
    return not isinstance(proxy, fx.proxy.Attribute) and bool(proxy.node.op == "placeholder")


def _is_tensor(proxy: Any) -> bool:
    return isinstance(proxy.reparam_value, torch.Tensor)


def _attribute_of(proxy: Any, name: str) -> Any:
    value = proxy.reparam_value
    if name == "ndim" and isinstance(value, torch.Tensor):
        return value.ndim
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(name)
    return ValueAttribute(proxy, name)


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    """`x += y` as Python runs it on tensors: in place. A plain proxy would trace `x = x + y` and lose x's aliases."""

    def apply(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow"):
    for _class in (ValueProxy, ValueAttribute):
        setattr(_class, f"__{_name}__", _in_place(getattr(operator, _name)))


def _attribute(root: nn.Module, target: str) -> Any:
    value: Any = root
    for name in target.split("."):
        value = getattr(value, name)
    return value


def _note_aliases(node: fx.Node, value: Any, before: dict[View, fx.Node]) -> None:
    """Storage is compared with that of the inputs only: elsewhere an equal address may be a re-used one."""
    if not before:
        return
    views = [_view(t) for t in _tensors(value)]
    storages = {view[0] for view in views}
    aliases = [other for view, other in before.items() if view[0] in storages]
    if aliases:
        node.meta["aliases"] = tuple(dict.fromkeys(aliases))
        node.meta["same_view_as"] = tuple(other for view, other in before.items() if view in views)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (int, float, str, bool, type(None), torch.Size)):
        return []
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def _view(tensor: torch.Tensor) -> View:
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return (id(tensor), 0, (), ())
    return (tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


def _user_line() -> str | None:
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
