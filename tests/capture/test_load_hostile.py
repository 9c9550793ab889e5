"""Files that try to run code, to write outside, or to fill memory: nothing may happen but one sentence."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reparam.capture.load import load
from reparam.errors import InputError


class Payload:
    """Unpickling this calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def touch(marker: Path) -> Payload:
    return Payload(os.system, f"touch {marker}")


def with_record(path: Path, record: str, content: bytes, **options: Any) -> None:
    """Rewrites the archive at `path` with one record more or another one, stored as torch stores them."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(entries)).split("/")[0]
    entries[record.replace("ROOT", root)] = content
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def in_state_dict(path: Path, marker: Path) -> None:
    torch.save({"weight": torch.ones(2), "x": touch(marker)}, path)


def in_legacy(path: Path, marker: Path) -> None:
    torch.save({"weight": torch.ones(2), "x": touch(marker)}, path, _use_new_zipfile_serialization=False)


def in_module(path: Path, marker: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.extra = touch(marker)  # type: ignore[assignment]
    torch.save(model, path)


def by_subprocess(path: Path, marker: Path) -> None:
    torch.save([Payload(subprocess.check_call, ["touch", str(marker)])], path)


def by_eval(path: Path, marker: Path) -> None:
    torch.save(Payload(eval, f"open({str(marker)!r}, 'w')"), path)


def by_open(path: Path, marker: Path) -> None:
    torch.save(Payload(open, str(marker), "w"), path)


def by_later_protocol(path: Path, marker: Path) -> None:
    torch.save({"x": touch(marker)}, path, pickle_protocol=4)


def plain_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(touch(marker)))


def in_torchscript(path: Path, marker: Path) -> None:
    torch.save({"x": touch(marker)}, path)
    with_record(path, "ROOT/constants.pkl", pickle.dumps(touch(marker), protocol=2))


def in_exported(path: Path, marker: Path) -> None:
    torch.save({"x": touch(marker)}, path)
    with_record(path, "ROOT/archive_format", b"pt2")


def traversal(path: Path, marker: Path) -> None:
    torch.save(nn.Linear(2, 2), path)
    with_record(path, f"../{marker.name}", b"x")


def bomb(path: Path, marker: Path) -> None:
    torch.save(nn.Linear(2, 2), path)
    with_record(path, "ROOT/data.pkl", b"\0" * 50_000_000, compression=zipfile.ZIP_DEFLATED)


def doubled(path: Path, marker: Path) -> None:
    torch.save(nn.Linear(2, 2), path)
    with zipfile.ZipFile(path, "a") as archive:
        name = archive.namelist()[0]
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(name, b"other")


def huge_header(path: Path, marker: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**60) + b'{"a":1}' + b"\0" * 100)


def deep_header(path: Path, marker: Path) -> None:
    header = b'{"a":' + b"[" * 200_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def endless_pickle(path: Path, marker: Path) -> None:
    torch.save([1], path)
    with_record(path, "ROOT/data.pkl", b"\x80\x02" + b"(" * 100)


HOSTILE = {
    function.__name__: function
    for function in (
        in_state_dict, in_legacy, in_module, by_subprocess, by_eval, by_open, by_later_protocol, plain_pickle,
        in_torchscript, in_exported, traversal, bomb, doubled, huge_header, deep_header, endless_pickle,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_runs_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    path, marker = folder / "model.pt", tmp_path / "marker"
    HOSTILE[name](path, marker)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        load(path, lambda: nn.Linear(2, 2))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_payload_would_run(tmp_path: Path) -> None:
    """The hostile files above are live: the ordinary reader does what they ask."""
    in_state_dict(tmp_path / "model.pt", tmp_path / "marker")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["posix.system", "os.system", "builtins.eval", "subprocess.check_call"])
def test_some_names_cannot_be_allowed(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    for make in (in_state_dict, by_eval, by_subprocess):
        make(tmp_path / "model.pt", marker)
        with pytest.raises(InputError, match="looks hostile"):
            load(tmp_path / "model.pt", allow_classes=[name])
    assert not marker.exists()


def test_mutated_files_never_end_in_anything_but_a_model_or_a_sentence(tmp_path: Path) -> None:
    """Bytes flipped, cut, doubled and inserted at random in files of each format."""
    from safetensors.torch import save_file

    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    seeds: list[bytes] = []
    for content, legacy in ((model, False), (model.state_dict(), False), (model.state_dict(), True)):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
        seeds.append(buffer.getvalue())
    save_file(dict(model.state_dict()), tmp_path / "s")
    seeds.append((tmp_path / "s").read_bytes())
    draw = random.Random(0)
    sentences: list[str] = []
    for turn in range(400):
        data = bytearray(seeds[turn % len(seeds)])
        for _ in range(draw.choice((1, 1, 3, 20))):
            at = draw.randrange(len(data))
            match draw.randrange(4):
                case 0:
                    data[at] = draw.randrange(256)
                case 1:
                    data[at] ^= 1 << draw.randrange(8)
                case 2:
                    del data[at : at + draw.randrange(1, 40)]
                case _:
                    data[at:at] = data[: draw.randrange(40)]
            if not data:
                break
        path = tmp_path / "mutated"
        path.write_bytes(bytes(data))
        try:
            loaded = load(path, lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU()))
            assert isinstance(loaded, nn.Module)
        except InputError as error:
            sentences.append(str(error))
    assert len(sentences) > 100
    assert not any("\n" in sentence for sentence in sentences)


def test_names_from_a_file_cannot_command_the_terminal(tmp_path: Path) -> None:
    torch.save({"\x1b[2J\r\nreparam: all is well": 1, "x" * 10_000: 2}, tmp_path / "model.pt")
    with pytest.raises(InputError) as caught:
        load(tmp_path / "model.pt")
    assert "\\x1b[2J reparam: all is well" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 2000
