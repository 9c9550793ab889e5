"""Archives: load without the model's class, answer at other sizes, refuse sizes the graph does not hold for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import reparam
from reparam.errors import ExportError
from reparam.export import export_archive
from reparam.inputs import Inputs
from tests.export import nets

torch.set_num_threads(1)


def image(batch: int = 1, height: int = 16, width: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, height, width)


ACCEPT: list[tuple[str, nn.Module, Any, list[Any]]] = [
    ("plain", nets.Plain(), image(), [image(3), image(1, 33, 20), image(2, 8, 8)]),
    ("flatten", nets.Flattened(), image(), [image(5)]),
    ("adaptive pooling", nets.Pooled(), image(), [image(3), image(2, 32, 64)]),
    (
        "two inputs",
        nets.TwoInputs(),
        (image(), image(channels=2)),
        [(image(4, 20, 24), image(4, 20, 24, channels=2))],
    ),
    (
        "keywords in another order",
        nets.Keywords(),
        {"shift": torch.randn(4, 1, 1), "x": image()},
        [{"shift": torch.randn(4, 1, 1), "x": image(3)}],
    ),
    ("batch in the code", nets.OneImage(), image(), [image()]),
]


@pytest.mark.parametrize(("name", "module", "example", "others"), ACCEPT, ids=[row[0] for row in ACCEPT])
def test_archive_answers_like_the_module(
    name: str, module: nn.Module, example: Any, others: list[Any], tmp_path: Path
) -> None:
    nets.lively(module)
    path = export_archive(module, example, tmp_path / "net.pt2", metadata={"by": "test"})
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]
    extra = {"reparam.json": ""}
    loaded = torch.export.load(str(path), extra_files=extra).module()
    facts = json.loads(extra["reparam.json"])
    assert facts["metadata"] == {"by": "test"}
    assert facts["torch"] == torch.__version__
    assert set(facts["dynamic_axes"]) == set(Inputs.of(example).kwargs or facts["dynamic_axes"])
    for call in [example, *others]:
        inputs = Inputs.of(call)
        torch.testing.assert_close(inputs.call(loaded), inputs.call(module))


class Named(nn.Module):
    """Returns a dict with a list in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.layer(x)
        return {"mean": y.mean((2, 3)), "both": [y, (y + 1, y - 1)]}


@pytest.mark.parametrize("ours", [True, False], ids=["written by reparam", "written by torch alone"])
def test_containers_of_a_graph_module_stay_plain_and_load_unasked(ours: bool, tmp_path: Path) -> None:
    model, path = nets.lively(Named()), tmp_path / "net.pt2"
    if ours:
        fused = reparam.fuse(model, image(2)).module
        answer = torch.export.load(export_archive(fused, image(2), path)).module()(image(2))
        assert (type(answer), type(answer["both"]), type(answer["both"][1])) == (dict, list, tuple)
    else:
        torch.export.save(torch.export.export(torch.fx.symbolic_trace(model), (image(2),)), path)
    loaded = reparam.load(path)
    answer = loaded(image(2))
    assert (type(answer), type(answer["both"]), type(answer["both"][1])) == (dict, list, tuple)
    assert reparam.verify(model, loaded, image(2), level="quick").passed


def test_open_axes_are_written_down(tmp_path: Path) -> None:
    extra = {"reparam.json": ""}
    torch.export.load(str(export_archive(nets.Plain().eval(), image(), tmp_path / "a.pt2")), extra_files=extra)
    axes = json.loads(extra["reparam.json"])["dynamic_axes"]
    assert axes == {"image": {"0": "batch", "2": "height", "3": "width"}}


def test_archive_refuses_a_size_for_which_the_graph_does_not_hold(tmp_path: Path) -> None:
    path = export_archive(nets.Padded().eval(), image(), tmp_path / "a.pt2")
    loaded = torch.export.load(str(path)).module()
    assert loaded(image(2, 24)).shape == (2, 4, 24, 16)
    with pytest.raises(AssertionError, match="Guard failed"):
        loaded(image(2, 25))


@pytest.mark.slow
def test_archive_loads_without_the_class(tmp_path: Path) -> None:
    module, x = nets.lively(nets.Plain()), image(2)
    path = export_archive(module, x, tmp_path / "a.pt2")
    torch.save({"x": x, "y": module(x).detach()}, tmp_path / "io.pt")
    code = (
        f"import torch; io = torch.load({str(tmp_path / 'io.pt')!r}); m = torch.export.load({str(path)!r}).module(); "
        "torch.testing.assert_close(m(io['x']).detach(), io['y'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


REFUSE: list[tuple[nn.Module, Any, str]] = [
    (nets.Noisy(), image(), r"torch\.export cannot capture Noisy: .*nets\.py:\d+"),
    (nets.Plain(), image(channels=4), "Plain fails on the example inputs"),
    (nets.Plain(), {"picture": image()}, "example_inputs do not fit Plain.forward"),
]


@pytest.mark.parametrize(("module", "example", "message"), REFUSE)
def test_failures_are_one_sentence_and_leave_no_file(
    module: nn.Module, example: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_archive(module.eval(), example, tmp_path / "a.pt2")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_target_that_cannot_be_written(tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "nowhere" / "a.pt2"):
        with pytest.raises(ExportError, match=r"is a folder|cannot be written"):
            export_archive(nets.Plain().eval(), image(), target)
