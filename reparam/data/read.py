"""What `data` may be, and how it becomes batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from reparam.capture.imports import first_line, import_name, importable_current_folder
from reparam.data.arrays import array_batches
from reparam.data.batch import Batch
from reparam.data.fitting import fitted, input_names, tensor_of, with_tensors
from reparam.data.images import ENDINGS, image_batches
from reparam.errors import InputError, ReparamError
from reparam.inputs import Inputs

Data: TypeAlias = "str | os.PathLike[str] | Callable[[], Iterable[Any]] | Iterable[Any]"
LIMIT = 32
"""How many rows, images or batches are taken unless more are asked for."""
_KINDS = "a folder of images, an image, .npy, .npz, or package.module:function that yields batches"


def read(
    data: Data | None, model: Callable[..., Any], example: Inputs, *, limit: int = LIMIT
) -> tuple[tuple[Batch, ...], tuple[str, ...]]:
    """Batches of the user's data, each like the example inputs, and sentences on how they were made.

    Args:
        data: a folder of images (or one image), a `.npy` file (rows of the one input, or whole batches of it), a `.npz`
            file (an array for each input, under its name), `package.module:function`, a function without arguments, or
            an iterable. The last three give batches: a tensor or array, a tuple or list of them, a dict by parameter.
            None is no data.
        model: tells how it wants images, and the names of its inputs.
        example: what the inputs look like: number, dims, dtypes, and the length of a batch.
        limit: the most rows, images or batches.

    Raises:
        InputError: there is nothing, it cannot be read, or it does not fit the example.
    """
    if data is None:
        return (), ()
    if limit < 1:
        raise InputError(f"data_limit={limit} leaves nothing to compare; give 1 or more")
    if isinstance(data, tuple) and all(isinstance(one, Batch) for one in data):
        return data, ()
    if isinstance(data, (str, os.PathLike)):
        path = Path(os.fspath(data)).expanduser()
        if path.exists():
            batches, note = _from_file(path, model, example, limit)
            return _distinct(batches), (note,) if note else ()
        text = str(data)
        if not isinstance(data, str) or ":" not in text or os.sep in text.partition(":")[0]:
            raise InputError(f"the data {text} does not exist; give {_KINDS}")
        function = import_name(text.replace(":", "."), f"data {text}")
        return _from_iterable(function, text, example, limit)
    return _from_iterable(data, getattr(data, "__name__", "data"), example, limit)


def _from_file(path: Path, model: Callable[..., Any], example: Inputs, limit: int) -> tuple[list[Batch], str]:
    if path.is_dir() or path.suffix.lower() in ENDINGS:
        return image_batches(path, model, example, limit)
    if path.suffix.lower() in (".npy", ".npz"):
        return array_batches(path, example, input_names(model, example), limit)
    raise InputError(f"the data {path} is of no known kind; give {_KINDS}")


def _from_iterable(source: Any, label: str, example: Inputs, limit: int) -> tuple[tuple[Batch, ...], tuple[str, ...]]:
    """Batches that the user's code makes."""
    try:
        with importable_current_folder():
            made = source() if callable(source) else source
            one = isinstance(made, (torch.Tensor, np.ndarray, Mapping))
            items = [made] if one else list(islice(iter(made), limit + 1))
    except ReparamError:
        raise
    except (Exception, SystemExit) as error:  # the user's code
        raise InputError(
            f"data from {label} failed with {type(error).__name__}: {first_line(error)}; it has to be an iterable of "
            "batches, or a function without arguments that returns one"
        ) from error
    if not items:
        raise InputError(f"data from {label} is empty; give at least one batch")
    batches = [_batch(item, f"{label} {number}", example) for number, item in enumerate(items[:limit])]
    notes = (f"the first {limit} batches of {label} were tried, and there are more",) if len(items) > limit else ()
    return tuple(batches), notes


def _batch(item: Any, name: str, example: Inputs) -> Batch:
    """One batch of the user's, checked against the example.

    Raises:
        InputError: it has other tensors.
    """
    likes = list(example.tensors())
    if isinstance(item, Inputs):
        given = list(item.tensors())
    elif isinstance(item, Mapping):
        names = list(example.kwargs)
        if example.args or set(names) != set(item):
            raise InputError(
                f"{name} is a dict with {', '.join(map(str, item))}, and the example has "
                f"{', '.join(names) if names and not example.args else 'positional arguments'}; give the same"
            )
        given = [
            tensor_of(item[key], f"{name}: {key}") for key in names if isinstance(example.kwargs[key], torch.Tensor)
        ]
    else:
        flat = [item] if isinstance(item, (torch.Tensor, np.ndarray)) else item
        if not isinstance(flat, (tuple, list)):
            raise InputError(f"{name} is a {type(item).__name__}; give tensors, a tuple of them, or a dict")
        given = [tensor_of(one, name) for one in flat]
    if len(given) != len(likes):
        raise InputError(
            f"{name} has {len(given)} tensors, and the model takes {len(likes)}; give inputs only, no labels"
        )
    tensors = [fitted(tensor, like, name) for tensor, like in zip(given, likes, strict=True)]
    if any(tensor.numel() == 0 for tensor in tensors):
        raise InputError(f"{name} has no elements; give at least one row")
    return Batch(name, with_tensors(example, tensors))


def _distinct(batches: list[Batch]) -> tuple[Batch, ...]:
    """The batches with names that differ."""
    seen: dict[str, int] = {}
    made = []
    for batch in batches:
        seen[batch.name] = number = seen.get(batch.name, 0) + 1
        made.append(batch if number == 1 else replace(batch, name=f"{batch.name} ({number})"))
    return tuple(made)
