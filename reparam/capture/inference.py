"""What modules are at inference, where their own eval mode does not say it.

    f(x) at inference  :=  x,  c * x,  or another module    (noise, DropBlock and their like without a `training` check)

Said for one call by a mapping, from a class, a class name or a qualified name, or for a family by registering it. The
model with what was said put in place is the reference for everything after: it is captured, and the result is compared
with it.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import nn

from reparam.copying import copied
from reparam.errors import InputError

Form: TypeAlias = "str | float | nn.Module | Callable[[nn.Module], Any]"
Name: TypeAlias = "str | type[nn.Module]"
Maker = TypeVar("Maker", bound="Callable[[nn.Module], Any]")
IDENTITY = "identity"
_PLAIN = (bool, int, float, str, type(None))
_NEAR = 5


@dataclass(frozen=True)
class Said:
    """One module that was replaced.

    Attributes:
        path, kind: its qualified name and class.
        form: what it is at inference, in words; empty for nothing at all.
    """

    path: str
    kind: str
    form: str


class AtInference(nn.Module):
    """`factor * x` of the first argument; others are ignored. It has the plain attributes of what it replaces."""

    def __init__(self, factor: float, original: nn.Module) -> None:
        super().__init__()
        for name, value in vars(original).items():
            if isinstance(value, _PLAIN) and name not in vars(self):
                setattr(self, name, value)
        self._reparam_factor = factor

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The scaled first argument, or the argument itself for a factor of 1."""
        value: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
        return value if self._reparam_factor == 1 else value * self._reparam_factor


class _Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._reparam_function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._reparam_function(*args, **kwargs)


def in_inference_form(model: nn.Module, forms: Mapping[Name, Form] | None) -> tuple[nn.Module, tuple[Said, ...]]:
    """The model with its modules replaced by what they are at inference, and what was replaced.

    It is `model` itself if nothing is; else a copy that shares the parameters. What `forms` says goes before what is
    registered, a qualified name before a class, and an outer module before those inside of it.

    Raises:
        InputError: a name fits no module, a form cannot be used, or a module cannot be replaced.
    """
    if forms is not None and not isinstance(forms, Mapping):
        raise InputError(f"inference_form={forms!r} must be a dict, such as {{'DropBlock2d': 'identity'}}")
    forms = dict(forms or {})
    for name, form in forms.items():
        _check_name(name)
        _check_form(form, _text(name))
    found = list(_matches(model, forms))
    _require_all_known(model, forms, found)
    if not found:
        return model, ()
    try:
        twin = copied(model)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({error}), so inference_form cannot be used"
        ) from error
    made: dict[int, nn.Module] = {}
    said = []
    for path, form in found:
        owner, _, key = path.rpartition(".")
        original = twin.get_submodule(path)
        if id(original) not in made:
            made[id(original)] = _replacement(original, form, path).train(original.training)
        replacement = made[id(original)]
        said.append(Said(path, type(model.get_submodule(path)).__name__, _words(replacement)))
        twin.get_submodule(owner)._modules[key] = replacement
    return twin, tuple(said)


def _matches(model: nn.Module, forms: Mapping[Name, Form]) -> Iterator[tuple[str, Form]]:
    inside: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if any(path.startswith(outer) for outer in inside):
            continue
        form = _form_of(path, module, forms)
        if form is None:
            continue
        if not path:
            raise InputError(
                f"{type(model).__name__} is the model itself, which inference_form cannot replace; name what is in it"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise InputError(f"{path} has forward hooks, which its inference form would lose; remove the hooks first")
        inside.append(f"{path}.")
        yield path, form


def _form_of(path: str, module: nn.Module, forms: Mapping[Name, Form]) -> Form | None:
    if path in forms:
        return forms[path]
    names = [type(module), *_class_names(type(module))]
    for name in names:
        if name in forms:
            return forms[name]  # type: ignore[index]
    for entry in reversed(_REGISTERED):
        if entry.fits(type(module)):
            return entry.form
    return None


def _class_names(cls: type) -> tuple[str, str]:
    return f"{cls.__module__}.{cls.__qualname__}", cls.__name__


def _require_all_known(model: nn.Module, forms: Mapping[Name, Form], found: list[tuple[str, Form]]) -> None:
    used = {path for path, _ in found}
    for path in list(used):
        cls = type(model.get_submodule(path))
        used |= {cls, *_class_names(cls)}  # type: ignore[arg-type]
    for name in forms:
        if name in used:
            continue
        modules = dict(model.named_modules(remove_duplicate=False))
        present = {type(module) for module in modules.values()}
        if name in modules or name in present or any(name in _class_names(cls) for cls in present):
            raise InputError(
                f"inference_form names {_text(name)}, which lies inside of another that it names; drop one"
            )
        wanted = _text(name)
        known = [*dict.fromkeys(cls.__name__ for cls in present), *filter(None, modules)]
        lower = {one.lower(): one for one in reversed(known)}
        near = [lower[one] for one in difflib.get_close_matches(wanted.lower(), lower, _NEAR, 0.5)]
        inside = [one for one in known if wanted.lower() in one.lower() and one not in near]
        near = (near + inside)[:_NEAR]
        classes = sorted({cls.__name__ for cls in present if not cls.__module__.startswith("torch.nn.")})[:_NEAR]
        instead = f"near it are {', '.join(near)}" if near else f"its own classes are {', '.join(classes)}"
        if not (near or classes):
            instead = "name one of its named_modules()"
        missing = f"{type(model).__name__} has no module and no class of that name"
        raise InputError(f"inference_form names {wanted}, and {missing}; {instead}")


def _replacement(original: nn.Module, form: Form, path: str) -> nn.Module:
    if isinstance(form, nn.Module):
        return copy.deepcopy(form)
    if form == IDENTITY:
        return AtInference(1.0, original)
    if isinstance(form, (int, float)) and not isinstance(form, bool):
        return AtInference(float(form), original)
    try:
        made = form(copied(original).eval())  # type: ignore[operator]
    except Exception as error:
        raise InputError(f"the inference form of {path} fails: {type(error).__name__}: {error}") from error
    if isinstance(made, nn.Module):
        return made
    if isinstance(made, (str, int, float)):
        _check_form(made, path)
        return _replacement(original, made, path)
    if callable(made):
        return _Called(made)
    raise InputError(f"the inference form of {path} must be a module, a function, a number or 'identity', not {made!r}")


def _words(replacement: nn.Module) -> str:
    if isinstance(replacement, AtInference):
        return "" if replacement._reparam_factor == 1 else f"scale by {replacement._reparam_factor:g}"
    if isinstance(replacement, _Called):
        return str(getattr(replacement._reparam_function, "__name__", "a function"))
    return type(replacement).__name__


def _check_name(name: Any) -> None:
    if not (isinstance(name, str) and name) and not (isinstance(name, type) and issubclass(name, nn.Module)):
        raise InputError(f"inference_form takes names and classes of modules, not {name!r}")


def _check_form(form: Any, name: str) -> None:
    number = isinstance(form, (int, float)) and not isinstance(form, bool)
    if form == IDENTITY or callable(form) or (number and math.isfinite(form)):
        return
    raise InputError(
        f"{name} cannot be {form!r} at inference; say 'identity', a finite number, or a function of the module"
    )


def _text(name: Any) -> str:
    return name if isinstance(name, str) else name.__name__


def parse_inference_forms(items: tuple[str, ...]) -> dict[str, str | float]:
    """`("DropBlock2d=identity", "head.noise=0.5")` -> `{"DropBlock2d": "identity", "head.noise": 0.5}`.

    Raises:
        InputError: an item is not of that form.
    """
    forms: dict[str, str | float] = {}
    for item in items:
        name, equals, form = item.rpartition("=")
        if not equals or not name:
            raise InputError(f"--inference-form {item} is not of the form NAME=identity or NAME=NUMBER")
        if form == IDENTITY:
            forms[name] = form
            continue
        try:
            forms[name] = float(form)
        except ValueError:
            raise InputError(f"--inference-form {item}: {form!r} is neither identity nor a number") from None
    return forms


@dataclass(frozen=True, eq=False)
class _Entry:
    """A registered form. Targets that are text are dotted class names, so that nothing has to be imported."""

    targets: tuple[Name, ...]
    form: Form
    subclasses: bool

    def fits(self, cls: type) -> bool:
        kinds = cls.__mro__ if self.subclasses else (cls,)
        return any(kind in self.targets or _class_names(kind)[0] in self.targets for kind in kinds)


_REGISTERED: list[_Entry] = []


@overload
def register_inference_form(*targets: Name, form: Form, subclasses: bool = False) -> ExitStack: ...


@overload
def register_inference_form(
    *targets: Name, form: None = None, subclasses: bool = False
) -> Callable[[Maker], Maker]: ...


def register_inference_form(*targets: Name, form: Form | None = None, subclasses: bool = False) -> Any:
    """Tells `fuse` what modules of some classes are at inference. Without `form` it is a decorator for a function.

    Args:
        targets: classes of modules, or their dotted names ("package.module.Class"); those need not be imported.
        form: "identity", a number (a constant scale), a module, or a function that takes the module, in eval mode, and
            returns one of these or a function of the module's arguments.
        subclasses: whether it holds for subclasses, too; else for instances of exactly these classes.

    Returns:
        With a form, a context manager that ends the registration; without, the decorator.

    Raises:
        InputError: a target is no class of modules and no dotted name, or the form cannot be used.
    """
    if not targets:
        raise InputError("register_inference_form needs at least one class of modules, or its dotted name")
    for target in targets:
        _check_name(target)
        if isinstance(target, str) and "." not in target:
            raise InputError(f"{target!r} is no dotted class name; write 'package.module.{target}', or pass the class")

    def register(form: Any) -> Any:
        _check_form(form, ", ".join(map(_text, targets)))
        _REGISTERED.append(_Entry(targets, form, subclasses))
        return form

    if form is None:
        return register
    register(form)
    entry, ends = _REGISTERED[-1], ExitStack()
    ends.callback(lambda: _REGISTERED.remove(entry) if entry in _REGISTERED else None)
    return ends


def unregister_inference_form(*targets: Name) -> None:
    """Takes back what `register_inference_form` said of these classes; does nothing if it is gone already."""
    for entry in list(_REGISTERED):
        left = tuple(target for target in entry.targets if target not in targets)
        if left != entry.targets:
            _REGISTERED[_REGISTERED.index(entry)] = _Entry(left, entry.form, entry.subclasses)
    _REGISTERED[:] = [entry for entry in _REGISTERED if entry.targets]


__all__ = [
    "Said",
    "in_inference_form",
    "parse_inference_forms",
    "register_inference_form",
    "unregister_inference_form",
]
