"""What a pickle may name: torch's own layers, what the user allows, and what nobody can allow."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from reparam.capture.imports import import_name
from reparam.errors import InputError

# Plain functions that torch's own layers, and people's, keep as attributes.
_FUNCTIONS = """
    celu elu gelu glu hardsigmoid hardswish hardtanh leaky_relu log_softmax logsigmoid mish relu relu6 selu sigmoid silu
    softmax softplus softsign tanh
"""

# Nothing in these belongs into a model's file, whatever a user is talked into allowing.
_NEVER = """
    _io _pickle _posixsubprocess asyncio atexit bdb code codeop commands concurrent cProfile ctypes faulthandler ftplib
    gc http importlib inspect io linecache marshal multiprocessing nt ntpath os pdb pickle pickletools pip pkgutil
    platform popen2 posix posixpath profile pty pydoc runpy shelve shutil signal site smtplib socket sqlite3 ssl
    subprocess sys tempfile threading timeit trace types urllib venv webbrowser winreg xmlrpc zipimport
"""
_NEVER_BUILTINS = """
    __import__ breakpoint compile delattr eval exec exit getattr globals help input locals memoryview open print quit
    setattr type vars
"""


@lru_cache(maxsize=1)
def torch_layers() -> Mapping[str, Any]:
    """Full name -> class, for every layer of `torch.nn`, and -> function, for the activations."""
    names: dict[str, Any] = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("torch.nn.modules.") and module is not None:
            for item in vars(module).values():
                if isinstance(item, type) and issubclass(item, nn.Module) and item.__module__ == module_name:
                    names[f"{item.__module__}.{item.__qualname__}"] = item
    for parallel in (nn.parallel.DataParallel, nn.parallel.DistributedDataParallel):
        names[f"{parallel.__module__}.{parallel.__qualname__}"] = parallel
    for name in _FUNCTIONS.split():
        for owner in (nn.functional, torch, getattr(torch._C, "_nn", None)):
            function = getattr(owner, name, None)
            if owner is not None and callable(function):
                names[f"{owner.__name__}.{name}"] = function
    return names


class Allowed:
    """What the user allowed, by the name under which a file asks for it."""

    def __init__(self, entries: Iterable[str | type]) -> None:
        self.classes: dict[str, type] = {}
        self.moved: dict[str, str] = {}
        self.packages: list[str] = []
        for entry in (entries,) if isinstance(entries, (str, type)) else entries:
            if isinstance(entry, type):
                self.classes[f"{entry.__module__}.{entry.__qualname__}"] = entry
                continue
            name, _, target = entry.partition("=")
            if name.endswith(".*") and not target:
                self.packages.append(name[:-1])
            elif "." not in name or (target and "." not in target):
                raise InputError(
                    f"--allow-class {entry} is no full name; write package.module.Class, or OLD.NAME=NEW.NAME "
                    "for a class that has moved"
                )
            else:
                self.moved[name] = target or name

    def find(self, name: str) -> Any | None:
        """The object allowed under `name`, or None. Imports the module that holds it."""
        if name in self.classes:
            return self.classes[name]
        if name in self.moved:
            return import_name(self.moved[name], f"--allow-class {name}")
        if any(name.startswith(package) for package in self.packages):
            item = import_name(name, f"--allow-class {name}")
            return item if isinstance(item, type) and issubclass(item, nn.Module) else None
        return None


def is_never_allowed(name: str) -> bool:
    """Whether `name` has no place in a model's file: it starts programs, touches files, or makes code."""
    root, _, rest = name.partition(".")
    if root in ("builtins", "__builtin__"):
        return rest.split(".")[0] in _NEVER_BUILTINS.split()
    return root in _NEVER.split()
