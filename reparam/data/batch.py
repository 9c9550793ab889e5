"""`Batch`: one call's inputs from the user's data, with a name, and what identifies the content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from reparam.inputs import Inputs


@dataclass(frozen=True)
class Batch:
    """Inputs for one call.

    Attributes:
        name: where they come from: `dog.jpg`, `images.npy rows 0-7`, `nets:batches 3`.
        inputs: the arguments.
    """

    name: str
    inputs: Inputs


def digest(batches: Iterable[Batch]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all tensors, in order; the same on every machine."""
    found = hashlib.sha256()
    for batch in batches:
        found.update(f"{batch.name}\n".encode())
        for tensor in batch.inputs.tensors():
            found.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
