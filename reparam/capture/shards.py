"""Checkpoints in several files, with an index that says which weight is in which: `model.safetensors.index.json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reparam.capture.formats import Format, identify
from reparam.errors import InputError

_READ = (Format.SAFETENSORS, Format.TORCH_ZIP, Format.TORCH_LEGACY)


def read_shards(path: Path, read: Callable[[Path, Format], Any]) -> dict[str, torch.Tensor]:
    """The weights of all files that the index at `path` names; they stand in its own folder.

    Args:
        path: the index.
        read: reads one of the files, whose format is given.

    Raises:
        InputError: a file is missing, is none of weights, or lacks a weight; or the index names a file elsewhere.
    """
    where: dict[str, str] = json.loads(path.read_text())["weight_map"]
    weights: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(where.values()):
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise InputError(f"{path} names the file {name[:80]!r}, which is not in its own folder; get another index")
        part = path.parent / name
        if not part.exists():
            files = len(set(where.values()))
            raise InputError(
                f"{path} is the index of {files} files, of which {name} is missing; put it beside the index"
            )
        file_format = identify(part)
        content = read(part, file_format) if file_format in _READ else None
        held = content if isinstance(content, dict) else {}
        found = {key: value for key, value in held.items() if isinstance(value, torch.Tensor)}
        keys = [key for key, file in where.items() if file == name]
        missing = [key for key in keys if key not in found]
        if missing:
            raise InputError(
                f"{part} lacks {len(missing)} of the {len(keys)} weights that {path.name} says are in it "
                f"({missing[0]}); copy or download it again"
            )
        weights.update({key: found[key] for key in keys})
    return weights
