"""Archives of torch.export and TorchScript: loaded without running their code, and fused like the model in them."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import reparam
from reparam.capture.archives import example_of
from reparam.capture.examples import example_inputs
from reparam.capture.scripts import graph_of_script
from reparam.errors import CaptureError, InputError, OtherInputError
from reparam.inputs import Inputs
from tests.support import sampled
from tests.zoo.case import randomise


class Net(nn.Module):
    """A dict goes in and a dict comes out; the batch size decides a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.table = torch.ones(3)

    def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        y = self.norm(self.conv(x)).relu()
        if x.shape[0] > 4:
            y = y * 2
        return {"a": y.mean((2, 3)) + more["q"].sum(), "b": self.table * 2}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.heads = nn.ModuleList([nn.Linear(8, 5), nn.Linear(5, 5)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        y = self.body(x).flatten(1)
        for head in self.heads:
            y = head(y).relu()
        return y, {"twice": y * 2}


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Plain()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)[0]
        if y.shape[0] > 100:
            y = y * 2
        return y


def ready(model: nn.Module) -> nn.Module:
    randomise(model)
    return model.eval()


def archived(folder: Path, model: nn.Module, args: tuple[Any, ...], shapes: Any) -> Path:
    torch.export.save(torch.export.export(model, args, dynamic_shapes=shapes), folder / "model.pt2")
    return folder / "model.pt2"


def scripted(folder: Path, model: nn.Module, traced_on: torch.Tensor | None = None) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.script(model) if traced_on is None else torch.jit.trace(model, traced_on, strict=False)
        torch.jit.save(made, folder / "model.ts")
    return folder / "model.ts"


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_an_exported_program_is_fused_with_its_own_example(tmp_path: Path) -> None:
    model = ready(Net())
    auto = Dim.AUTO
    example = (image(8, 3, 12, 12), {"q": image(3)})
    path = archived(tmp_path, model, example, ({0: auto, 2: auto, 3: auto}, {"q": {0: auto}}))

    loaded = reparam.load(path)
    inputs, specs = example_inputs(loaded)
    assert [tuple(tensor.shape) for tensor in inputs.tensors()] == [(8, 3, 12, 12), (3,)] == [s.shape for s in specs]
    result = reparam.fuse(loaded, inputs)

    assert result.report.after.batch_norms == 0
    other = (image(6, 3, 9, 10, seed=1), {"q": image(5, seed=2)})
    expected, actual = model(*other), result.module(*other)
    assert list(actual) == ["a", "b"]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(OtherInputError, match=r"Guard failed: x.size\(\)\[0\] >= 5"):
        result.module(image(2, 3, 9, 10), other[1])
    torch.testing.assert_close(pickle.loads(pickle.dumps(result.module))(*other), actual)


def test_a_given_input_is_drawn_and_not_taken_from_the_archive(tmp_path: Path) -> None:
    path = archived(tmp_path, ready(Plain()), (image(2, 3, 12, 12),), ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},))
    inputs, _ = example_inputs(reparam.load(path), ["4x3x16x16"])
    assert [tuple(tensor.shape) for tensor in inputs.tensors()] == [(4, 3, 16, 16)]


def test_a_model_without_archive_has_no_example() -> None:
    assert example_of(nn.Linear(2, 2)) is None


def test_loading_and_fusing_an_archive_warns_of_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = archived(tmp_path, ready(Plain()), (image(2, 3, 12, 12),), ({0: Dim.AUTO},))
    recwarn.clear()
    loaded = reparam.load(path)
    reparam.fuse(loaded, example_inputs(loaded)[0])
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("traced", sampled([False, True], 2), ids=["scripted", "traced"])
@pytest.mark.parametrize("batch", sampled([1, 3], 2))
def test_torchscript_is_converted_and_fused(tmp_path: Path, traced: bool, batch: int) -> None:
    model = ready(Plain())
    x = image(batch, 3, 12, 12)
    loaded = reparam.load(scripted(tmp_path, model, x if traced else None))
    assert isinstance(loaded, torch.jit.ScriptModule)

    result = reparam.fuse(loaded, x)

    assert (result.report.model, result.report.before.batch_norms, result.report.after.batch_norms) == ("Plain", 1, 0)
    assert result.report.before.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert result.report.comparison is not None
    assert result.report.comparison.passed
    for other in (image(1, 3, 9, 9), image(5, 3, 14, 11)):
        expected, actual = model(other), result.module(other)
        assert isinstance(actual, tuple)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_decision_in_torchscript_is_a_guard_of_the_fused_model(tmp_path: Path) -> None:
    loaded = reparam.load(scripted(tmp_path, ready(Deciding())))
    result = reparam.fuse(loaded, image(2, 3, 12, 12))
    assert any("shape[0] == 2" in note for note in result.report.notes)
    with pytest.raises(OtherInputError):
        result.module(image(101, 3, 12, 12))


class LoopsOnValues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while bool(x.sum() < 10):
            x = x + 1
        return x


def test_torchscript_that_cannot_be_converted_is_one_sentence(tmp_path: Path) -> None:
    loaded = reparam.load(scripted(tmp_path, LoopsOnValues().eval()))
    with pytest.raises(CaptureError, match="fuse the PyTorch model that was compiled") as caught:
        reparam.fuse(loaded, torch.zeros(2, 3))
    assert "\n" not in str(caught.value)


def test_torchscript_takes_positional_inputs(tmp_path: Path) -> None:
    loaded = reparam.load(scripted(tmp_path, ready(Plain())))
    assert isinstance(loaded, torch.jit.ScriptModule)
    with pytest.raises(CaptureError, match="positional inputs only"):
        graph_of_script(loaded, Inputs.of({"x": image(2, 3, 12, 12)}))


class Holder(nn.Module):
    def __init__(self, inner: nn.Module, stops: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.inner, self.stops = inner, stops

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        if self.stops:
            y = torch.from_numpy(y.detach().numpy() * 2)
        return self.inner(y)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("capture", ["auto", "modules"])
@pytest.mark.parametrize("stops", [False, True])
def test_torchscript_inside_of_a_model_stays(capture: str, stops: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ready(Holder(torch.jit.script(Plain().eval()), stops))
    x = image(2, 3, 12, 12)
    result = reparam.fuse(model, x, capture=capture)
    # the BatchNorm outside is folded; what is compiled cannot be looked into
    assert not any(isinstance(module, nn.BatchNorm2d) for module in result.module.modules())
    assert any(isinstance(module, torch.jit.ScriptModule) for module in result.module.modules())
    torch.testing.assert_close(result.module(x), model(x), rtol=1e-5, atol=1e-5)
    assert any("compiled (TorchScript)" in note and "inner" in note for note in result.report.notes)


def test_layers_around_torchscript_are_fused() -> None:
    class Around(nn.Module):
        """No part of it but the layers themselves could be captured alone."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.conv, self.norm = inner, nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(self.inner(x)))  # type: ignore[no-any-return]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval(), image(2, 3, 12, 12))
    model = ready(Around(traced))
    result = reparam.fuse(model, image(2, 3, 12, 12))
    assert result.report.capture == "symbolic"
    assert (result.report.after.convolutions, result.report.after.batch_norms) == (1, 0)
    (note,) = result.report.notes
    assert note == "inner: compiled (TorchScript) and left as it is; what it was compiled from would be fused"
    torch.testing.assert_close(result.module(image(3, 3, 9, 9)), model(image(3, 3, 9, 9)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("option", [{"arch": lambda: nn.Linear(2, 2)}, {"key": "model"}], ids=["arch", "key"])
def test_an_archive_holds_the_whole_model(tmp_path: Path, option: dict[str, Any]) -> None:
    path = archived(tmp_path, ready(Plain()), (image(2, 3, 12, 12),), None)
    with pytest.raises(InputError, match="holds the whole model; leave out --"):
        reparam.load(path, **option)
    with pytest.raises(InputError, match="holds the whole model; leave out --"):
        reparam.load(scripted(tmp_path, ready(Plain())), **option)


def test_nan_in_an_archive_is_found(tmp_path: Path) -> None:
    model = ready(Plain())
    with torch.no_grad():
        model.body[0].weight[0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        reparam.load(archived(tmp_path, model, (image(2, 3, 12, 12),), None))


def test_a_compiled_model_without_input_is_called_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="input size of Plain is not known"):
        example_inputs(reparam.load(scripted(tmp_path, ready(Plain()))))
