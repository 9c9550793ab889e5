"""The graphs that a report holds: as many operations as are counted, and regions that say truly what became what."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import reparam
from reparam.report import GraphView, NodeView, Report
from reparam.report.view import joined
from tests.zoo import BLOCKS, BlockCase
from tests.zoo.case import randomise


def fused(model: nn.Module, inputs: Tensor, **options: object) -> Report:
    return reparam.fuse(model, inputs, verify="off", **options).report  # type: ignore[arg-type]


def graph_of(report: Report) -> GraphView:
    assert report.graph is not None
    return report.graph


def untouched(nodes: tuple[NodeView, ...]) -> Counter[tuple[str, str | None]]:
    """Tensors outside of regions; how sizes are read may change without a rewrite."""
    return Counter((node.module, node.source) for node in nodes if node.region is None and node.shape is not None)


@pytest.mark.parametrize("case", BLOCKS[::13], ids=lambda case: case.name)
def test_what_is_in_no_region_is_in_both_graphs(case: BlockCase) -> None:
    try:
        report = fused(case.make(torch.float32), case.inputs(torch.float32))
    except reparam.ReparamError:
        assert case.may_refuse
        return
    graph = graph_of(report)
    assert sum(node.is_operation for node in graph.before) == report.before.nodes
    assert sum(node.is_operation for node in graph.after) == report.after.nodes
    assert untouched(graph.before) == untouched(graph.after)
    used = {node.region for node in (*graph.before, *graph.after)} - {None}
    assert used == set(range(len(graph.regions))), "regions are numbered, and none is empty"
    shown = sorted(one for region in graph.regions for one in region)
    hidden = [rewrite.pass_name for index, rewrite in enumerate(report.rewrites) if index not in shown]
    assert len(set(shown)) == len(shown)
    assert set(hidden) <= {"constants", "repeats"}, "only rewrites of weights are in no graph"
    for side in (graph.before, graph.after):
        assert all(source < index for index, node in enumerate(side) for source in node.inputs)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.act, self.drop = nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.act(self.norm(self.a(x) + self.b(x)) * 2.0))


def branches() -> Branches:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Branches().eval()
        randomise(model)
    return model


def test_a_region_holds_what_became_what() -> None:
    report = fused(branches(), torch.randn(1, 4, 8, 8))
    graph = graph_of(report)
    assert [(node.op, node.region) for node in graph.before] == [
        ("the model's input", None), ("Conv2d", 0), ("Conv2d", 0), ("add", 0), ("BatchNorm2d", 0), ("mul", 0),
        ("ReLU", None), ("Dropout", 1), ("the model's output", None),
    ]  # fmt: skip
    assert [(node.op, node.region) for node in graph.after] == [
        ("the model's input", None), ("Conv2d", 0), ("ReLU", None), ("the model's output", None),
    ]  # fmt: skip
    merged = graph.after[1]
    assert (merged.shape, merged.inputs) == ((1, 4, 8, 8), (0,))
    assert merged.detail == "4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1)"
    assert graph.before[3].inputs == (1, 2)
    assert merged.source is not None
    assert merged.source.startswith("test_view.py:")
    kinds = [[report.rewrites[one].pass_name for one in region] for region in graph.regions]
    assert kinds == [["collapse"], ["inference form"]]


def test_what_several_passes_changed_is_one_region() -> None:
    """A scale that moves through a ReLU into the next layer, by two rewrites."""

    class Moves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sin(self.a(x)).relu() * 0.5)

    report = fused(Moves().eval(), torch.randn(1, 3, 9, 9))
    graph = graph_of(report)
    regions = {node.module: node.region for node in graph.after if node.is_operation}
    assert regions["b"] is not None
    assert [node.op for node in graph.before if node.region == regions["b"]] == ["mul", "Conv2d"]


def test_parts_of_a_model_are_shown_under_their_names() -> None:
    model = nn.Sequential(branches(), branches())
    report = fused(model, torch.randn(1, 4, 8, 8), capture="modules")
    graph = graph_of(report)
    assert [(node.module, node.op, node.region) for node in graph.after if node.op == "Conv2d"] == [
        ("0.a", "Conv2d", 0), ("1.a", "Conv2d", 2),
    ]  # fmt: skip
    assert sum(node.is_operation for node in graph.before) == report.before.nodes == 14
    assert [report.rewrites[region[0]].place.module.partition(".")[0] for region in graph.regions] == list("0011")
    second = [node for node in graph.after if node.module.startswith("1")]
    assert [graph.after[source].module for node in second for source in node.inputs] == ["1", "1.a", "1.act"]


def test_graphs_of_parts_are_put_one_behind_the_other() -> None:
    part = GraphView((NodeView("add", "x"), NodeView("mul", "", inputs=(0,), region=0)), (), ((0, 1),))
    both = joined([("a", part, 3), ("", part, 5)])
    assert [(node.module, node.inputs, node.region) for node in both.before] == [
        ("a.x", (), None), ("a", (0,), 0), ("x", (), None), ("", (2,), 1),
    ]  # fmt: skip
    assert both.regions == ((3, 4), (5, 6))


def test_undone_rewrites_are_no_regions() -> None:
    """An inference form that was said has no region either, and moves the others' numbers."""
    report = fused(branches(), torch.randn(1, 4, 8, 8), inference_form={"Dropout": "identity"})
    graph = graph_of(report)
    assert report.rewrites[0].pass_name == "inference form"
    assert report.rewrites[graph.regions[0][0]].pass_name == "collapse"
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["graph"]["regions"][0] == [1]
    assert plain["graph"]["before"][1]["op"] == "Conv2d"


def test_no_tensor_is_kept() -> None:
    import pickle

    model = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512))
    report = fused(model.eval(), torch.randn(2, 512))
    assert len(pickle.dumps(report)) < 20_000
