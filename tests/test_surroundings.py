"""What the caller has set in torch around the call: inference mode, a default device.

In inference mode tensors do not tell what was written to them. On another default device torch makes every tensor that
names none; `meta`, which holds no values, shows that nothing of reparam's own is there.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from reparam import CaptureError, InputError, benchmark, export_archive, export_onnx, fuse, load, verify
from tests.support import assert_unchanged, relative_error, run, snapshot, static_counts
from tests.zoo.case import conv_bn, randomise


class Counting(nn.Module):
    """Multiplies by how often it was called, which a buffer counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv_bn(2, 3, 4, 3), nn.ReLU(), conv_bn(2, 4, 4, 3))
        self.register_buffer("calls", torch.zeros(()))
        self.calls: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.layers(x) * self.calls  # type: ignore[no-any-return]


def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    return randomise(nn.Sequential(conv_bn(2, 3, 4, 3), nn.ReLU(), conv_bn(2, 4, 4, 3))).eval()


def test_everything_works_in_inference_mode(tmp_path: Path) -> None:
    original = model()
    before = snapshot(original)
    with torch.inference_mode():
        result = fuse(original, image())
        assert torch.is_inference_mode_enabled()
        assert verify(original, result.module, image()).passed
        export_onnx(result.module, image(), tmp_path / "model.onnx")
        export_archive(result.module, image(), tmp_path / "model.pt2")
        again = load(tmp_path / "model.pt2")
        timing = benchmark(
            {"original": original, "fused": result.module}, image(), backends=("eager",), max_seconds=0.2
        )
    assert_unchanged(before, original)
    assert static_counts(result.module)["bn"] == 0
    assert not any(tensor.is_inference() for tensor in result.module.state_dict().values())
    assert relative_error(run(original, image()), run(result.module, image())) < 1e-5
    assert relative_error(run(result.module, image()), run(again, image())) < 1e-5
    assert timing.samples


def test_what_was_made_in_inference_mode_can_be_fused_anywhere() -> None:
    with torch.inference_mode():
        made, x = model(), image()
        inside = fuse(made, x)
    assert made.get_parameter("0.0.weight").is_inference()
    for result in (inside, fuse(made, x)):
        assert result.report.comparison is not None
        assert result.report.comparison.passed
        assert static_counts(result.module)["bn"] == 0
        assert relative_error(run(made, x), run(result.module, x)) < 1e-5


def test_writes_to_buffers_are_seen_in_inference_mode() -> None:
    with torch.inference_mode():
        original = randomise(Counting()).eval()
        result = fuse(original, image())
        assert original.get_buffer("calls").item() == 0
        for _ in range(3):
            assert relative_error(original(image()), result.module(image())) < 1e-5


class Varied(nn.Module):
    """Branches, a shuffle of channels, attention and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_bn(2, 3, 8, 3), conv_bn(2, 3, 8, 1)])
        self.shuffle = nn.Sequential(nn.Conv2d(8, 8, 1, groups=8), nn.ChannelShuffle(2))
        self.tokens = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 24))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.shuffle(torch.relu(self.branches[0](x) + self.branches[1](x)))
        query, key, value = self.tokens(y.flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        scores = (query @ key.transpose(1, 2) / 8**0.5).softmax(-1)
        return self.head((scores @ value).mean(1))  # type: ignore[no-any-return]


def test_nothing_is_made_on_the_default_device(tmp_path: Path) -> None:
    original, x = randomise(Varied()).eval(), image()
    wrong = copy.deepcopy(original)
    with torch.no_grad():
        wrong.get_submodule("branches.0.0").weight.mul_(1.001)  # type: ignore[operator, union-attr]
    torch.set_default_device("meta")
    try:
        result = fuse(original, x)
        assert verify(original, result.module, x, level="thorough", data=[x]).passed
        assert not verify(original, wrong, x).passed
        half = fuse(copy.deepcopy(original).to(torch.bfloat16), x.to(torch.bfloat16))
        export_onnx(result.module, x, tmp_path / "model.onnx")
        export_archive(result.module, x, tmp_path / "model.pt2")
        again = load(tmp_path / "model.pt2")
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)
    assert static_counts(result.module)["bn"] == 0
    assert half.report.comparison is not None
    assert half.report.comparison.passed
    assert relative_error(run(original, x), run(result.module, x)) < 1e-5
    assert relative_error(run(result.module, x), run(again, x)) < 1e-5


class Bound(nn.Module):
    """Calls itself through a function that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = conv_bn(2, 3, 4, 3)
        self.call = lambda x: self.layers(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.call(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_its_own_copy_calls_is_left_as_it_was(dtype: torch.dtype) -> None:
    model, x = randomise(Bound()).train().to(dtype), image().to(dtype)
    before = snapshot(model)
    itself = "changes (its own buffers|the buffers of the model itself), though a copy of it runs"
    # In float64 no cast parts the copy from the model, so that nothing else tells.
    sentence = itself if dtype == torch.float64 else f"{itself}|it runs them as it is, and not in float64"
    with pytest.raises((InputError, CaptureError), match=sentence):
        fuse(model, x)
    with pytest.raises((InputError, CaptureError), match=sentence):
        fuse(model, x, verify=False)
    with pytest.raises(InputError, match=sentence):
        verify(model, model, x)
    with pytest.raises(InputError, match=sentence):
        verify(model, torch.compile(nn.Identity(), backend="eager"), x)
    assert_unchanged(before, model)
