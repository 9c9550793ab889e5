"""Reads a certificate without believing it: its form is checked, and nothing in it decides which code runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reparam.capture.imports import printable
from reparam.certificate.write import FORMAT, VERSION
from reparam.errors import InputError

_MOST_BYTES = 256 << 20
_MOST_ELEMENTS = 1 << 28
_HASH = re.compile(r"[0-9a-f]{64}")
_KINDS = ("archive", "onnx")
_LEVELS = ("quick", "standard", "thorough")


@dataclass(frozen=True)
class File:
    """A file that is certified: its name without folder, and its hash; `data` is what it keeps outside of itself."""

    name: str
    sha256: str
    data: File | None = None


@dataclass(frozen=True)
class Certificate:
    """What a certificate says.

    Attributes:
        path: where it was read.
        original: the model file. `original_weights` and `fused_weights`: hashes of their state dicts.
        files: kind (`archive`, `onnx`) to file.
        versions, environment: as they were.
        options: of the run.
        inputs_sha256, data_sha256: of the example, and of the user's own inputs; None without.
        comparisons: kind to how it compared, as JSON.
    """

    path: Path
    original: File
    original_weights: str
    fused_weights: str
    files: Mapping[str, File]
    versions: Mapping[str, str]
    environment: Mapping[str, str]
    options: Mapping[str, Any]
    inputs_sha256: str
    data_sha256: str | None
    comparisons: Mapping[str, Mapping[str, Any]]


class _WrongError(Exception):
    """What is wrong with it, as the end of a sentence."""


def read_certificate(path: str) -> Certificate:
    """Reads and checks the form of a certificate.

    Raises:
        InputError: it cannot be read, or is none.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{path} does not exist or is no file; give the certificate that `reparam fuse` wrote")
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise _WrongError(f"it has {file.stat().st_size:,} bytes")
        plain = json.loads(file.read_text(encoding="utf-8"))
        return _certificate(file, plain)
    except _WrongError as wrong:
        reason = str(wrong)
    except (ValueError, RecursionError, OSError) as error:
        reason = f"it is no JSON: {str(error).splitlines()[0]}"
    raise InputError(
        printable(f"{path} is no certificate that can be used ({reason}); fuse the model again for one", 400)
    )


def _certificate(path: Path, plain: Any) -> Certificate:
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise _WrongError(f"it does not say that it is a {FORMAT}")
    if plain.get("version") != VERSION:
        raise _WrongError(f"it is of version {plain.get('version')!r}, and this reparam reads version {VERSION}")
    original, inputs = _dict(plain, "original"), _dict(plain, "inputs")
    files = {kind: _file(entry, f"files.{kind}") for kind, entry in _dict(plain, "files").items() if kind in _KINDS}
    if not files:
        raise _WrongError("it certifies no file")
    comparisons = {kind: _comparison(plain, kind) for kind in files}
    data = inputs.get("data_sha256")
    return Certificate(
        path,
        _file(original, "original"),
        _hash(original, "weights_sha256"),
        _hash(_dict(plain, "fused"), "weights_sha256"),
        files,
        _texts(plain, "versions"),
        _texts(plain, "environment"),
        _options(_dict(plain, "options")),
        _hash(inputs, "sha256"),
        None if data is None else _hash(inputs, "data_sha256"),
        comparisons,
    )


def _dict(plain: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = plain.get(key)
    if not isinstance(found, dict):
        raise _WrongError(f"{key} is missing or no object")
    return found


def _hash(plain: Mapping[str, Any], key: str) -> str:
    found = plain.get(key)
    if not isinstance(found, str) or not _HASH.fullmatch(found):
        raise _WrongError(f"{key} is no SHA-256")
    return found


def _file(plain: Any, where: str) -> File:
    if not isinstance(plain, dict):
        raise _WrongError(f"{where} is no object")
    name = plain.get("file")
    if not isinstance(name, str) or not name or name != Path(name).name or "\\" in name or not name.isprintable():
        raise _WrongError(f"{where}.file is no name of a file without folder")
    data = plain.get("data")
    return File(name, _hash(plain, "sha256"), None if data is None else _file({**data, "data": None}, f"{where}.data"))


def _texts(plain: Mapping[str, Any], key: str) -> dict[str, str]:
    found = _dict(plain, key)
    if not all(isinstance(value, str) for value in found.values()):
        raise _WrongError(f"{key} holds something else than text")
    return found


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that a repetition needs, each of its type."""
    wanted: dict[str, tuple[type, ...]] = {
        "verify": (str,), "seed": (int,), "data_limit": (int,), "data": (str, type(None)), "arch": (str, type(None)),
        "arch_args": (dict,), "key": (str, type(None)), "dtype": (str, type(None)), "inputs": (list,),
        "inference_form": (dict,), "allow_classes": (list,), "allow_pickle": (bool,),
    }  # fmt: skip
    for name, types in wanted.items():
        if name not in options or not isinstance(options[name], types) or (int in types and options[name] is True):
            raise _WrongError(f"options.{name} is missing or of another type")
    if options["verify"] not in _LEVELS:
        raise _WrongError(f"options.verify is {options['verify']!r}")
    if not all(isinstance(text, str) for text in [*options["inputs"], *options["allow_classes"]]):
        raise _WrongError("options.inputs or options.allow_classes holds something else than text")
    for name, form in options["inference_form"].items():
        if form != "identity" and (isinstance(form, bool) or not isinstance(form, (int, float))):
            raise _WrongError(f"options.inference_form of {name!r} is neither identity nor a number")
    for text in options["inputs"]:
        elements = 1
        for side in re.findall(r"\d+", text.rpartition("=")[2].partition(":")[0]):
            elements *= int(side[:12])
        if elements > _MOST_ELEMENTS:
            raise _WrongError(f"options.inputs asks for {elements:,} elements")
    return options


def _comparison(plain: Mapping[str, Any], kind: str) -> dict[str, Any]:
    found = _dict(_dict(plain, "comparisons"), kind)
    if found.get("passed") is not True or not (
        isinstance(found.get("vary_shapes"), bool) or found.get("vary_shapes") == "batch"
    ):
        raise _WrongError(f"comparisons.{kind} does not say that the file passed")
    cases = found.get("cases")
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise _WrongError(f"comparisons.{kind}.cases is no list of objects")
    return found
