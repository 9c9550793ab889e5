"""The user's own data: what is taken, how it is named and cut into batches, and what is refused with which sentence."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import reparam
from reparam.data import Batch, digest, read
from reparam.data.images import preparation
from reparam.errors import InputError, NotEquivalentError
from reparam.inputs import Inputs

IMAGE = Inputs((torch.zeros(2, 3, 8, 12),))


class Text(nn.Module):
    """Two inputs, one of them with default."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return ids * mask


TEXT = Inputs((torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()


def taken(data: Any, example: Inputs = IMAGE, model: nn.Module | None = None, limit: int = 32) -> tuple[Batch, ...]:
    return read(data, model or small(), example, limit=limit)[0]


def tensors(batch: Batch) -> list[torch.Tensor]:
    return list(batch.inputs.tensors())


def test_rows_of_an_array_become_batches_of_the_example_s_length(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 3, 8, 12))
    np.save(tmp_path / "five.npy", rows)
    batches, notes = read(tmp_path / "five.npy", small(), IMAGE)
    assert [batch.name for batch in batches] == ["five.npy rows 0-1", "five.npy rows 2-3", "five.npy row 4"]
    assert torch.equal(tensors(batches[1])[0], torch.from_numpy(rows[2:4]).float())
    assert torch.equal(tensors(batches[2])[0], torch.from_numpy(rows[[4, 0]]).float()), "filled up with the first row"
    assert notes == ()
    few, notes = read(str(tmp_path / "five.npy"), small(), IMAGE, limit=2)
    assert len(few) == 1
    assert notes == ("the first 2 of 5 rows of five.npy were tried",)


def test_an_array_of_batches_and_arrays_in_other_orders(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(3, 2, 3, 8, 12)).astype(">f4")
    np.save(tmp_path / "batches.npy", np.asfortranarray(rows))
    batches = taken(tmp_path / "batches.npy")
    assert [batch.name for batch in batches] == ["batches.npy[0]", "batches.npy[1]", "batches.npy[2]"]
    assert torch.equal(tensors(batches[2])[0], torch.from_numpy(rows[2].astype("f4")))


def test_a_npz_file_gives_each_input_under_its_name(tmp_path: Path) -> None:
    ids, mask = np.arange(10, dtype=np.int32).reshape(2, 5), np.array([[True] * 5, [False] * 5])
    np.savez(tmp_path / "text.npz", mask=mask, ids=ids)
    (batch,) = taken(tmp_path / "text.npz", TEXT, Text())
    assert batch.name == "text.npz"
    assert [tensor.dtype for tensor in tensors(batch)] == [torch.int64, torch.bool]
    assert torch.equal(tensors(batch)[0], torch.from_numpy(ids).long())
    np.savez_compressed(tmp_path / "one.npz", np.zeros((2, 3, 8, 12)))
    assert taken(tmp_path / "one.npz")[0].name == "one.npz"  # one input and one array: the name does not matter


def test_functions_and_iterables_yield_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data.py").write_text(
        "import numpy, torch\n"
        "def batches():\n    yield torch.zeros(4, 3, 9, 9)\n    yield (numpy.ones((1, 3, 8, 8)),)\n"
        "def broken():\n    yield torch.zeros(4, 3, 9, 9)\n    raise OSError('disk')\n"
        "def labelled():\n    yield [torch.zeros(4, 3, 9, 9), torch.zeros(4)]\n"
        "empty = list\n"
    )
    monkeypatch.chdir(tmp_path)
    batches = taken("own_data:batches")
    assert [batch.name for batch in batches] == ["own_data:batches 0", "own_data:batches 1"]
    assert tensors(batches[1])[0].dtype == torch.float32
    for data, sentence in (
        ("own_data:broken", "failed with OSError: disk"),
        ("own_data:labelled", "has 2 tensors, and the model takes 1; give inputs only, no labels"),
        ("own_data:missing", "own_data has no missing"),
        ("own_data:empty", "is empty"),
        ("no_such_module:f", "no module named no_such_module"),
    ):
        with pytest.raises(InputError, match=sentence):
            taken(data)
    named = Inputs((), {"ids": TEXT.args[0], "mask": TEXT.args[1]})
    made = taken(lambda: [{"mask": TEXT.args[1], "ids": TEXT.args[0] + 1}], named, Text())
    assert torch.equal(made[0].inputs.kwargs["ids"], torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(InputError, match="give the same"):
        taken([{"ids": TEXT.args[0]}], named, Text())
    endless = read(iter(lambda: torch.zeros(1, 3, 8, 8), None), small(), IMAGE, limit=3)
    assert len(endless[0]) == 3
    assert "and there are more" in endless[1][0]


class Objects:
    """Unpickling it would leave a trace."""

    def __reduce__(self) -> Any:
        return (open, ("unpickled", "w"))


def damaged_npz(path: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)


def header_of(shape: tuple[int, ...]) -> bytes:
    made = io.BytesIO()
    np.lib.format.write_array_header_1_0(made, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return made.getvalue()


BAD_ARRAYS = [
    ("a.npy", np.array([Objects()], dtype=object), "holds Python objects, which are never unpickled"),
    ("a.npy", np.zeros((2, 3, 8)), "has shape \\[2, 3, 8\\], 3 dims, where the model's input has 4"),
    (
        "a.npy",
        np.zeros((2, 3, 8, 12), np.uint8),
        "is uint8, and the model's input is float32; convert it, and normalise",
    ),
    ("a.npy", np.zeros((0, 3, 8, 12)), "has no elements"),
    ("a.npy", np.zeros((2, 3, 8, 12), "S3"), "which no model takes"),
    ("a.npy", b"", "is no .npy file that can be read"),
    ("a.npy", b"\x93NUMPY\x01\x00", "is no .npy file that can be read"),
    ("a.npy", b"\x93NUMPY\x09\x00" + b"\0" * 200, "is no .npy file that can be read"),
    ("a.npy", header_of((10**12,)) + b"\0" * 64, "says that it holds 4,000,000,000,000 bytes, and cannot"),
    ("a.npy", header_of((2, 3, 8, 12)) + b"\0" * 64, "and cannot"),
    ("a.npz", b"PK\x03\x04 nothing", "is no .npz file that can be read"),
    ("a.txt", b"text", "is of no known kind"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), BAD_ARRAYS)
def test_a_file_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: Any, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(InputError, match=sentence) as error:
        taken(tmp_path / name)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "unpickled").exists()


def test_bad_npz_files(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((2, 5), np.int64))
    with pytest.raises(InputError, match="has the arrays x, and the model's inputs are ids, mask"):
        taken(path, TEXT, Text())
    np.savez(path, ids=np.zeros((2, 5), np.int64), mask=np.ones((3, 5), bool))
    with pytest.raises(InputError, match=r"differ in their number of rows \(ids 2, mask 3\)"):
        taken(path, TEXT, Text())
    np.savez(path, ids=np.array([Objects()], dtype=object), mask=np.ones((3, 5), bool), allow_pickle=True)
    with pytest.raises(InputError, match="never unpickled"):
        taken(path, TEXT, Text())
    damaged_npz(path, "x.npy", header_of((10**12,)))
    with pytest.raises(InputError, match="and cannot"):
        taken(path)
    damaged_npz(path, "x.pkl", b"")
    with pytest.raises(InputError, match="which is no array"):
        taken(path)
    np.save(tmp_path / "b.npy", np.zeros((2, 5), np.int64))
    with pytest.raises(InputError, match="save them in one"):
        taken(tmp_path / "b.npy", TEXT, Text())
    np.savez(path, ids=np.full((2, 5), 2**40), mask=np.ones((2, 5), bool))
    narrow = Inputs((TEXT.args[0].int(), TEXT.args[1]))
    with pytest.raises(InputError, match="has values that int32, the model's input, does not have"):
        taken(path, narrow, Text())


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("nowhere", "does not exist; give a folder of images"),
        ("/no/where:else", "does not exist"),
        (7, "TypeError"),
        (["text"], "is a str; give tensors"),
        ([torch.zeros(0, 3, 8, 8)], "has no elements"),
        ([], "is empty"),
    ],
)
def test_what_is_no_data_is_one_sentence(data: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        taken(data)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="leaves nothing to compare"):
        taken([torch.zeros(2, 3, 8, 8)], limit=0)


def picture(path: Path, width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    made = Image.fromarray(pixels)
    made.save(path)
    return made


def test_images_are_prepared_as_the_model_says(tmp_path: Path) -> None:
    model = small()
    model.pretrained_cfg = {  # type: ignore[assignment]
        "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.4), "interpolation": "bicubic", "crop_pct": 0.8,
    }  # fmt: skip
    (tmp_path / "more").mkdir()
    image = picture(tmp_path / "b.png", 30, 20)
    picture(tmp_path / "a.png", 9, 40, 1)
    picture(tmp_path / "more" / "c.bmp", 7, 5, 2)
    (tmp_path / "notes.txt").write_text("no image")
    example = Inputs((torch.zeros(1, 3, 8, 12),))
    batches, notes = read(tmp_path, model, example)
    assert [batch.name for batch in batches] == ["a.png", "b.png", "more/c.bmp"]
    assert "cover 10x15, cut to 8x12, minus mean [0.5, 0.4, 0.3]" in notes[0]
    # by hand: 30x20 to cover 15 wide by 10 high is exactly 15x10; the centre of 12x8 begins at (1, 1)
    resized = np.asarray(image.resize((15, 10), Image.Resampling.BICUBIC).crop((1, 1, 13, 9)), np.float32) / 255
    wanted = (resized - np.float32([0.5, 0.4, 0.3])) / np.float32([0.1, 0.2, 0.4])
    np.testing.assert_allclose(tensors(batches[1])[0][0].permute(1, 2, 0).numpy(), wanted, rtol=1e-6, atol=1e-6)
    assert [batch.name for batch in taken(tmp_path, IMAGE, model)] == ["a.png and 1 more", "more/c.bmp"]
    assert taken(tmp_path / "b.png", example, model)[0].name == "b.png"
    assert "the first 1 of 3 images" in read(tmp_path, model, example, limit=1)[1][0]


def test_a_model_that_says_nothing_gets_the_usual_preparation() -> None:
    colour = preparation(small(), Inputs((torch.zeros(1, 3, 8, 8),)))
    assert (colour.mode, colour.interpolation, colour.crop, colour.told) == ("RGB", "bilinear", 0.875, False)
    assert colour.mean == (0.485, 0.456, 0.406)
    grey = preparation(small(), Inputs((torch.zeros(1, 1, 8, 8),)))
    assert (grey.mode, grey.mean, grey.std) == ("L", (0.5,), (0.5,))
    assert "the model does not say" in str(grey)


def test_bad_folders_and_images_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no image"):
        taken(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    with pytest.raises(InputError, match=r"bad.png cannot be read as an image"):
        taken(tmp_path)
    picture(tmp_path / "bad.png", 9, 9)
    cut = (tmp_path / "bad.png").read_bytes()
    (tmp_path / "bad.png").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(InputError, match=r"bad.png cannot be read as an image"):
        taken(tmp_path)
    with pytest.raises(InputError, match=r"images fit models with one floating-point input .* int64 \[2, 5\], bool"):
        taken(tmp_path, TEXT, Text())


def test_the_digest_tells_content_names_and_shapes_apart() -> None:
    one = Batch("a", Inputs((torch.arange(6.0).reshape(2, 3),)))
    assert digest([one]) == digest(
        [Batch("a", Inputs((torch.arange(6.0).reshape(3, 2).T.reshape(2, 3) * 0 + one.inputs.args[0],)))]
    )
    others = [
        Batch("b", one.inputs),
        Batch("a", Inputs((torch.arange(6.0).reshape(3, 2),))),
        Batch("a", Inputs((torch.arange(6.0).reshape(2, 3).double(),))),
        Batch("a", Inputs((torch.arange(6.0).reshape(2, 3) + 1,))),
    ]
    assert len({digest([batch]) for batch in (one, *others)}) == 5
    assert len(digest([Batch("h", Inputs((torch.ones(2, dtype=torch.bfloat16), torch.tensor(True))))])) == 64


def test_verify_and_fuse_compare_on_the_data(tmp_path: Path) -> None:
    model, x = small(), torch.randn(1, 3, 8, 12)
    picture(tmp_path / "cat.png", 30, 20)
    result = reparam.fuse(model, x, data=tmp_path, verify="quick")
    comparison = result.report.comparison
    assert comparison is not None
    assert [(case.name, case.seed, case.status) for case in comparison.cases] == [
        ("example", None, "passed"), ("cat.png", None, "passed"),
    ]  # fmt: skip
    assert comparison.cases[1].outputs[0].algebra_error is not None
    assert any("cat.png" in note or "images of" in note for note in result.report.notes)
    with pytest.raises(InputError, match="verify is off"):
        reparam.fuse(model, x, data=tmp_path, verify="off")
    with pytest.raises(InputError, match="the original cannot run on data 0"):
        reparam.verify(model, model, x, data=[torch.zeros(1, 4, 8, 8)])


class OnlyBright(nn.Module):
    """Wrong where the input is large, which no drawn input shows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.amax((1, 2, 3), keepdim=True) > 1e6, 1.01 * x, x)


def test_a_fault_that_only_the_data_shows_is_found() -> None:
    x = torch.randn(1, 3, 8, 8)
    comparison = reparam.verify(nn.Identity(), OnlyBright(), x, data=[x, x + 1e7])
    assert not comparison.passed
    assert [case.name for case in comparison.cases if case.failures] == ["data 1"]
    assert comparison.failures[0].startswith("data 1: ")
    assert isinstance(NotEquivalentError("", None), reparam.ReparamError)
