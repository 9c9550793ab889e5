"""Real networks, fused and exported: other batch and image sizes, no BatchNorm, as many convolutions as the module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reparam import fuse
from reparam.export import OnnxSession, export_archive, export_onnx
from tools import timm_zoo

torch.set_num_threads(1)

CASES = [("resnet18", 20), ("mobilenetv2_100", 52)]
SIZES = [(1, 64, 64), (3, 64, 64), (2, 96, 64), (1, 75, 81)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "convs"), CASES)
def test_fused_network_exports_with_open_axes(name: str, convs: int, tmp_path: Path) -> None:
    model = timm_zoo.create(name)
    fused = fuse(model, torch.randn(1, 3, 64, 64), verify=False).module
    file = export_onnx(fused, torch.randn(1, 3, 64, 64), tmp_path / "net.onnx")
    assert file.nodes["Conv"] == convs
    assert "BatchNormalization" not in file.nodes
    assert [set(axes) for axes in file.dynamic_axes.values()] == [{0, 2, 3}]
    assert file.checked
    assert file.notes == ()
    loaded = torch.export.load(str(export_archive(fused, torch.randn(1, 3, 64, 64), tmp_path / "net.pt2"))).module()
    session = OnnxSession(file.path, threads=1)
    for batch, height, width in SIZES:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            expected = model(x)
        scale = expected.abs().max()
        for candidate in (session, loaded):
            assert (candidate(x) - expected).abs().max() < 1e-4 * scale
