"""TorchScript in memory: it is fused in its inference form, and compared for what its code says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reparam import CaptureError, ExportError, InputError, export_archive, export_onnx, fuse, verify
from reparam.equivalence.scripted import names_narrow_dtypes
from tests.equivalence.nets import randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated", "ignore:.*jit.script.*:DeprecationWarning")


def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


class Trained(nn.Module):
    """Answers otherwise in train mode, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1.0)
        x = self.drop(self.norm(self.conv(x)))
        if self.training:
            return x * 2.0
        return x * self.calls


class Casting(nn.Module):
    """Names float32 in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        return torch.softmax(x, -1, dtype=torch.float32) + torch.arange(6, dtype=torch.float32)


class Following(Casting):
    """Names no dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)).to(x.dtype))


def ready(model: nn.Module) -> Any:
    return randomise(model, seed=0)


@pytest.mark.parametrize("training", [False, True])
def test_it_is_fused_in_its_inference_form_and_left_alone(training: bool) -> None:
    model, x = ready(Trained()), image()
    script = torch.jit.script(copy.deepcopy(model).train(training))
    result = fuse(script, x)
    torch.testing.assert_close(result.module(x), model.eval()(x))
    assert result.report.after.batch_norms == 0
    assert script.training is training
    assert float(script.calls) == 0.0
    said = [note for note in result.report.notes if "train mode" in note]
    assert said == (["the model was in train mode; its inference form was taken (eval mode)"] if training else [])


def test_frozen_scripts_are_fused() -> None:
    model = ready(Following()).eval()
    frozen, x = torch.jit.freeze(torch.jit.script(model)), image()
    result = fuse(frozen, x)
    torch.testing.assert_close(result.module(x), model(x))
    assert not result.report.notes


def test_an_original_that_float64_does_not_reach_is_told_so() -> None:
    model = ready(Following()).eval()
    frozen = torch.jit.freeze(torch.jit.script(model))
    with pytest.raises(InputError, match=r"and not in float64, which is held to be the truth .* frozen TorchScript"):
        verify(frozen, model, image())
    assert verify(model, frozen, image()).passed


@pytest.mark.parametrize("compile_it", [torch.jit.script, lambda model: torch.jit.trace(model, image())])
def test_right_code_that_names_dtypes_agrees_and_wrong_does_not(compile_it: Any) -> None:
    model, x = ready(Casting()).eval(), image()
    right = compile_it(copy.deepcopy(model))
    for a, b in ((model, right), (right, model), (right, fuse(model, x).module), (model, nn.Sequential(right).eval())):
        comparison = verify(a, b, x)
        assert comparison.passed
        assert any("TorchScript code names dtypes" in note for note in comparison.notes)
    wrong = copy.deepcopy(model)
    wrong.conv.weight.data[0].mul_(1.001)
    assert not verify(model, compile_it(wrong), x).passed
    assert not verify(right, wrong, x).passed


def test_code_that_names_no_dtype_is_held_to_the_algebra() -> None:
    model, x = ready(Following()).eval(), image()
    comparison = verify(model, torch.jit.script(model), x)
    assert comparison.passed
    assert not comparison.notes
    assert comparison.algebra_error == 0.0


def test_which_code_names_dtypes() -> None:
    casting, following, x = Casting().eval(), Following().eval(), image()
    for make in (torch.jit.script, lambda model: torch.jit.trace(model, x)):
        assert names_narrow_dtypes(make(casting))
        assert names_narrow_dtypes(nn.Sequential(make(casting)))
    assert not names_narrow_dtypes(torch.jit.script(following))
    assert names_narrow_dtypes(torch.jit.freeze(torch.jit.script(following))), "its weights are constants of its code"
    assert not names_narrow_dtypes(casting), "what is no TorchScript is widened"


@pytest.mark.parametrize("export", [export_onnx, export_archive])
def test_it_is_not_exported_as_it_is(export: Any, tmp_path: Any) -> None:
    with pytest.raises(ExportError, match=r"TorchScript cannot be exported as it is; reparam\.fuse makes"):
        export(torch.jit.script(Following().eval()), image(), tmp_path / "model")
    assert not [*tmp_path.iterdir()]


def test_a_script_that_cannot_be_copied_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    script = torch.jit.script(Following().eval())

    def fails(self: Any, memo: Any) -> Any:
        raise RuntimeError("Tried to serialize object without a __getstate__")

    monkeypatch.setattr(type(script), "__deepcopy__", fails, raising=False)
    with pytest.raises(CaptureError, match=r"it cannot be copied \(Tried to serialize .*; fuse the PyTorch model"):
        fuse(script, image())


def test_in_float64_it_is_held_against_what_float32_costs() -> None:
    eager = ready(Casting()).eval().double()
    original, x = torch.jit.script(eager), image().double()
    comparison = verify(original, eager, x)
    assert comparison.passed
    assert comparison.outputs[0].numeric_ratio is not None
    for much in (1e-3, 0.1, 10.0):
        wrong = copy.deepcopy(eager)
        with torch.no_grad():
            wrong.norm.weight.mul_(1 + much)
        assert not verify(original, wrong, x).passed


def test_a_dtype_that_an_attribute_holds_is_a_name() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kind = torch.float32

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(x.to(self.kind)).to(x.dtype)

    Held.__annotations__ = {"kind": torch.dtype}  # as text, which it is in this file, TorchScript does not know it
    assert names_narrow_dtypes(torch.jit.script(Held()))
    assert not names_narrow_dtypes(torch.jit.script(Following()))


def test_a_function_that_is_an_attribute_is_copied_as_itself() -> None:
    model = ready(Casting()).eval()
    model.function = torch.jit.script(torch.nn.functional.relu6)
    assert verify(model, model, image()).passed
    assert fuse(model, image()).module is not None
