"""Inside of `torch.inference_mode()`, where tensors do not tell what was written to them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from reparam import benchmark, export_archive, export_onnx, fuse, load, verify
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


def test_everything_works_there(tmp_path: Path) -> None:
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


def test_what_was_made_there_can_be_fused_anywhere() -> None:
    with torch.inference_mode():
        made, x = model(), image()
        inside = fuse(made, x)
    assert made.get_parameter("0.0.weight").is_inference()
    for result in (inside, fuse(made, x)):
        assert result.report.comparison is not None
        assert result.report.comparison.passed
        assert static_counts(result.module)["bn"] == 0
        assert relative_error(run(made, x), run(result.module, x)) < 1e-5


def test_writes_to_buffers_are_seen_there() -> None:
    with torch.inference_mode():
        original = randomise(Counting()).eval()
        result = fuse(original, image())
        assert original.get_buffer("calls").item() == 0
        for _ in range(3):
            assert relative_error(original(image()), result.module(image())) < 1e-5
