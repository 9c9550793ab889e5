"""Who builds the model: `--arch` and its arguments."""

from __future__ import annotations

import ast
import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from reparam.capture.imports import first_line, import_name, importable_current_folder
from reparam.errors import InputError

Arch = str | nn.Module | Callable[..., Any]
FORMS = "timm:NAME, torchvision:NAME or package.module:callable"


def build_arch(arch: Arch, arch_args: Mapping[str, Any] | None = None) -> nn.Module:
    """Builds the model that `arch` names, with random weights; nothing is downloaded.

    Args:
        arch: `timm:NAME`, `torchvision:NAME`, `package.module:callable` (the current folder is importable), a callable,
            or a model that is already built (it will be changed).
        arch_args: keyword arguments of the builder.

    Raises:
        InputError: the package is missing, the name unknown, the builder raises, or does not return an `nn.Module`.
    """
    arguments = dict(arch_args or {})
    if isinstance(arch, nn.Module):
        return arch
    label = arch if isinstance(arch, str) else getattr(arch, "__name__", repr(arch))
    builder, arguments = _builder(arch, arguments) if isinstance(arch, str) else (arch, arguments)
    try:
        with importable_current_folder():
            model = builder(**arguments)
    except (Exception, SystemExit) as error:  # the user's code, or a library's: anything can come
        called = ", ".join(f"{key}={value!r}" for key, value in (arch_args or {}).items())
        raise InputError(
            f"--arch {label}: building the model with ({called}) failed with {type(error).__name__}: "
            f"{first_line(error)}; check the name and --arch-args"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"--arch {label} returned a {type(model).__name__} and not an nn.Module; "
            "name the function that builds the model"
        )
    return model


def _builder(arch: str, arguments: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    source, colon, name = arch.partition(":")
    if not colon or not source or not name:
        raise InputError(f"--arch {arch} is in no known form; write {FORMS}")
    if source.endswith(".py") or "/" in source:
        stem = source.rpartition("/")[2].removesuffix(".py")
        raise InputError(f"--arch {arch} names a file; run in the folder that holds it and write {stem}:{name}")
    if source == "timm":
        timm = _library("timm", arch)
        _check_known(arch, name.partition(".")[0], lambda: timm.list_models() if not timm.is_model(name) else [name])
        return timm.create_model, {"pretrained": False, **arguments, "model_name": name}
    if source == "torchvision":
        models = _library("torchvision.models", arch)
        _check_known(arch, name, models.list_models)
        return models.get_model, {"weights": None, **arguments, "name": name}
    builder = import_name(f"{source}.{name}", f"--arch {arch}")
    if not callable(builder):
        raise InputError(
            f"--arch {arch}: {name} is a {type(builder).__name__} and cannot be called; name a function or class"
        )
    return builder, arguments


def _library(module: str, arch: str) -> Any:
    package = module.partition(".")[0]
    try:
        with importable_current_folder():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0]
        raise InputError(
            f"--arch {arch} needs the package {missing}, which is not installed; install it and try again"
        ) from None
    except Exception as error:  # compiled extensions that do not fit fail with many types
        raise InputError(
            f"--arch {arch}: importing {package} failed with {type(error).__name__} ({first_line(error)}); "
            f"install a {package} that fits this torch"
        ) from error


def _check_known(arch: str, name: str, known: Callable[[], list[str]]) -> None:
    names = known()
    if name not in names and arch.partition(":")[2] not in names:
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "check the name"
        raise InputError(f"--arch {arch}: {arch.partition(':')[0]} has no model called {name}; {hint}")


def parse_arch_args(items: tuple[str, ...]) -> dict[str, Any]:
    """`("num_classes=10", "act=relu")` -> `{"num_classes": 10, "act": "relu"}`; values are Python literals, else text.

    Raises:
        InputError: an item has no `=`, or its key is no identifier.
    """
    arguments: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--arch-args {item} is not of the form key=value; write num_classes=10, for one")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            arguments[key] = value
    return arguments
