"""`.npy` and `.npz` files. What they say of themselves is checked before anything is read; objects are refused."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from reparam.data.batch import Batch
from reparam.data.fitting import batches_of, tensor_of
from reparam.errors import InputError
from reparam.inputs import Inputs

_MOST_BYTES = 8 << 30
"""Of one array: more is no sample of inputs, and would fill the memory."""


def array_batches(path: Path, example: Inputs, names: tuple[str, ...], limit: int) -> tuple[list[Batch], str]:
    """Batches from a `.npy` file with the one input, or a `.npz` file with an array for each input; and a note.

    Raises:
        InputError: the file is damaged, holds objects, or does not fit the example.
    """
    arrays = _npz(path) if path.suffix.lower() == ".npz" else {"": _npy(path)}
    if path.suffix.lower() == ".npz":
        columns = {name: tensor_of(array, f"{path.name}: {name}") for name, array in arrays.items()}
        if set(columns) != set(names):
            if len(names) != 1 or len(columns) != 1:
                raise InputError(
                    f"{path} has the arrays {', '.join(columns) or 'none'}, and the model's inputs are "
                    f"{', '.join(names)}; name the arrays like the inputs"
                )
            columns = {names[0]: next(iter(columns.values()))}
    else:
        if len(names) != 1:
            raise InputError(
                f"{path} is one array, and the model has {len(names)} inputs ({', '.join(names)}); "
                "save them in one .npz file, each under its name"
            )
        columns = {names[0]: tensor_of(arrays[""], path.name)}
    batches, count = _listed(columns, example, names, path.name, limit)
    note = f"the first {limit} of {count} rows of {path.name} were tried" if count > limit else ""
    return batches, note


def _listed(
    columns: dict[str, torch.Tensor], example: Inputs, names: tuple[str, ...], label: str, limit: int
) -> tuple[list[Batch], int]:
    """Columns of rows; or, with one dim more than the example has, lists of whole batches."""
    likes = dict(zip(names, example.tensors(), strict=True))
    if any(columns[name].dim() != like.dim() + 1 for name, like in likes.items()):
        return batches_of(columns, example, names, label, limit)
    counts = {len(column) for column in columns.values()}
    if len(counts) != 1 or not min(counts):
        raise InputError(f"{label} has {' and '.join(map(str, sorted(counts)))} batches; give as many of each input")
    count, made = counts.pop(), list[Batch]()
    for number in range(min(count, limit)):
        one = {name: column[number] for name, column in columns.items()}
        made += batches_of(one, example, names, f"{label}[{number}]", limit)[0]
    return made, count


def _npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            odd = next((one.filename for one in entries if not one.filename.endswith(".npy")), None)
            if odd is not None:
                raise InputError(f"{path} holds {odd[:80]!r}, which is no array; write it with numpy.savez")
            found = {}
            for entry in entries:
                with archive.open(entry) as file:
                    found[entry.filename.removesuffix(".npy")] = _read(
                        file, entry.file_size, f"{path}: {entry.filename}"
                    )
            return found
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        raise InputError(
            f"{path} is no .npz file that can be read ({_line(error)}); write it with numpy.savez"
        ) from None


def _npy(path: Path) -> Any:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _read(file, size, str(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is no .npy file that can be read ({_line(error)}); write it with numpy.save"
        ) from None


def _read(file: IO[bytes], size: int, where: str) -> Any:
    """One array in NumPy's format, of `size` bytes with its header.

    Raises:
        InputError: it holds objects, or is not as large as it says.
        ValueError: it is not in that format.
    """
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format {version[0]}.{version[1]} is not known")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_column, dtype = read_header(file)
    if dtype.hasobject:
        raise InputError(f"{where} holds Python objects, which are never unpickled; save an array of numbers")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted > min(size, _MOST_BYTES) or any(side < 0 for side in shape):
        raise InputError(f"{where} says that it holds {wanted:,} bytes, and cannot ({size:,} there); save it again")
    content = file.read(wanted)
    if len(content) != wanted:
        raise InputError(f"{where} ends after {len(content):,} of {wanted:,} bytes; copy or save it again")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_column else "C")


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")[:200] or type(error).__name__
