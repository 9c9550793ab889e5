"""Operations that an ONNX file spells in another way than the exporter would."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reparam.export import OnnxSession, export_onnx
from reparam.export.proto import _with_all_constants
from tests.export.test_onnx import image
from tests.support import sampled


class _Attention(nn.Module):
    def __init__(self, mask: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x * 0.5, x + 1, attn_mask=self.mask)


SHAPES = [(3, 5, 4), (2, 3, 5, 4), (2, 3, 2, 5, 4), (2, 3, 1, 2, 5, 4)]


@pytest.mark.parametrize(
    ("shape", "masked"),
    sampled([(shape, masked) for shape in SHAPES for masked in ("no", "by two axes", "by all axes")], 4),
)
def test_attention_on_any_number_of_axes(shape: tuple[int, ...], masked: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = {
        "no": None,
        "by two axes": torch.randn(5, 5, generator=generator),
        "by all axes": torch.randn(1, *shape[1:-1], 5, generator=generator),
    }
    model, x = _Attention(masks[masked]).eval(), torch.randn(*shape, generator=generator)
    file = export_onnx(model, x, tmp_path / "attention.onnx", dynamic_size=False)
    assert file.checked
    other = torch.randn(shape[0] + 1, *shape[1:], generator=generator)
    torch.testing.assert_close(OnnxSession(file.path)(other), model(other), rtol=1e-4, atol=1e-5)


class _Averages(nn.Module):
    """Averages of channels-last tensors, in every spelling; and a pooling that is none."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(size)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.conv(x).permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)
        pooled = F.adaptive_avg_pool2d(y, output_size=[1, 1])
        return (
            self.pool(y),
            pooled.flatten(1),
            F.adaptive_avg_pool1d(y.flatten(2), 1),
            F.adaptive_avg_pool3d(y, (1, 1, 1)),
        )


@pytest.mark.parametrize("size", sampled([1, [1, 1], [1, 2]], 3), ids=str)
def test_an_average_is_one_mean(size: Any, tmp_path: Path) -> None:
    """As a pooling to size 1 it also sets strides, which the exporter writes as a Gather at computed indices."""
    model = _Averages(size).eval()
    file = export_onnx(model, image(2), tmp_path / "averages.onnx")
    types = Counter(node.op_type for node in onnx.load(file.path).graph.node)
    if size != [1, 2]:
        assert not {"Gather", "Range", "AveragePool"} & types.keys()
        assert types["ReduceMean"] == 3  # two of the four are one
    session, x = OnnxSession(file.path), image(3)
    for got, wanted in zip(session(x), model(x), strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_constants_that_the_exporter_left_out_are_held() -> None:
    """Its optimisation may fold a chain into a value that no node makes and the graph does not hold."""
    x, lost, held = (ir.Value(name=name) for name in ("x", "bound", "bound"))
    lost.const_value, held.const_value = (ir.tensor(np.float32(number), name="bound") for number in (6.0, 0.0))
    for value in (x, lost, held):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2] if value is x else [])
    clip = ir.node("Clip", [x, held, lost], name="clip")
    clip.outputs[0].type, clip.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2])
    graph = ir.Graph([x], clip.outputs, nodes=[clip], initializers=[held], opset_imports={"": 20}, name="clips")
    _with_all_constants(graph)
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.array([-1.0, 9.0], np.float32)})[0].tolist() == [0.0, 6.0]
