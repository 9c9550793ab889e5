"""torch.export archives: a program becomes a module again, after everything in the file was found harmless.

`torch.export.load` itself runs code on request: it unpickles weights, constants and example inputs without
restriction, loads compiled libraries, and executes parts of the program's text. Here the archive is read by torch's own
reader first (so that nothing can look different to it), and each part is checked: which entries there are, the program
(`reparam.capture.audit`), pickles by reading them with torch's restricted unpickler, sizes by arithmetic.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import fx

from reparam.capture.audit import UnsafeError, audit_program
from reparam.capture.exported import as_plain, graph_module
from reparam.capture.imports import first_line
from reparam.errors import InputError
from reparam.inputs import Inputs
from reparam.quiet import quiet

_ENTRIES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|\.format_version|version|"
    r"models/[\w.\-]+\.json|data/(weights|constants)/[\w.\-]+|data/sample_inputs/[\w.\-]+\.pt|extra/.*"
)
_PICKLED = re.compile(r"data/(weights|constants)/[\w.\-]+\.pt")
_EXAMPLE = "reparam_example_inputs"
_MOST_EXPANDED = 64 << 20  # bytes that a tensor may have beyond those in the file: views repeat what they look at


def load_archive(path: Path, *, trusted: bool = False) -> fx.GraphModule:
    """The program in the archive at `path` as a module, with its example inputs (see `example_of`).

    Args:
        trusted: leave out the checks: the file may run any code.

    Raises:
        InputError: the file holds what reparam does not load unasked, or cannot be read.
    """
    if not trusted:
        try:
            _audit(path)
        except UnsafeError as error:
            raise InputError(
                f"{path} {error}, which reparam does not load unasked; if you trust the source, pass --allow-pickle"
            ) from None
    try:
        with quiet(), torch.device("cpu"):  # torch.export.load fails under some other default devices
            program = torch.export.load(path)
            module = graph_module(program)
    except Exception as error:  # a damaged program may raise nearly anything
        raise InputError(
            f"{path} cannot be read by torch {torch.__version__} ({type(error).__name__}: {first_line(error)}); "
            "export the model again with this version"
        ) from error
    plain = as_plain(module)
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        plain.meta[_EXAMPLE] = Inputs(tuple(args), dict(kwargs))
    return plain


def example_of(model: object) -> Inputs | None:
    """The example inputs that a model was exported with; None if it was not, or without."""
    meta = getattr(model, "meta", None)
    found = meta.get(_EXAMPLE) if isinstance(meta, Mapping) else None
    return found if isinstance(found, Inputs) else None


def archive_metadata(path: Path) -> dict[str, str]:
    """The text that `export_archive` was given to keep in the archive; empty without.

    Raises:
        InputError: it cannot be read.
    """
    reader, names = opened(path)
    name = next((name for name in names if name.endswith("extra/reparam.json")), None)
    found = {} if name is None else _json(reader, name, path).get("metadata")
    return {key: str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def opened(path: Path) -> tuple[Any, list[str]]:
    """The archive at `path` as torch's own reader sees it, and the names of its entries.

    Raises:
        InputError: it cannot be read.
    """
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        return reader, list(reader.get_all_records())
    except RuntimeError as error:
        raise InputError(f"{path} is a damaged archive ({first_line(error)}); copy or download it again") from None


def _audit(path: Path) -> None:
    reader, names = opened(path)
    for name in names:
        if name.startswith("data/aotinductor/"):
            raise UnsafeError("holds a compiled library")
        if not _ENTRIES.fullmatch(name):
            raise UnsafeError(f"has the entry {name[:80]!r}")
    programs = [name for name in names if name.startswith("models/")]
    if programs != ["models/model.json"]:
        raise InputError(
            f"{path} holds {len(programs)} programs, where one called 'model' is expected; save that one with "
            "torch.export.save"
        )
    audit_program(_json(reader, programs[0], path))
    for kind in ("weights", "constants"):
        _audit_tensors(reader, kind, names, path)
    for name in names:
        if name.startswith("data/sample_inputs/") or _PICKLED.fullmatch(name):
            _require_plain_pickle(reader, name)


def _audit_tensors(reader: Any, kind: str, names: list[str], path: Path) -> None:
    config = f"data/{kind}/model_{kind}_config.json"
    if config not in names:
        raise InputError(f"{path} has no {config}; it was written by another version of torch: export the model again")
    try:
        for entry in _json(reader, config, path)["config"].values():
            name = f"data/{kind}/{entry['path_name']}"
            if not re.fullmatch(r"(weight|tensor)_\w+", entry["path_name"]) or name not in names:
                raise UnsafeError(f"holds {str(entry['path_name'])[:80]!r}, an object that is no tensor")
            if entry["use_pickle"]:
                _require_plain_pickle(reader, name)
            else:
                _require_small(entry["tensor_meta"], reader.get_record_size(name))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has a damaged list of {kind} ({error}); copy or download it again") from None


def _require_small(meta: Mapping[str, Any], stored: int) -> None:
    """A tensor is as large as what is stored of it, but for views that repeat elements."""
    elements = prod(size["as_int"] for size in meta["sizes"])
    if 16 * elements > max(_MOST_EXPANDED, 64 * stored) or any(size["as_int"] < 0 for size in meta["sizes"]):
        raise UnsafeError(f"holds a tensor of {elements:,} elements in {stored:,} bytes")


def _require_plain_pickle(reader: Any, name: str) -> None:
    """What torch's restricted unpickler reads, the full one reads alike: it meets the same names."""
    try:
        torch.load(io.BytesIO(reader.get_record(name)), weights_only=True, map_location="cpu")
    except Exception:
        raise UnsafeError(f"holds a pickle of more than tensors ({name})") from None


def _json(reader: Any, name: str, path: Path) -> Any:
    try:
        found = json.loads(reader.get_record(name))
    except (ValueError, RuntimeError, RecursionError) as error:
        raise InputError(f"{path} has a damaged {name} ({first_line(error)}); copy or download it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} has a damaged {name}; copy or download it again")
    return found
