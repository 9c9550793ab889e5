"""Symbolic tracing beside a real run.

Every proxy carries the value that the example inputs give it. So one pass yields the graph and all shapes, activations
live no longer than in an ordinary forward, and some questions have an answer while tracing: the rank of a tensor, its
type, conditions on sizes, and anything about parameters and buffers. Sizes stay symbolic where they are only computed
with. Values of activations always do: control flow on them stops the trace.

What is answered from the example and could be otherwise on another input is checked when the model runs: ranks,
conditions and loops over sizes, and the structure of arguments that are containers (`checks.py`). What a graph
cannot hold stops the trace: numbers from random generators other than torch's, tensors written to that depend on no
input, another autocast. A node that moved torch's generator when it ran says so: `meta["draws"]`.
"""

from __future__ import annotations

import builtins
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from reparam.capture.aliases import Aliases, Before
from reparam.capture.arguments import check_arguments
from reparam.capture.calls import always_draws, functions_of_numbers, is_factory, traced_calls
from reparam.capture.captured import Leaves, TensorInfo
from reparam.capture.execution import Execution, Given
from reparam.capture.exported import Origins
from reparam.capture.operations import (
    check_containers,
    facts_asked_of,
    is_of_numbers,
    reads_sizes,
    require_not_drawn,
    squeezes,
)
from reparam.capture.proxies import (
    UnfitError,
    ValueProxy,
    is_argument,
    is_from_argument,
    user_line,
)
from reparam.capture.reading import ReadingTracer
from reparam.capture.state import Memory
from reparam.capture.storage import storage_of
from reparam.chance import Generators
from reparam.checks import (
    Guards,
    require_decision,
    require_keys,
    require_length,
    require_number,
    require_rank,
    require_value,
)


class ValueTracer(fx.Tracer):
    """Tracer whose proxies carry values.

    Args:
        root: the module to trace.
        arguments: the example's arguments, by parameter name of `forward`.
        fixed: parameters of `forward` to fix to a value.
        memory: what the root holds before the trace.
        compute: whether to compute what `stand_in` knows the shape of.
        leaves: what not to look into.
        makes_nodes: whether `torch.zeros(4)` becomes a node, so that what is written to it is a part of the graph; else
            it is made once.
        real: whether the forward gets parameters themselves, so that what it computes of them alone is computed once:
            for code that takes no proxy of a parameter. Such code must be kept from writing to them.

    Attributes:
        aliases: what the nodes write to, and are views of.
        read: names of the parameters and buffers whose values decided what was traced.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        root: nn.Module,
        arguments: Mapping[str, Any],
        fixed: Mapping[str, Any],
        memory: Memory,
        compute: bool = True,
        leaves: Leaves = Leaves(),
        makes_nodes: bool = False,
        real: bool = False,
    ) -> None:
        super().__init__(autowrap_functions=(*leaves.functions, *functions_of_numbers()))
        self._leaves = leaves.modules
        self._leaf_functions = leaves.functions
        self._fixed = fixed
        self.aliases = Aliases(root)
        self._execution = Execution(root, arguments, self.aliases.values, compute)
        self._names = {id(value): name for name, value in reversed(self.aliases.values.items())}
        self.read: set[str] = set()
        self._tentative: list[tuple[fx.Node, fx.Node, FrameType, int]] = []
        self._checked: set[fx.Node] = set()
        self._size_reads: set[fx.Node] = set()
        self._rank_checked: set[fx.Node] = set()
        self._autocast = _autocast()
        self._memory = memory
        self._origins = Origins(root)
        self.makes_nodes = makes_nodes
        self._real = real
        self._made: dict[fx.Node, Any] = {}
        self._facts: list[tuple[Any, str | None]] = []

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Traces, leaving the global random state as it was.

        Raises:
            UnfitError: the forward draws random numbers that no input goes into, which a graph would repeat.
        """
        generators = Generators(root)
        try:
            with traced_calls(self, root):
                graph = super().trace(root, concrete_args)
            drawn = generators.moved()
        finally:
            generators.restore()
        if drawn:
            raise UnfitError(f"the forward draws a random number ({drawn[0]}), which the graph would repeat")
        self._check_facts()
        check_arguments(graph, root)
        graph._tracer_cls = ReadingTracer  # for whoever unpickles a module with this graph
        for node in graph.nodes:
            if (getattr(node.target, "__module__", None) or "torch").partition(".")[0] == "torch":
                node.meta.pop("is_wrapped", None)  # else a module made of the graph has `wrap('torch.pow')` in its code
            if isinstance(node.type, str):
                node.type = None  # of a postponed annotation there is only the text, which cannot be pickled as a type
        return graph

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
        if kind not in ("placeholder", "output") and _autocast() != self._autocast:
            raise UnfitError("a graph cannot hold torch.autocast inside of forward")
        if kind == "call_module":
            self._check_module(target, args)
        proxy: Any = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        node: fx.Node = proxy.node
        found = self._origins.find(sys._getframe(1))
        node.meta["module_path"], node.meta["source"] = found or (self.scope.module_path, user_line())
        given = Given(args, kwargs)
        used = given.values
        for other in node.all_input_nodes:
            if other not in used:  # a tensor that is no proxy: an attribute, or made in the forward
                used[other] = self._execution.attribute(str(other.target))
                self.aliases.note_stored(other, used[other])
        self.aliases.require_allowed(target, given.args, given.kwargs)
        check_containers(kind, target, given.args)
        before = Before(target, used)
        value = self._execution.run(kind, target, given.args, given.kwargs, self.scope.module_path)
        written = before.written()
        returned = next((other for other, input_value in used.items() if input_value is value), None)
        if returned is not None and not written and self._returns(kind, target, args, kwargs, returned):
            self.graph.erase_node(node)
            same: fx.Proxy = next(arg for arg in _proxies((args, kwargs)) if arg.node is returned)
            return same
        self.aliases.note_writes(node, written)
        self._note_value(proxy, value, given)
        self.aliases.note_views(node, value, before)
        return proxy  # type: ignore[no-any-return]

    def _note_value(self, proxy: Any, value: Any, given: Given) -> None:
        """Notes what a node has computed, and what that depends on."""
        node: fx.Node = proxy.node
        kind, target = node.op, node.target
        if self._execution.drew or always_draws(target):
            node.meta["draws"] = True
        proxy.reparam_value = value
        if kind == "call_function" and not given.values and is_factory(target):
            self._made[node] = value
        proxy.reparam_constant = given.constant and (kind == "get_attr" or bool(given.values) or node in self._made)
        if reads_sizes(kind, target, given.args):
            self._size_reads.add(node)
        of_sizes = kind in ("call_function", "call_method") and given.of_sizes
        proxy.reparam_of_sizes = (of_sizes or node in self._size_reads) and is_of_numbers(value)
        if kind == "call_module" and type(self.root.get_submodule(str(target))) is Guards:
            node.meta["pinned"] = "it checks the inputs"
        if isinstance(value, torch.Tensor):
            node.meta["tensor"] = TensorInfo(tuple(value.shape), value.dtype, value.device)
        elif type(value) is int:
            node.meta["number"] = value

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if parametrize.is_parametrized(m) and not isinstance(m, nn.RNNBase):
            return type(m).__base__ in self._leaves  # else its weights are computed in the graph, and then only once
        if type(m).__module__.startswith("torch.nn.utils."):
            return False
        if type(m) is Guards or isinstance(m, torch.jit.ScriptModule):
            return True
        return type(m) in self._leaves or super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        # Before any test by type: a proxy passes for an instance of its value's class.
        if isinstance(a, fx.Proxy):
            return a.node
        if type(a) is OrderedDict:  # fx would make a dict of it
            return self.create_node("call_function", OrderedDict, ([self.create_arg(pair) for pair in a.items()],), {})
        return super().create_arg(a)

    def check_rank(self, proxy: Any) -> None:
        """Adds a check wherever the rank of `proxy` may be another one on another input: arguments, and squeezes."""
        pending = [proxy.node]
        while pending:
            node = pending.pop()
            if node in self._rank_checked:
                continue
            self._rank_checked.add(node)
            pending += node.all_input_nodes
            tensor = node.meta.get("tensor")
            if tensor is not None and (is_from_argument(node) or squeezes(node)):
                self.create_node("call_function", require_rank, (node, len(tensor.shape)), {})

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._execution.running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self._execution.running or isinstance(attr_val, fx.Proxy) or not isinstance(attr_val, torch.Tensor):
            return attr_val
        name = self._names.get(id(attr_val))
        if name is None or not (isinstance(attr_val, nn.Parameter) or attr_val.dtype.is_floating_point):
            return attr_val
        if self._real and isinstance(attr_val, nn.Parameter):
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    @property
    def executing(self) -> bool:
        """Whether an operation is being computed, so that what it calls makes no nodes."""
        return self._execution.running

    def to_bool(self, obj: Any) -> bool:
        require_not_drawn(obj)
        if obj.reparam_constant:
            return bool(self.value_read(obj))
        if not obj.reparam_of_sizes:
            return super().to_bool(obj)
        decision = bool(self.value_read(obj))
        self._check(require_decision, obj, decision, user_line())
        return decision

    def number(self, obj: Any) -> Any:
        """The value of a constant proxy, or of one that depends on sizes.

        Raises:
            TraceError: it depends on an activation.
        """
        require_not_drawn(obj)
        if not (obj.reparam_constant or obj.reparam_of_sizes):
            raise fx.proxy.TraceError("the value of a traced tensor cannot be turned into a Python number")
        value = self.value_read(obj)
        if not obj.reparam_constant:
            self._check(require_number, obj, value, user_line())
        return value

    def index(self, obj: Any, caller: FrameType) -> int:
        """`number` for an index; `caller` is the frame that asks for it.

        torch's own functions ask when they are called, and turn to the tracer then: the check is dropped again.
        """
        first = obj.node not in self._checked
        value = operator.index(self.number(obj))
        if first and obj.node in self._checked:
            self._tentative.append((obj.node, next(reversed(self.graph.nodes)), caller, caller.f_lasti))
        return value

    def is_traced(self) -> None:
        """A call becomes a node: what it asked for before was only to see whether its arguments fit."""
        frames = set()
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            frames.add((frame, frame.f_lasti))
            frame = frame.f_back
        while self._tentative:
            asked, check, caller, instruction = self._tentative.pop()
            if (caller, instruction) in frames and check is next(reversed(self.graph.nodes)):
                self.graph.erase_node(check)
                self._checked.discard(asked)

    def note_fact(self, attribute: Any) -> None:
        """The forward reads a dtype or layout, with which it may do what no proxy sees: `kind is torch.half`."""
        self._facts.append((attribute, user_line()))

    def _check_facts(self) -> None:
        """Adds a check of each fact that was read and went into no node: Python alone can have used it."""
        for attribute, line in self._facts:
            if attribute._node is None and not attribute.reparam_constant:
                with self.graph.inserting_after(attribute.root.node):
                    fact = attribute.node
                with self.graph.inserting_after(fact):
                    self._check(require_number, attribute, attribute.reparam_value, line)

    def check_length(self, obj: Any) -> None:
        """Adds a check that a list or tensor has as many elements as in the example."""
        container = is_argument(obj) and not isinstance(obj.reparam_value, torch.Tensor)
        self._check(require_length, obj, len(obj.reparam_value), user_line(), decides=not container)

    def _check(
        self, require: Callable[..., None], obj: Any, expected: Any, line: str | None, decides: bool = True
    ) -> None:
        if obj.node in self._checked:
            return
        self._checked.add(obj.node)
        what = facts_asked_of(obj.node)
        check = self.create_proxy("call_function", require, (obj, expected, line, what), {})
        check.node.meta["decides"] = what if decides else None

    def value_read(self, obj: Any) -> Any:
        """The value of a proxy that depends on no activation; the trace depends on the constants in it.

        Raises:
            TraceError: what was written to one of them meanwhile may depend on an activation.
        """
        pending, seen = [obj.node], set()
        while pending:
            node = pending.pop()
            if node in self._made and storage_of(self._made[node]) in self.aliases.written:
                raise fx.proxy.TraceError("the value of a traced tensor cannot be turned into a Python number")
            if node.op == "get_attr":
                self.read.add(str(node.target))
            seen.add(node)
            if node not in self._size_reads:
                pending += [other for other in node.all_input_nodes if other not in seen]
        return obj.reparam_value

    def iter(self, obj: Any) -> Iterator[Any]:
        value = obj.reparam_value
        if is_argument(obj) and isinstance(value, dict):
            return builtins.iter(self.keys(obj))
        if isinstance(value, torch.Size):
            self.check_rank(obj)
        elif not obj.reparam_constant and isinstance(value, (tuple, list, torch.Tensor)):
            self.check_length(obj)
        elif not obj.reparam_constant:
            return super().iter(obj)
        return builtins.iter([obj[index] for index in range(len(value))])

    def check_members(self, obj: Any) -> None:
        """Adds a check that an argument that is a container has the keys, or as many elements, as in the example."""
        if isinstance(obj.reparam_value, dict):
            self.keys(obj)
        else:
            self.check_length(obj)

    def keys(self, obj: Any) -> Any:
        if is_argument(obj) and isinstance(obj.reparam_value, dict):
            self.create_proxy("call_function", require_keys, (obj, tuple(obj.reparam_value)), {})
            return list(obj.reparam_value)
        return super().keys(obj)

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn_for_analysis: Any = None) -> Any:
        proxy = super()._proxy_placeholder(name, concrete_args, sig, fn_for_analysis)
        if name not in self._fixed:
            return proxy
        self.create_proxy("call_function", require_value, (proxy, self._fixed[name], name), {})
        return self._fixed[name]

    def _returns(self, kind: str, function: Any, args: Any, kwargs: Any, given: fx.Node) -> bool:
        """Whether a Python function that its author has kept whole (`torch.fx.wrap`) only returns what it is given.

        It did so in the example, and does so when it is traced: no value decides it. What it asks of sizes is checked.
        """
        ours = ("torch", "reparam", "_operator", "builtins")
        is_users = isinstance(function, FunctionType) and function.__module__.partition(".")[0] not in ours
        if kind != "call_function" or not is_users or function in self._leaf_functions:
            return False
        last = next(reversed(self.graph.nodes))
        kept = (self._tentative.copy(), self._checked.copy(), self._rank_checked.copy(), self.read.copy())
        facts = self._facts.copy()
        try:
            result: Any = function(*args, **kwargs)
            if issubclass(type(result), fx.Proxy) and result.node is given:
                return True
        except Exception:
            pass  # it decides by values, or is nothing that can be traced
        while next(reversed(self.graph.nodes)) is not last:
            self.graph.erase_node(next(reversed(self.graph.nodes)))
        self._tentative, self._checked, self._rank_checked, self.read = kept
        self._facts = facts
        return False

    def _check_module(self, target: str, args: tuple[Any, ...]) -> None:
        """A call of a module in the graph stands for the module as it is when the model is not running.

        Raises:
            UnfitError: the forward has changed the module before it calls it.
        """
        changed = self._memory.changed_in(target)
        if changed:
            raise UnfitError(
                f"the forward changes {target}.{changed[0]} and then calls {target}; give it its own module"
            )
        module = self.root.get_submodule(target)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise UnfitError(
                f"the forward writes to the parameter {target}.weight (max_norm); renormalise it once and set max_norm "
                "to None"
            )
        if isinstance(module, nn.BatchNorm1d) and args and isinstance(args[0], fx.Proxy):
            self.check_rank(args[0])  # [N, C] and [N, C, L] are both allowed, and mean different things


def _proxies(value: Any) -> list[Any]:
    found: list[Any] = []

    def collect(leaf: Any) -> Any:
        if issubclass(type(leaf), fx.Proxy):
            found.append(leaf)
        return leaf

    fx.node.map_aggregate(value, collect)
    return found


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
