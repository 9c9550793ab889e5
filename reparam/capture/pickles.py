"""Reading torch.save files without running what is in them.

A pickle is a program that may call anything it can name. Here it may name only torch's own tensor machinery, torch's
own layers, and what the user allows by name; everything it names is listed beforehand, statically, and the first
name that is not allowed ends the reading.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from reparam.capture.allowed import Allowed, is_never_allowed, torch_layers
from reparam.capture.formats import Format
from reparam.capture.imports import first_line, importable_current_folder
from reparam.errors import InputError

_TENSOR_MACHINERY = """
    _codecs.encode builtins.bytearray builtins.complex builtins.set collections.Counter collections.OrderedDict
    torch.Size torch.Tensor torch.device torch.nn.parameter.Parameter torch.serialization._get_layout
    torch._tensor._rebuild_from_type_v2
"""


def read_pickle(
    path: Path,
    file_format: Format,
    *,
    allow_classes: Iterable[str | type] = (),
    allow_pickle: bool = False,
    map_location: Any = "cpu",
) -> Any:
    """The object in the torch.save file at `path`; its tensors are memory-mapped where the format allows it.

    Args:
        allow_classes: classes, or their names, that the file may make besides torch's own layers. `pkg.mod.Class`;
            `old.name.Class=new.mod.Class` where the class has moved since; `pkg.*` for every `nn.Module` class in a
            package.
        allow_pickle: read the file as an unrestricted pickle: it can run any code.

    Raises:
        InputError: the file asks for something that is not allowed, or cannot be read.
    """
    allowed = Allowed(allow_classes)
    mmap = file_format is Format.TORCH_ZIP
    if allow_pickle:
        return _read_unrestricted(path, allowed, mmap, map_location)
    names, unknown_operations = _globals_in(path, file_format)
    _check_not_hostile(path, names)
    if unknown_operations:
        raise InputError(
            f"{path} uses pickle operations that cannot be read safely (a pickle_protocol above 2, for one); "
            "if you trust the source, pass --allow-pickle, or save it again with torch.save's default protocol"
        )
    granted = _grant(path, names, allowed)
    try:
        with torch.serialization.safe_globals([(value, name) for name, value in granted.items()]), _quiet():
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise _explain(path, file_format, names, granted, error) from None


def globals_in(path: Path, file_format: Format) -> tuple[str, ...]:
    """Sorted full names of everything the file asks for beyond torch's tensor machinery; found without running it.

    Raises:
        InputError: the bytes are damaged.
    """
    return _globals_in(path, file_format)[0]


def _globals_in(path: Path, file_format: Format) -> tuple[tuple[str, ...], bool]:
    """The names, and whether the pickle uses operations that torch's restricted reader does not know."""
    unknown_operations = False
    try:
        if file_format is Format.TORCH_ZIP:
            try:
                return tuple(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))), False
            except pickle.UnpicklingError:
                unknown_operations = True
                found = _scan(io.BytesIO(_pickle_record(path)))
        else:
            with path.open("rb") as file:
                found = _scan(file)
        return tuple(sorted(name for name in found if not _is_tensor_machinery(name))), unknown_operations
    except Exception as error:  # damaged bytes may raise nearly anything
        raise InputError(f"{path} is damaged ({first_line(error)}); copy or download it again") from None


def _pickle_record(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
        return archive.read(name)


def _scan(file: IO[bytes]) -> set[str]:
    """Names in the pickles at the beginning of `file`, without running them.

    The two strings pushed last before a STACK_GLOBAL are taken for its names: so the standard pickler writes it.
    """
    names: set[str] = set()
    # A legacy file is five pickles (magic number, protocol, system, object, storage keys) and then raw bytes.
    for _ in range(5):
        strings: list[str] = []
        memo: dict[int, str | None] = {}
        last: str | None = None
        try:
            for opcode, argument, _position in pickletools.genops(file):
                if opcode.name == "MEMOIZE":
                    memo[len(memo)] = last
                elif opcode.name.endswith("PUT"):
                    memo[int(argument or 0)] = last
                elif opcode.name.endswith("GET"):
                    last = memo.get(int(argument or 0))
                    strings += [last] if last is not None else []
                elif opcode.name in ("GLOBAL", "INST"):
                    last = None
                    names.add(_today(*str(argument).split(" ", 1)))
                elif opcode.name == "STACK_GLOBAL" and len(strings) >= 2:
                    last = None
                    names.add(_today(*strings[-2:]))
                else:
                    last = argument if isinstance(argument, str) else None
                    strings += [last] if last is not None else []
        except (ValueError, IndexError, TypeError, OverflowError):
            break
    return names


def _today(module: str, name: str = "") -> str:
    """The full name, with Python 2's names translated as the unpickler translates them."""
    module, name = NAME_MAPPING.get((module, name), (module, name))
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


def _is_tensor_machinery(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return (
        name in _TENSOR_MACHINERY.split()
        or (module == "torch._utils" and attribute.startswith("_rebuild_"))
        or (module in ("torch", "torch.storage", "torch.cuda") and attribute.endswith("Storage"))
        or (module == "torch" and isinstance(getattr(torch, attribute, None), torch.dtype))
    )


def _check_not_hostile(path: Path, names: tuple[str, ...]) -> None:
    hostile = [name for name in names if is_never_allowed(name)]
    if hostile:
        raise InputError(
            f"{path} asks to run {', '.join(hostile)}, which no model needs: it looks hostile and was not loaded; "
            "get the weights from a source you trust"
        )


def _grant(path: Path, names: tuple[str, ...], allowed: Allowed) -> dict[str, Any]:
    """The objects for `names`; least privilege: of torch's layers, too, only those that the file asks for."""
    granted: dict[str, Any] = {}
    missing: list[str] = []
    for name in names:
        item = torch_layers().get(name)
        item = allowed.find(name) if item is None else item
        if item is None:
            missing.append(name)
        else:
            granted[name] = item
    if missing:
        raise InputError(_not_allowed(path, missing))
    return granted


def _not_allowed(path: Path, missing: list[str]) -> str:
    """The sentence for a file that asks for more than is allowed."""
    many = f"{len(missing)} classes" if len(missing) > 1 else "the class"
    listed = ", ".join(missing)
    scripts = [name for name in missing if name.startswith("__main__.")]
    if scripts:
        moved = " ".join(f"--allow-class {name}=SCRIPT.{name.removeprefix('__main__.')}" for name in scripts)
        others = " ".join(f"--allow-class {name}" for name in missing if name not in scripts)
        return (
            f"{path} was saved by a script and names {', '.join(scripts)} only as part of it; if the script is "
            f'SCRIPT.py in the current folder (and trains only under `if __name__ == "__main__":`), pass '
            f"{f'{moved} {others}'.strip()}, or save model.state_dict() and pass --arch SCRIPT:BUILDER"
        )
    packages = sorted({name.split(".")[0] for name in missing})
    options = " ".join(f"--allow-class {name}" for name in missing)
    if len(missing) > 3:
        options = (
            " ".join(f"--allow-class '{package}.*'" for package in packages) + " (their nn.Module classes), by name"
        )
    return (
        f"{path} asks for {many} {listed}, which reparam does not load unasked, since a pickle can run code; "
        f"if you trust the source, pass {options}, or --allow-pickle for everything in the file"
    )


def _explain(
    path: Path, file_format: Format, names: tuple[str, ...], granted: Mapping[str, Any], error: Exception
) -> InputError:
    """The sentence for a file that torch's restricted reader could not read."""
    text = str(error)
    if "persistent_load" in text and file_format is Format.TORCH_LEGACY:
        listed = f" ({', '.join(names)})" if names else ""
        return InputError(
            f"{path} is a whole model{listed} in the format of before torch 1.6, which cannot be read "
            "without running its code; if you trust the source, pass --allow-pickle, "
            "or save it again with today's torch.save"
        )
    unknown = text.partition("Unsupported global: GLOBAL ")[2].partition(" was not")[0]
    if unknown:
        return InputError(_not_allowed(path, [unknown]))
    if isinstance(error, (ImportError, AttributeError)) and granted:
        return InputError(
            f"{path} cannot be rebuilt with the classes installed here ({first_line(error)}); "
            "install the versions it was saved with"
        )
    detail = text.partition("WeightsUnpickler error: ")[2].strip() or text
    return InputError(
        f"{path} cannot be read ({first_line(detail) or type(error).__name__}); it may be damaged, so copy it again"
    )


def _read_unrestricted(path: Path, allowed: Allowed, mmap: bool, map_location: Any) -> Any:
    """The file as an ordinary pickle, with classes that have moved found at their new place."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found = allowed.find(f"{module}.{name}")
            return super().find_class(module, name) if found is None else found

    class Pickle:
        """Stands in for the `pickle` module, of which torch.load uses these."""

        load = staticmethod(lambda file, **options: Unpickler(file, **options).load())
        loads = staticmethod(pickle.loads)
        UnpicklingError = pickle.UnpicklingError

    Pickle.Unpickler = Unpickler  # type: ignore[attr-defined]
    Pickle.__name__ = "pickle"
    try:
        with importable_current_folder(), _quiet():
            return torch.load(path, map_location=map_location, weights_only=False, mmap=mmap, pickle_module=Pickle)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{path} needs the package {error.name}, which is not installed; install it and try again"
        ) from None
    except InputError:
        raise
    except Exception as error:  # the file's own code runs here, so anything can come
        if "__main__" in str(error):
            names = [name for name in globals_in(path, _format_of(mmap)) if name.startswith("__main__.")]
            raise InputError(_not_allowed(path, names or ["__main__.CLASS"])) from None
        raise InputError(
            f"{path} cannot be unpickled: {type(error).__name__} ({first_line(error)}); "
            "install the versions it was saved with, or copy it again if it is damaged"
        ) from error


def _format_of(mmap: bool) -> Format:
    return Format.TORCH_ZIP if mmap else Format.TORCH_LEGACY


@contextlib.contextmanager
def _quiet() -> Any:
    """Old storages and old layers warn on loading about things their user cannot change here."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
