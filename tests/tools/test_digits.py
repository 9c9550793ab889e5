"""The trained digits network: what the demo claims, and that its check can fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import reparam
from examples.digits import accuracy, build, load_digits
from tools import check_digits
from tools.train_digits import save_atomically, shifted

WEIGHTS = Path(__file__).resolve().parents[2] / "examples" / "digits.safetensors"


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = build()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


@pytest.fixture(scope="module")
def fused(trained: nn.Module) -> nn.Module:
    return reparam.fuse(trained, torch.zeros(1, 1, 8, 8), verify="off").module


@pytest.fixture(scope="module")
def files(fused: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `reparam fuse` writes."""
    folder = tmp_path_factory.mktemp("digits")
    save_archive(fused, folder / "digits.fused.pt2")
    reparam.export_onnx(fused, torch.zeros(2, 1, 8, 8), folder / "digits.fused.onnx")
    return folder


def save_archive(module: nn.Module, path: Path) -> None:
    batch = torch.export.Dim.DYNAMIC
    torch.export.save(torch.export.export(module, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},)), path)


def break_archive(path: Path) -> None:
    save_archive(build().eval(), path)


def break_onnx(path: Path) -> None:
    """Rotates the biases of the ten classes, far enough to change answers."""
    model = onnx.load(path)
    (bias,) = (tensor for tensor in model.graph.initializer if list(tensor.dims) == [10])
    bias.CopyFrom(onnx.numpy_helper.from_array(np.linspace(0, 9, 10, dtype=np.float32), bias.name))
    onnx.save(model, path)


def test_split_is_fixed_and_disjoint() -> None:
    digits = load_digits()
    assert (len(digits.train_labels), len(digits.held_out_labels)) == (1347, 450)
    assert digits.held_out_labels.bincount().min() >= 43
    train, held_out = (
        {image.numpy().tobytes() for image in part} for part in (digits.train_images, digits.held_out_images)
    )
    assert not train & held_out


def test_trained_network_is_right_on_held_out_images(trained: nn.Module) -> None:
    digits = load_digits()
    with torch.no_grad():
        assert accuracy(trained(digits.held_out_images), digits.held_out_labels) > 0.99


def test_fused_network_gives_every_image_its_answer(trained: nn.Module, fused: nn.Module) -> None:
    images = load_digits().held_out_images
    with torch.no_grad():
        assert torch.equal(fused(images).argmax(1), trained(images).argmax(1))
    assert sum(isinstance(module, nn.Conv2d) for module in fused.modules()) == 7
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


@pytest.mark.slow
def test_check_passes_on_the_fused_network(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_digits.check(files)
    assert capsys.readouterr().out.count("450 of 450") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sabotage"), [("digits.fused.pt2", break_archive), ("digits.fused.onnx", break_onnx)])
def test_check_fails_when_one_file_answers_differently(
    name: str,
    sabotage: Callable[[Path], None],
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(files, tmp_path / "files")
    sabotage(folder / name)
    monkeypatch.setattr("sys.argv", ["check_digits.py", str(folder)])
    with pytest.raises(SystemExit) as end:
        check_digits.main()
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert printed.out.count("450 of 450") == 1
    assert "NOT the same" in printed.err


def test_check_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["check_digits.py", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        check_digits.main()
    assert end.value.code == 2
    assert "has no digits.fused.pt2 and no digits.fused.onnx" in capsys.readouterr().err


def test_weights_are_written_whole_and_readable_by_all(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "new" / "weights.safetensors"
    save_atomically(trained, path)
    state = load_file(path)
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.state_dict().items())
    assert [entry.name for entry in path.parent.iterdir()] == ["weights.safetensors"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_augmentation_keeps_shapes_and_most_of_the_ink() -> None:
    images = load_digits().train_images[:32]
    moved = shifted(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert 0.7 < (moved.sum() / images.sum()) < 1.05
