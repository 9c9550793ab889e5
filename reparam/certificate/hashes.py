"""SHA-256 of files, and of weights whatever file they stand in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reparam.errors import InputError

WEIGHTS_KEY = "reparam.weights_sha256"
"""Under which name ONNX files and archives carry the hash of the fused weights in their metadata."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        InputError: it is no file, or cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is no file; say where it is now")
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    return found.hexdigest()


def weights_digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of a state dict's content: name, dtype, shape and bytes of each tensor, in the order of the names.

    It is the same for one model in a `.pt`, a safetensors file or an archive, on any device and in any memory layout.
    What a module keeps there that is no tensor (its extra state) is left out.
    """
    found = hashlib.sha256()
    for name in sorted(name for name, value in state.items() if isinstance(value, torch.Tensor)):
        tensor = state[name].detach().cpu().contiguous()
        found.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{list(tensor.shape)}\0".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
