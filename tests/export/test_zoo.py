"""Real networks and every test block, fused and exported: nothing is left that inference does not need."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch
from torch import nn

from reparam import FuseResult, fuse
from reparam.errors import ExportError, ReparamError
from reparam.export import OnnxSession, export_archive, export_onnx
from reparam.export.check import check_valid, disagreement
from reparam.export.leftovers import leftovers
from reparam.export.proto import Plan, build
from reparam.export.shapes import Freedom
from reparam.inputs import Inputs
from tests import zoo
from tests.support import static_counts
from tests.zoo import BlockCase
from tools import timm_zoo

torch.set_num_threads(1)

CASES = [("resnet18", 20), ("mobilenetv2_100", 52)]
SIZES = [(1, 64, 64), (3, 64, 64), (2, 96, 64), (1, 75, 81)]
NO_ONNX_FORM = {"adaptive_max_pool2d", "adaptive_max_pool3d"}
"""Operators of the blocks that the exporter cannot write; the error names one and the module that calls it."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "convs"), CASES)
def test_fused_network_exports_with_open_axes(name: str, convs: int, tmp_path: Path) -> None:
    model = timm_zoo.create(name)
    fused = fuse(model, torch.randn(1, 3, 64, 64), verify=False).module
    file = export_onnx(fused, torch.randn(1, 3, 64, 64), tmp_path / "net.onnx", original=model)
    assert file.nodes["Conv"] == convs
    assert file.leftovers == ()
    assert [set(axes) for axes in file.dynamic_axes.values()] == [{0, 2, 3}]
    assert file.checked
    assert file.comparison is not None
    assert file.comparison.passed
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


class Side(nn.Module):
    """Many models in one, each with its own input and output: one export for all of them."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [model(x) for model, x in zip(self.models, inputs, strict=True)]


def fused_blocks(room: ModuleType) -> list[tuple[BlockCase, FuseResult]]:
    found = []
    for case in room.CASES:
        try:
            found.append((case, fuse(case.make(torch.float32), case.inputs(torch.float32), verify=False)))
        except ReparamError:
            assert case.may_refuse, case.name
    return found


def exported(blocks: list[tuple[BlockCase, FuseResult]]) -> tuple[onnx.ModelProto, Side, Inputs]:
    """The blocks in one graph with their batches open. A block that has no ONNX form goes from the list."""
    while True:
        side = Side([result.module for _, result in blocks]).eval()
        inputs = Inputs(tuple(case.inputs(torch.float32) for case, _ in blocks))
        names = [tuple(f"{kind}{n}" for n in range(len(blocks))) for kind in "xy"]
        try:
            return build(Plan(side, inputs, *names, None, {}), Freedom(tuple(range(len(blocks))))).proto, side, inputs
        except ExportError as error:
            operator, _, place = str(error).removeprefix("operator aten::").partition(" in models.")
            if operator not in NO_ONNX_FORM:
                raise
            del blocks[int(place.partition(".")[0])]


@pytest.mark.slow
@pytest.mark.parametrize("room", zoo._ROOMS, ids=lambda room: room.__name__.rpartition(".")[2])
def test_nothing_is_left_in_the_graph_of_any_block(room: ModuleType, tmp_path: Path) -> None:
    blocks = fused_blocks(room)
    model, side, inputs = exported(blocks)
    stay = [0] * len(blocks)
    for one in leftovers(model):
        assert one.kind == "BatchNormalization", one
        number, _, module = one.module.removeprefix("models.").partition(".")
        stay[int(number)] += 1
        reasons = [str(refusal) for refusal in blocks[int(number)][1].report.refusals if refusal.place.module == module]
        assert reasons, f"nobody says why {module} of {blocks[int(number)][0].name} stays"
    held = [static_counts(result.module)["bn"] for _, result in blocks]
    # In all and not one by one: blocks with equal weights share them in the file, under the name of the first.
    assert sum(stay) <= sum(held)  # the exporter merges some itself
    onnx.save_model(model, str(tmp_path / "blocks.onnx"))
    check_valid(tmp_path / "blocks.onnx")
    got = OnnxSession(tmp_path / "blocks.onnx", threads=1).run_flat(list(inputs.tensors()))
    assert not disagreement(got, inputs.call(side))
