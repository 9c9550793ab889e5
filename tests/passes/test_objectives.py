"""What `objective=` and `machine=` change: which form is chosen, never what it computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import click.testing
import pytest
import torch
from torch import nn

import reparam
from reparam.cli import fuse_command, main
from reparam.errors import InputError, ReparamError
from reparam.passes.base import Cost
from reparam.passes.cost import OBJECTIVES, CostModel, Objective
from reparam.passes.machines import EAGER_CPU, MACHINES
from reparam.passes.search import Solution, _best
from tests.support import EXACT, relative_error, run, sampled, static_counts
from tests.zoo import BLOCKS, BlockCase
from tools.cost_probes import Sum, conv


def linears(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def pointwise(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths)))


def image(channels: int) -> tuple[int, ...]:
    return (1, channels, 8, 8)


# Name, model, input, and how many convolutions and linear layers each objective leaves.
CHOICES: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], Mapping[str, int]]] = [
    # 4096 multiply-adds in one layer, 3840 in two: a launch is dearer than 7%
    ("64-30-64 linear", lambda: linears(64, 30, 64), (4, 64), {"latency": 1, "macs": 2, "parameters": 2}),
    ("64-30-64 pointwise", lambda: pointwise(64, 30, 64), image(64), {"latency": 1, "macs": 2, "parameters": 2}),
    ("64-16-64", lambda: pointwise(64, 16, 64), image(64), {"latency": 2, "macs": 2, "parameters": 2}),
    ("16-64-16", lambda: pointwise(16, 64, 16), image(16), {"latency": 1, "macs": 1, "parameters": 1}),
    ("64-32-64", lambda: linears(64, 32, 64), (4, 64), {"latency": 1, "macs": 1, "parameters": 1}),
    ("1x3 + 3x1", lambda: Sum(conv(8, (1, 3)), conv(8, (3, 1))), image(8), {"latency": 2, "macs": 2, "parameters": 2}),
    # on a small image one dense layer is priced faster, on a large one it is not
    (
        "pointwise, depthwise",
        lambda: nn.Sequential(conv(16, 1), conv(16, 3, 16)),
        image(16),
        {"latency": 2, "macs": 2, "parameters": 2},
    ),
]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("name", "build", "shape", "left"), CHOICES, ids=[choice[0] for choice in CHOICES])
def test_layers_left(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], left: Mapping[str, int], objective: str
) -> None:
    torch.manual_seed(0)
    model, x = build().double().eval(), torch.randn(shape, dtype=torch.float64)
    module = reparam.fuse(model, x, objective=objective).module
    counts = static_counts(module)
    assert counts["conv"] + counts["linear"] == left[objective]
    assert relative_error(run(model, x), run(module, x)) < EXACT


@pytest.mark.parametrize(
    ("objective", "pools"), [("latency", False), ("macs", False), ("parameters", True)], ids=OBJECTIVES
)
def test_a_pooling_has_no_weights(objective: str, pools: bool) -> None:
    """3x3 and a 2x2 pooling are one 4x4 with stride 2: less than half the multiply-adds, 16/9 of the weights."""
    torch.manual_seed(0)
    model, x = nn.Sequential(conv(8, 3), nn.AvgPool2d(2)).eval(), torch.randn(image(8))
    module = reparam.fuse(model, x, objective=objective).module
    (kernel,) = (part.kernel_size for part in module.modules() if isinstance(part, nn.Conv2d))
    assert kernel == ((3, 3) if pools else (4, 4))
    assert any(isinstance(part, nn.AvgPool2d) for part in module.modules()) == pools


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_identity_beside_a_depthwise_layer_goes(objective: str) -> None:
    torch.manual_seed(0)
    model, x = Sum(conv(8, 3, 8), skip=True).eval(), torch.randn(image(8))
    counts = static_counts(reparam.fuse(model, x, objective=objective).module)
    assert (counts["conv"], counts["add"]) == (1, 0)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_launch_does_not_buy_multiply_adds(machine: str) -> None:
    """An example may be smaller than what the model will run on, so the lean form stays."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(16, 1), conv(16, 3, 16)).eval()
    counts = static_counts(reparam.fuse(model, torch.randn(1, 16, 4, 4), machine=machine).module)
    assert counts["conv"] == 2


@pytest.mark.parametrize("objective", ["macs", "parameters"])
@pytest.mark.parametrize("case", sampled(BLOCKS, 6), ids=lambda case: case.name)
def test_every_objective_is_exact(case: BlockCase, objective: str) -> None:
    model = case.make()
    try:
        module = reparam.fuse(model, case.inputs(), verify=False, objective=objective).module
    except ReparamError:
        if not case.may_refuse:
            raise
        return
    for size in ({}, {"batch": 1, "grow": 4}) if case.flexible else ({},):
        x = case.inputs(**size)
        assert relative_error(run(model, x), run(module, x)) < EXACT, size
    assert static_counts(module)["bn"] <= static_counts(model)["bn"]


def solution(seconds: float, macs: int, parameters: int) -> Solution:
    return Solution(Cost(macs=macs, seconds=seconds, parameters=parameters), frozenset())


@pytest.mark.parametrize(
    ("objective", "chosen"),
    [("latency", 2), ("macs", 3), ("parameters", 1)],
)
def test_the_best_of_several(objective: Objective, chosen: int) -> None:
    """The original; the fewest weights; the fastest; the fewest multiply-adds; less of all but slower; too many."""
    options = [
        solution(1.0, 100, 100),
        solution(0.9, 100, 10),
        solution(0.5, 95, 100),
        solution(0.8, 90, 100),
        solution(1.1, 1, 1),
        solution(0.1, 101, 101),
    ]
    assert _best(options, CostModel(EAGER_CPU, objective)) is options[chosen]


UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"objective": "speed"}, "objective 'speed' is not known; choose among latency, macs, parameters"),
    ({"machine": "tpu"}, "machine 'tpu' is not known; choose among eager-cpu, onnxruntime-cpu, cuda"),
    ({"machine": ""}, "machine '' is not known; choose among"),
]


@pytest.mark.parametrize(("options", "message"), UNKNOWN, ids=[str(options) for options, _ in UNKNOWN])
def test_unknown_words_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        reparam.fuse(nn.Linear(2, 2), torch.randn(1, 2), **options)
    assert message in str(caught.value)
    assert caught.value.exit_status == 2


def test_the_command_knows_the_same_words(tmp_path: Any) -> None:
    options = {option.name: option for option in fuse_command.params}
    for name, words in (("objective", OBJECTIVES), ("machine", tuple(MACHINES))):
        assert tuple(options[name].type.choices) == words  # type: ignore[attr-defined]
        finished = click.testing.CliRunner().invoke(main, ["fuse", str(tmp_path / "net.pt"), f"--{name}", "fastest"])
        assert finished.exit_code == 2
        assert all(word in finished.stderr for word in words)


def test_the_command_passes_them_on(tmp_path: Any) -> None:
    torch.save(linears(64, 30, 64), tmp_path / "net.pt")
    left = {}
    for objective in OBJECTIVES:
        options = ["--input", "4x64", "--objective", objective, "--machine", "eager-cpu"]
        options += ["--no-bench", "--no-onnx", "--out", str(tmp_path / objective)]
        finished = click.testing.CliRunner().invoke(main, ["fuse", str(tmp_path / "net.pt"), *options])
        assert finished.exit_code == 0, finished.output
        exported = torch.export.load(tmp_path / f"{objective}.pt2")
        left[objective] = sum("weight" in name for name in exported.state_dict)
    assert left == {"latency": 1, "macs": 2, "parameters": 2}
