"""float16 files: judged against the float64 truth with the float16 model's own noise; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from reparam import fuse, verify
from reparam.equivalence.precision import deployment_dtype
from reparam.errors import ExportError, NotEquivalentError
from reparam.export import OnnxSession, export_onnx
from reparam.export.half import in_float16
from reparam.inputs import Inputs
from tests.export import nets
from tests.export.test_check import sabotaged
from tests.export.test_onnx import image

torch.set_num_threads(1)


@pytest.mark.parametrize("io", [False, True], ids=["float32 outside", "float16 outside"])
def test_a_fused_model_in_float16(io: bool, tmp_path: Path) -> None:
    model = nets.lively(nets.Plain())
    fused = fuse(model, image(), verify=False).module
    file = export_onnx(
        fused, image(), tmp_path / "n.onnx", float16=True, float16_io=io, original=model, dynamic_size=False
    )
    outside = "float16" if io else "float32"
    assert file.float16
    assert file.dtypes == {"image": outside, "output": outside}
    assert file.notes == ()
    graph = onnx.load(str(file.path)).graph
    assert {tensor.data_type for tensor in graph.initializer if tensor.dims} <= {10, 7}  # FLOAT16, INT64
    assert {tensor.name for tensor in graph.initializer} >= {"conv.weight", "fc.weight"}
    comparison = file.comparison
    assert comparison is not None
    assert comparison.passed
    assert 1e-5 < comparison.numeric_error < 2 * comparison.original_noise
    x = image(3)
    got = OnnxSession(file.path)(x.half() if io else x)
    assert got.dtype == (torch.float16 if io else torch.float32)
    torch.testing.assert_close(got.float(), model(x), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_the_noise_of_float16_excuses_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias that is off by a hundredth: nothing that the coarse check of a float16 file would see."""

    def change(graph: Any) -> None:
        bias = next(tensor for tensor in graph.initializer if tensor.name == "fc.bias")
        array = onnx.numpy_helper.to_array(bias).copy()
        bias.CopyFrom(onnx.numpy_helper.from_array((array + 0.01).astype("float16"), bias.name))

    monkeypatch.setattr("reparam.export.staged.check_weights", lambda model, weights: None)
    sabotaged(monkeypatch, change)
    with pytest.raises(NotEquivalentError, match=r"does not agree with the original model: .*times what is allowed"):
        export_onnx(nets.lively(nets.Plain()), image(), tmp_path / "n.onnx", float16=True, dynamic_size=False)
    assert list(tmp_path.iterdir()) == []


class Large(nn.Module):
    """An activation beyond 65504."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1e6


class Typed(nn.Module):
    """Makes float32 tensors, whatever the input is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x + torch.ones(4, dtype=torch.float32))


def heavy() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.weight.data[1, 2] = 1e5
    return layer


REFUSED = [
    (Large(), r"Large overflows in float16: 8 of 8 elements .* infinite"),
    (Typed(), r"Typed does not run in float16: .* \(test_half\.py:\d+\); export it in its own dtype"),
    (heavy(), r"Linear does not fit float16: the weight weight holds values beyond 65504"),
]


@pytest.mark.parametrize(("module", "words"), REFUSED, ids=["activations", "dtypes", "weights"])
def test_what_float16_cannot_do_is_refused(module: nn.Module, words: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=words):
        export_onnx(module.eval(), torch.ones(2, 4), tmp_path / "n.onnx", float16=True)
    assert list(tmp_path.iterdir()) == []


def test_the_wrapper_is_called_like_the_module_and_shares_nothing() -> None:
    model, x = nets.TwoInputs().eval(), (image(), image(channels=2))
    narrow = in_float16(model, Inputs.of(x), io=False)
    assert deployment_dtype(narrow, Inputs.of(x)) == torch.float16
    assert deployment_dtype(model, Inputs.of(x)) == torch.float32
    got = narrow(left=x[0], right=x[1])
    assert list(got) == ["sum", "left_only"]
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}
    assert in_float16(model, Inputs.of(x), io=True)(*x)["sum"].dtype == torch.float16


@pytest.mark.parametrize(("error", "passes"), [(0.0, True), (1e-3, True), (0.1, False)])
def test_a_deployed_original_lends_its_noise_and_no_more(error: float, passes: bool) -> None:
    model, x = nn.Linear(64, 64).eval(), torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    narrow = in_float16(model, Inputs.of(x), io=False)

    def candidate(given: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return narrow(given) * (1 + 0.1 * error)  # type: ignore[no-any-return]

    comparison = verify(model, candidate, x, deployed=narrow, vary_shapes=False)
    assert comparison.passed is passes
    assert not verify(model, narrow.forward, x, vary_shapes=False).passed, "without it float32 noise is the bar"
