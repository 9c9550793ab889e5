"""Fusing a model in parts: the user's own classes stay, and what can be captured inside of them is fused in place.

This is for a model whose own forward cannot be captured, and for who asks for it. From the top down: a child that can
be captured is replaced by its fused form; of one that cannot, the children are tried. Every child is fused for the
arguments with which the model calls it, and is only replaced if it answers all these calls as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from reparam.capture.agreement import answers_alike
from reparam.capture.trace import private_copy
from reparam.errors import CaptureError, OtherInputError, ReparamError, UnfitModelError
from reparam.graph.build import float64_copy, float64_twin, unshared
from reparam.inputs import Inputs, cannot_run
from reparam.passes.ledger import Ledger, kept_in
from reparam.piece import Piece


class NothingCapturedError(Exception):
    """No part of the model can be captured."""


Call = tuple[Inputs, Any, Inputs]
"""Arguments, result, and the arguments after the call."""
FuseOne = Callable[[str, nn.Module, Inputs], Piece]
"""Fuses a part that has a qualified name, for the arguments of a call of it."""
_PLAIN = (bool, int, float, str, type(None), tuple, torch.dtype, torch.device)
_MOST_CALLS = 16
_TOLERANCE = 1e-3
"""Largest error of a part, relative to its largest value, that may be rounding; the whole is verified afterwards."""


class FusedPart(nn.Module):
    """A fused part of a model: passes for an instance of the class that it replaces, and has its plain attributes.

    What is left of the layers inside is not what it was, so asking for them (`model.part.conv.weight`) is an error,
    also where Python would only look whether they are there.

    Args:
        fused: the fused module.
        original: what it stands for; only its class, its plain attributes and the names of all others are kept.
    """

    def __init__(self, fused: fx.GraphModule, original: nn.Module) -> None:
        super().__init__()
        self.fused = fused
        state = vars(original)
        self._stands_for = type(original)
        self._plain = {
            name: value for name, value in state.items() if isinstance(value, _PLAIN) and name not in vars(self)
        }
        inside = {name for key in ("_parameters", "_buffers", "_modules") for name in state[key]}
        of_class = {name for name in dir(type(original)) if not name.startswith("__")}  # Python asks for those itself
        self._gone = frozenset({*inside, *state, *of_class} - {*self._plain, *dir(nn.Module), *vars(self)})
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module that it stands for."""
        return self.fused(*args, **kwargs)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return self.__dict__.get("_stands_for") or type(self)

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__
        if name in state.get("_plain", ()):
            return state["_plain"][name]
        if name in state.get("_gone", ()) and name not in state["_modules"]:
            raise OtherInputError(
                f"{state['_stands_for'].__name__}.{name} is asked for and not there: this part of the model was fused "
                "for an example in which nothing asked for it"
            )
        return super().__getattr__(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _bare_part, (), dict(vars(self))


def _bare_part() -> FusedPart:
    return FusedPart.__new__(FusedPart)


@dataclass(frozen=True)
class Outside:
    """A module that was left as it is, with the children it calls.

    Attributes:
        path: its qualified name; empty for the model itself.
        kind: its class.
        why: what stopped its capture.
    """

    path: str
    kind: str
    why: str

    def __str__(self) -> str:
        return f"{self.path or 'the model itself'} ({self.kind}) stays as it is: {self.why}"


@dataclass
class Assembled:
    """A model some parts of which are fused.

    Attributes:
        module: a copy of the model that shares nothing with it.
        parts: the fused parts by qualified name.
        outside: what stays as it is.
    """

    module: nn.Module
    parts: dict[str, Piece] = field(default_factory=dict)
    outside: list[Outside] = field(default_factory=list)

    def float64(self) -> nn.Module:
        """A copy in float64, its parts with weights as they were before they were rounded."""
        twin = float64_copy(self.module)
        for path, piece in self.parts.items():
            twin.get_submodule(path).fused = float64_twin(piece.module)
        return twin


def assembled(model: nn.Module, inputs: Inputs, fuse_one: FuseOne, why: str, *, verified: bool = True) -> Assembled:
    """Fuses the parts of `model`, which stays as it is because of `why`.

    Args:
        verified: whether the whole is verified afterwards; if it is, a part that a rewrite made wrong is left for that
            to find.

    Raises:
        InputError: the model cannot run on the inputs.
        UnfitModelError: it answers the same input otherwise when it is called again.
        NothingCapturedError: no part of it can be captured.
    """
    try:
        alike = answers_alike(model, inputs)
    except ReparamError:
        raise
    except Exception as error:
        raise cannot_run(error, inputs, type(model).__name__) from error
    if not alike:
        raise UnfitModelError(
            f"{type(model).__name__} answers the same input otherwise when it is called again, so what is fused cannot "
            "be compared with it; make it a function of its input"
        )
    found = Assembled(private_copy(model))
    found.outside.append(Outside("", type(model).__name__, why))
    _Assembler(found, inputs, fuse_one, verified).descend(found.module, "")
    if not found.parts:
        raise NothingCapturedError
    found.module = unshared(found.module, model)
    _restore_buffers(found.module, model)
    return found


@torch.no_grad()
def _restore_buffers(module: nn.Module, model: nn.Module) -> None:
    """Undoes what running the model has written into its buffers."""
    theirs = dict(model.named_buffers())
    for name, buffer in module.named_buffers():
        if name in theirs and buffer.shape == theirs[name].shape and buffer.dtype == theirs[name].dtype:
            buffer.copy_(theirs[name])


@dataclass
class _Assembler:
    found: Assembled
    inputs: Inputs
    fuse_one: FuseOne
    verified: bool
    done: dict[int, nn.Module | None] = field(default_factory=dict)

    def descend(self, owner: nn.Module, prefix: str, *, runs: bool = True) -> None:
        """Fuses the children of a module that stays; `runs` is whether the example calls it."""
        children = {f"{prefix}{name}": child for name, child in owner._modules.items() if child is not None}
        for path in [path for path, child in children.items() if isinstance(child, torch.jit.ScriptModule)]:
            why = "it is compiled (TorchScript)"
            self.found.outside.append(Outside(path, children.pop(path).original_name, why))  # type: ignore[arg-type]
        calls = self._calls(children)
        replaced: dict[str, nn.Module] = {}
        below: list[tuple[str, nn.Module, bool]] = []
        for path, child in children.items():
            if self._is_single(child):
                continue
            if id(child) not in self.done:
                self.done[id(child)] = self._fused(path, child, calls[path])
                if not calls[path] and runs and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                    why = "the example does not run it, or not by calling it"
                    self.found.outside.append(Outside(path, type(child).__name__, why))
            part = self.done[id(child)]
            if part is None:
                below.append((path, child, bool(calls[path]) or isinstance(child, (nn.ModuleList, nn.ModuleDict))))
            else:
                self.found.module.set_submodule(path, part)
                replaced[path] = child
        below += [(path, child, True) for path, child in self._undo_what_breaks(replaced)]
        for path, child, called in below:
            self.descend(child, f"{path}.", runs=called)

    def _is_single(self, child: nn.Module) -> bool:
        """Whether there is nothing in it that could be fused: a layer of torch by itself."""
        return not any(True for _ in child.children()) and type(child).__module__.startswith("torch.nn.")

    def _fused(self, path: str, child: nn.Module, calls: list[Call]) -> nn.Module | None:
        if not calls:
            return None
        try:
            piece = self._answering(path, child, calls)
        except ReparamError as error:
            why = str(error).partition("; rewrite that line")[0]
            self.found.outside.append(Outside(path, type(child).__name__, why))
            return None
        self.found.parts[path] = piece
        return FusedPart(piece.module, child)

    def _answering(self, path: str, child: nn.Module, calls: list[Call]) -> Piece:
        """A part, fused, that answers its calls as before.

        Raises:
            ReparamError: it cannot be captured, or answers otherwise.
        """
        piece = self.fuse_one(path, child, calls[0][0])
        try:
            _check_all(piece, calls)
        except CaptureError:
            if not piece.rewrites:
                raise
            with kept_in(Ledger(most=0)):
                _check_all(self.fuse_one(path, child, calls[0][0]), calls)
            # As captured it answers right, so that a rewrite is at fault. Verification says which one, and undoes it.
            if not self.verified:
                raise CaptureError(
                    "a rewrite of it is at fault; fuse with verification, which says which one"
                ) from None
        return piece

    def _calls(self, modules: Mapping[str, nn.Module]) -> dict[str, list[Call]]:
        """The modules' calls while the model runs, one of each kind."""
        found: dict[str, list[Call]] = {path: [] for path in modules}
        seen: dict[str, set[str]] = {path: set() for path in modules}
        given: dict[str, list[Inputs]] = {path: [] for path in modules}
        handles = []

        def before(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                given[path].append(Inputs(args, kwargs).clone())

            return hook

        def after(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
                inputs = given[path].pop()
                signature = _signature(inputs)
                if signature not in seen[path] and len(found[path]) < _MOST_CALLS:
                    seen[path].add(signature)
                    clones = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), result)
                    found[path].append((inputs, clones, Inputs(args, kwargs).clone()))

            return hook

        for path, module in modules.items():
            handles += [
                module.register_forward_pre_hook(before(path), with_kwargs=True),
                module.register_forward_hook(after(path), with_kwargs=True),
            ]
        try:
            self._run()
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _run(self) -> None:
        try:
            with torch.random.fork_rng(devices=[]):
                self.inputs.call(self.found.module)
        except OtherInputError:
            raise
        except Exception as error:
            raise cannot_run(error, self.inputs, type(self.found.module).__name__) from error

    def _undo_what_breaks(self, replaced: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
        """Puts back children without whose insides the model does not run; returns them."""
        undone = []
        for path, child in replaced.items():
            try:
                self._run()
                break
            except Exception as error:
                self.found.module.set_submodule(path, child)
                self.done[id(child)] = None
                del self.found.parts[path]
                why = f"what calls it needs more of it than its result ({error})"
                self.found.outside.append(Outside(path, type(child).__name__, why))
                undone.append((path, child))
        return undone


def _signature(inputs: Inputs) -> str:
    """What tells calls apart: shapes and dtypes of tensors, and plain values."""
    leaves, spec = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
    words = [f"{tuple(v.shape)} {v.dtype}" if isinstance(v, torch.Tensor) else repr(v) for v in leaves]
    return f"{spec} {words}"


def _check_all(piece: Piece, calls: list[Call]) -> None:
    for inputs, expected, left in calls:
        _check(piece.module, inputs, expected, left)


def _check(module: nn.Module, inputs: Inputs, expected: Any, left: Inputs) -> None:
    """Raises `CaptureError` if a fused part answers a recorded call otherwise than the original did.

    What the original wrote into its arguments (`left` is how it left them), the model may read afterwards.
    """
    fresh = inputs.clone()
    try:
        with torch.no_grad():
            actual = module(*fresh.args, **fresh.kwargs)
    except OtherInputError as error:
        raise CaptureError(f"the model calls it in several ways ({error})") from error
    leaves, spec = pytree.tree_flatten(expected)
    found, found_spec = pytree.tree_flatten(actual)
    if spec != found_spec:
        raise CaptureError("its result has another structure once it is captured")
    for a, b in zip(leaves, found, strict=True):
        if isinstance(a, torch.Tensor):
            if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype or not _close(a, b):
                raise CaptureError("it answers otherwise once it is captured")
        elif a != b:
            raise CaptureError("it answers otherwise once it is captured")
    if not all(_close(a, b) for a, b in zip(left.tensors(), fresh.tensors(), strict=True)):
        raise CaptureError("it writes to its arguments, which its fused form does not")


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    if not a.numel():
        return True
    loose = _TOLERANCE * (100 if a.dtype in (torch.float16, torch.bfloat16) else 1)
    return bool(torch.allclose(a.double(), b.double(), rtol=0, atol=loose * float(a.double().abs().max()) + 1e-30))
