"""Checkpoints in several files and their index."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from reparam.capture.load import load
from reparam.errors import InputError
from tests.capture.test_load import plain, same
from tests.capture.test_load_hostile import touch

Index = dict[str, str]


def sharded(folder: Path, ending: str, change: Callable[[Index], None] = lambda index: None) -> Path:
    """The weights of a model in two files, and their index, changed."""
    torch.manual_seed(0)
    weights = dict(plain().state_dict())
    index: Index = {}
    for number, keys in enumerate((list(weights)[:3], list(weights)[3:]), 1):
        name = f"model-{number}-of-2.{ending}"
        part = {key: weights[key] for key in keys}
        save_file(part, folder / name) if ending == "safetensors" else torch.save(part, folder / name)
        index.update(dict.fromkeys(keys, name))
    change(index)
    path = folder / f"model.{ending}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return path


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_index_gives_all_its_files(tmp_path: Path, ending: str) -> None:
    loaded = load(sharded(tmp_path, ending), plain)
    torch.manual_seed(0)
    assert same(plain(), loaded)


def elsewhere(name: str) -> Callable[[Index], None]:
    return lambda index: index.update({"0.weight": name})


BAD: dict[str, tuple[Callable[[Index], None], str]] = {
    "climbs": (elsewhere("../secret.safetensors"), "which is not in its own folder"),
    "absolute": (elsewhere("/etc/passwd"), "which is not in its own folder"),
    "folder": (elsewhere(".."), "which is not in its own folder"),
    "missing file": (
        elsewhere("model-3-of-2.safetensors"),
        "index of 3 files, of which model-3-of-2.safetensors is miss",
    ),
    "missing weight": (
        lambda index: index.update({"9.weight": "model-1-of-2.safetensors"}),
        r"lacks 1 of the 4 .*9\.w",
    ),
    "itself": (elsewhere("model.safetensors.index.json"), "lacks 1 of the 1 weights"),
    "less than the model has": (lambda index: index.pop("0.weight") and None, r"1 missing \(0\.weight\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_indices_are_one_sentence(tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        load(sharded(tmp_path, "safetensors", change), plain)
    assert "\n" not in str(caught.value)


def test_a_file_of_an_index_runs_no_code(tmp_path: Path) -> None:
    path = sharded(tmp_path, "bin")
    torch.save({"0.weight": touch(tmp_path / "marker")}, tmp_path / "model-1-of-2.bin")
    with pytest.raises(InputError, match="looks hostile"):
        load(path, plain)
    assert not (tmp_path / "marker").exists()


def test_the_folder_names_its_index_first_and_an_index_is_told_from_other_texts(tmp_path: Path) -> None:
    path = sharded(tmp_path, "safetensors")
    with pytest.raises(InputError, match=r"is a folder; pass the model file in it, such as model\.safetensors\.index"):
        load(tmp_path, plain)
    with pytest.raises(InputError, match=r"holds weights only \(7 tensors\)"):
        load(path)
    contents: list[Any] = [{"a": 1}, {"weight_map": {}}, {"weight_map": {"a": 1}}, {"weight_map": [1]}]
    for content in contents:
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match="is a text file"):
            load(path, plain)
