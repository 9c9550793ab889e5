"""What a file is, told from its content and never from its name.

Reads a few bytes and an archive's directory; runs nothing.
"""

from __future__ import annotations

import json
import struct
import zipfile
from enum import Enum
from pathlib import Path

from reparam.errors import InputError

# the pickled magic number with which torch.save's format of before 1.6 begins, behind the two bytes of the protocol
_LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_ENTRIES = 1_000_000
# A file written by torch holds its entries as they are. Text compresses well, so a little compression is no alarm.
_MAX_EXPANSION = 50

_OTHER_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89HDF\r\n", "an HDF5 file (Keras, for one)"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"GGUF", "a GGUF file"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (0, b"BZh", "bzip2-compressed; unpack it first"),
    (0, b"\xfd7zXZ", "xz-compressed; unpack it first"),
    (0, b"7z\xbc\xaf", "a 7-Zip archive; unpack it first"),
    (0, b"\x89PNG", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
)


class Format(Enum):
    """The formats that are told apart."""

    TORCH_ZIP = "torch.save file"
    TORCH_LEGACY = "torch.save file of before torch 1.6"
    SAFETENSORS = "safetensors file"
    EXPORT_ARCHIVE = "torch.export archive"
    TORCHSCRIPT = "TorchScript archive"
    ONNX = "ONNX file"
    SHARDS = "index of a checkpoint in several files"


def identify(path: Path) -> Format:
    """Tells which format the file at `path` has.

    Raises:
        InputError: there is no such file, it cannot be read, or it is none of these formats; the sentence says what it
            is instead, as far as that can be told.
    """
    head = _head(path)
    if head.startswith(b"PK\x03\x04"):
        return _identify_zip(path)
    if head[:1] == b"\x80" and head[2:].startswith(_LEGACY_MAGIC):
        return Format.TORCH_LEGACY
    if len(head) > 8 and head[8:9] == b"{":
        _check_safetensors(path, head)
        return Format.SAFETENSORS
    if _looks_like_onnx(head):
        return Format.ONNX
    if head.lstrip()[:1] == b"{" and _is_index(path):
        return Format.SHARDS
    raise InputError(f"{path} is {_describe(head)}; reparam reads files of torch.save and safetensors")


def _head(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder; pass the model file in it{_files_in(path)}")
        with path.open("rb") as file:
            head = file.read(4096)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path{_similar(path)}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{path} cannot be read ({reason}); check the path and its permissions") from None
    if not head:
        raise InputError(f"{path} is empty (0 bytes); copy or download it again")
    return head


def _is_index(path: Path) -> bool:
    """Whether a text says which file each weight is in: `{"weight_map": {"conv.weight": "model-1.safetensors"}}`."""
    if path.stat().st_size > _MAX_SAFETENSORS_HEADER:
        return False
    try:
        found = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
    return isinstance(found, dict) and bool(found) and all(isinstance(name, str) for name in found.values())


def _files_in(folder: Path) -> str:
    endings = (".index.json", ".pt", ".pth", ".safetensors", ".ckpt", ".bin", ".tar")
    try:
        names = sorted((entry.name for entry in folder.iterdir() if entry.name.endswith(endings)), key=_index_first)
    except OSError:
        return ""
    return f", such as {', '.join(names[:3])}" if names else ""


def _index_first(name: str) -> tuple[bool, str]:
    return not name.endswith(".index.json"), name


def _similar(path: Path) -> str:
    import difflib

    try:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.8)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


def _identify_zip(path: Path) -> Format:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, UnicodeDecodeError):
        # The directory is at the end of the archive: a cut download loses it first.
        raise InputError(
            f"{path} is a truncated or damaged archive (its directory cannot be read); copy or download it again"
        ) from None
    _check_entries(path, entries)
    names = {entry.filename for entry in entries}
    inner = {name.split("/", 1)[1] for name in names if "/" in name}
    if "constants.pkl" in inner and "data.pkl" in inner:
        return Format.TORCHSCRIPT
    if "archive_format" in inner or "serialized_exported_program.json" in names | inner:
        return Format.EXPORT_ARCHIVE
    if "data.pkl" in inner:
        return Format.TORCH_ZIP
    if ".data/extern_modules" in inner:
        raise InputError(f"{path} is a torch.package archive; load the model from it and save it with torch.save")
    what = "NumPy arrays" if names and all(name.endswith(".npy") for name in names) else "no PyTorch model"
    raise InputError(f"{path} is a zip archive with {what} in it; reparam reads files of torch.save and safetensors")


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    """Refuses archives that torch.save never writes: bombs, overlaps, names that climb out, doubled names."""
    size = path.stat().st_size
    names = [entry.filename for entry in entries]
    complaint = ""
    if len(entries) > _MAX_ENTRIES:
        complaint = f"it lists {len(entries):,} entries"
    elif len(set(names)) != len(names):
        complaint = "two entries have one name"
    elif bad := [name for name in names if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/")]:
        complaint = f"the entry {bad[0]!r} points outside of it"
    elif sum(entry.compress_size for entry in entries) > size:
        complaint = "its entries overlap or reach beyond its end"
    elif sum(entry.file_size for entry in entries) > _MAX_EXPANSION * size:
        complaint = f"it would grow more than {_MAX_EXPANSION} times when unpacked"
    if complaint:
        raise InputError(
            f"{path} is no archive that torch writes ({complaint}); it is damaged or hostile, so get another"
        )


def _check_safetensors(path: Path, head: bytes) -> None:
    """Whether a file that looks like safetensors is whole, with sizes that fit the file's."""
    (length,) = struct.unpack("<Q", head[:8])
    size = path.stat().st_size
    if length > _MAX_SAFETENSORS_HEADER:
        raise InputError(f"{path} is {_describe(head)}; reparam reads files of torch.save and safetensors")
    if 8 + length > size:
        raise InputError(f"{path} is a truncated safetensors file (its header is cut); copy or download it again")
    with path.open("rb") as file:
        file.seek(8)
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            end = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise InputError(
                f"{path} begins like a safetensors file but its header is damaged; copy or download it again"
            ) from None
    if end > size:
        raise InputError(
            f"{path} is a truncated safetensors file ({size:,} of {end:,} bytes); copy or download it again"
        )


def _looks_like_onnx(head: bytes) -> bool:
    """Protobuf of a ModelProto: `ir_version` (field 1, small), then the producer, domain, opsets or graph."""
    return len(head) > 4 and head[0] == 0x08 and 1 <= head[1] <= 32 and head[2] in (0x12, 0x1A, 0x22, 0x28, 0x3A, 0x42)


def _describe(head: bytes) -> str:
    """What a file that is none of ours seems to be."""
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the model (run `git lfs pull`)"
    for offset, magic, name in _OTHER_MAGIC:
        if head[offset:].startswith(magic):
            return name
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:
        return "a plain pickle and not written by torch.save (or one that was cut short)"
    if _is_text(head):
        if head.lstrip()[:1] == b"<":
            return "a web page or XML text, perhaps the error page of a failed download"
        return "a text file"
    if len(head) < 64:
        return f"only {len(head)} bytes long and of no known model format"
    return "of no known model format"


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # a character cut at the end of what was read is no sign of binary
            return False
        text = head[: error.start].decode("utf-8")
    return bool(text) and all(char.isprintable() or char in "\r\n\t\f" for char in text)
