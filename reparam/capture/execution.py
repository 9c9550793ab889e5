"""Running the operations of a forward, one by one, on the values that the example gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from reparam.capture.shapes import stand_in


class ExecutionError(Exception):
    """The model failed on the example inputs while it was traced; `where` is the module that failed."""

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(str(error))
        self.where = where
        self.error = error


class Given:
    """What an operation is given.

    Attributes:
        args, kwargs: with values in place of proxies.
        values: of the nodes among them.
        constant: whether none of the proxies depends on an input.
        of_sizes: whether none of them depends on more of an input than its sizes.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.values: dict[fx.Node, Any] = {}
        self.constant = self.of_sizes = True
        self.args: Any = fx.node.map_aggregate(args, self._value_of)
        self.kwargs: Any = fx.node.map_aggregate(kwargs, self._value_of)

    def _value_of(self, argument: Any) -> Any:
        if not isinstance(argument, fx.Proxy):
            return argument
        traced: Any = argument
        self.values[argument.node] = traced.reparam_value
        self.constant = self.constant and traced.reparam_constant
        self.of_sizes = self.of_sizes and (traced.reparam_constant or traced.reparam_of_sizes)
        return traced.reparam_value


class Execution:
    """Runs operations of one root.

    Args:
        root: the module whose forward they are.
        arguments: the example's arguments, by parameter name of `forward`.
        stored: parameters and buffers of the root, by name.
        compute: whether to compute what `stand_in` knows the shape of.

    Attributes:
        running: whether an operation is being computed.
        drew: whether the last one moved torch's generators, which stand where they stood before.
    """

    def __init__(
        self, root: nn.Module, arguments: Mapping[str, Any], stored: Mapping[str, torch.Tensor], compute: bool
    ) -> None:
        self._root = root
        self._arguments = arguments
        self._stored = stored
        self._compute = compute
        self.running = self.drew = False

    def run(self, kind: str, target: Any, args: Any, kwargs: Any, where: str) -> Any:
        """The value of a node; `where` is the path of the module that the forward is in.

        Raises:
            ExecutionError: the operation fails.
        """
        self.drew = False
        if kind == "placeholder":
            return self._arguments.get(str(target).lstrip("*"))
        if kind == "get_attr":
            return self._stored[target] if target in self._stored else self.attribute(target)
        if kind == "output":
            return None
        self.running = True
        random_states = _random_states()
        try:
            with torch.no_grad():
                return self._called(kind, target, args, kwargs)
        except Exception as error:
            raise ExecutionError(where, error) from error
        finally:
            self.drew = not all(map(torch.equal, random_states, _random_states()))
            torch.set_rng_state(random_states[0])
            if self.drew and len(random_states) > 1:
                torch.cuda.set_rng_state_all(random_states[1:])
            self.running = False

    def attribute(self, target: str) -> Any:
        """What the root holds now under this name, dots between."""
        value: Any = self._root
        for name in target.split("."):
            value = getattr(value, name)
        return value

    def _called(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if kind == "call_function":
            return target(*args, **kwargs)
        module = self._root.get_submodule(target)
        known = None if self._compute else stand_in(module, args, kwargs)
        return module(*args, **kwargs) if known is None else known


def _random_states() -> list[torch.Tensor]:
    """Of torch's own generators, the one of the CPU first."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]
