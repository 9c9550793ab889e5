"""Where the forward of a model draws random numbers, found by running it.

For models that no graph could be captured of; in a graph the nodes know it themselves (`meta["draws"]`). Operations of
torch are watched where they are dispatched. Python's and numpy's generators are looked at after every line of the
user's code, as nothing announces a draw from them. The run ends where it would write to a parameter, which is shared.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from reparam.chance import Draw, Generators
from reparam.copying import twin_of
from reparam.inputs import Inputs

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_PYTHON = os.path.dirname(os.__file__) + os.sep
_MOST = 1000


def find_draws(model: nn.Module, inputs: Inputs) -> tuple[Draw, ...]:
    """The places where a copy of `model` in eval mode draws random numbers on these inputs, in order.

    A model that cannot run on the inputs draws as far as it runs. All generators are left as they were.
    """
    before = Generators()
    try:
        twin = twin_of(model)
        own = Generators(twin)
        watch = _Watch(twin)
        with watch:
            _attempt(twin, inputs)
        others = [name for name in own.moved() if not name.startswith("torch")]
        watched = {draw.what for draw in watch.found} | {name for name in others if watch.given}
        others = [name for name in others if name not in watched]
        if others or (own.moved() and not watch.found):
            watch.found += _by_line(twin_of(model), inputs) or [Draw(name) for name in others]
        return tuple(dict.fromkeys(watch.found))
    except Exception:
        return ()  # it cannot even be copied, which is for others to say
    finally:
        before.restore()


def failure(model: nn.Module, inputs: Inputs) -> Exception | None:
    """What a copy of `model` in eval mode raises on these inputs."""
    before = Generators()
    try:
        with _Guard(model):
            inputs.call(twin_of(model))
    except _WouldWriteError:
        return None
    except Exception as error:
        return error
    finally:
        before.restore()
    return None


def _attempt(model: nn.Module, inputs: Inputs) -> None:
    try:
        inputs.call(model)
    except Exception:
        return


class _WouldWriteError(Exception):
    """The model is about to write to a parameter."""


class _Guard(TorchDispatchMode):
    """Ends the run before an operation writes to a parameter of `root`."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self._parameters = {_storage(parameter) for parameter in root.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for index, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                written = args[index] if index < len(args) else kwargs.get(argument.name)
                tensors = [t for t in pytree.tree_leaves(written) if isinstance(t, torch.Tensor)]
                if any(_storage(tensor) in self._parameters for tensor in tensors):
                    raise _WouldWriteError
        return self.call(func, args, kwargs)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation."""
        return func(*args, **kwargs)


def _storage(tensor: torch.Tensor) -> int:
    strided = tensor.layout is torch.strided and not is_lazy(tensor)
    return tensor.untyped_storage().data_ptr() if strided else id(tensor)


class _Watch(_Guard):
    """Notes which operations draw. `given` is whether some drew from a generator that they were given."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self.found: list[Draw] = []
        self.given = False
        self._names = _names(root)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation, and looks whether it draws."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        before = torch.get_rng_state()
        result = func(*args, **kwargs)
        on_cpu = all(t.device.type == "cpu" for t in (*args, result) if isinstance(t, torch.Tensor))
        if generator is not None or not on_cpu or not torch.equal(before, torch.get_rng_state()):
            self.given = self.given or generator is not None
            if len(self.found) < _MOST:
                self.found.append(_draw(func.overloadpacket.__name__, sys._getframe(1), self._names))
        return result


def _by_line(model: nn.Module, inputs: Inputs) -> list[Draw]:
    """Draws from generators other than torch's, by the line of the user's code after which they had moved."""
    names = _names(model)
    found: list[Draw] = []
    states = [Generators(model)]
    last: list[FrameType | None] = [None]
    line = [0]

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        if not _is_users(frame.f_code.co_filename):
            return None
        moved = [name for name in states[0].moved() if not name.startswith("torch")]
        if moved and last[0] is not None:
            found.extend(_draw(name, last[0], names, line[0]) for name in moved)
        if states[0].moved():
            states[0] = Generators(model)
        last[0], line[0] = frame, frame.f_lineno
        return look

    with _Guard(model), _tracing(look):
        _attempt(model, inputs)
    return found


@contextmanager
def _tracing(function: Any) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(function)
    try:
        yield
    finally:
        sys.settrace(before)


def _names(root: nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in root.named_modules()}


def _is_users(file: str) -> bool:
    """Whether a file is neither torch's, Python's or numpy's, nor ours."""
    if file.startswith((_TORCH, _HERE, "<")) or f"{os.sep}numpy{os.sep}" in file:
        return False
    return not file.startswith(_PYTHON) or f"{os.sep}site-packages{os.sep}" in file


def _draw(what: str, frame: FrameType | None, names: dict[int, str], line: int | None = None) -> Draw:
    """A draw at a frame: the module whose method runs there, and the user's own line."""
    module: nn.Module | None = None
    source: str | None = None
    while frame is not None and (module is None or source is None):
        file, owner = frame.f_code.co_filename, frame.f_locals.get("self")
        if source is None and _is_users(file):
            source = f"{os.path.basename(file)}:{line or frame.f_lineno}"
        elif source is None and file.startswith(_TORCH) and "functional" in file:
            what = frame.f_code.co_name  # dropout, and not the bernoulli_ in it
        if module is None and isinstance(owner, nn.Module) and id(owner) in names:
            module = owner
        frame = frame.f_back
    if module is None:
        return Draw(what, source=source)
    return Draw.of(what, names[id(module)], module, source)


__all__ = ["find_draws"]
