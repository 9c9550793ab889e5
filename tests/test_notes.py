"""The modules of deep-learning notes, each through the whole tool: fused, verified, exported, checked, and timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import reparam
from reparam.export import OnnxFile, OnnxSession, export_onnx
from tests.idle import RANDOM_IN_ONNX, Beside, assert_nothing_idle
from tests.support import relative_error, static_counts
from tests.zoo import BLOCKS, BlockCase, notes
from tests.zoo.case import bn, conv

torch.set_num_threads(1)

ELSEWHERE = (
    "repvgg2d_6_6_k3_s1_g1",
    "dense_layers",
    "drop_drop_block",
    "drop_connect_classical",
    "drop_connect_inverted",
    "drop_connect_linear",
    "stochastic_depth_classical",
    "stochastic_depth_drop_path",
)
"""Modules of the notes that other rooms of the zoo have."""
NOTES: list[BlockCase] = [*notes.CASES, *(case for case in BLOCKS if case.name in ELSEWHERE)]


def by_name(case: BlockCase) -> str:
    return case.name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Any, tuple[torch.Tensor, ...], OnnxFile]:
    """All modules side by side: the original, the result, inputs, the file. One export is quick, 40 are not."""
    model = Beside(NOTES).eval()
    inputs = tuple({case.input_shape: case.inputs(torch.float32) for case in NOTES}.values())
    result = reparam.fuse(model, inputs, verify="quick")
    return model, result, inputs, export_onnx(result.module, inputs, tmp_path_factory.mktemp("notes") / "notes.onnx")


def test_the_list_is_whole() -> None:
    assert len(NOTES) == len(notes.CASES) + len(ELSEWHERE)
    assert len(notes.ORDERS) == 5


@pytest.mark.slow
def test_all_are_verified_and_nothing_idle_is_left(whole: Any) -> None:
    _, result, _, _ = whole
    assert result.report.comparison.passed
    assert result.report.undone == ()
    assert_nothing_idle(result.module)


@pytest.mark.slow
def test_all_are_in_the_file_which_computes_the_same(whole: Any) -> None:
    model, _, inputs, file = whole
    assert file.nodes["Conv"] >= len(NOTES)
    assert not RANDOM_IN_ONNX & set(file.nodes), file.nodes
    with torch.no_grad():
        expected, found = model(*inputs), OnnxSession(file.path, threads=1)(*inputs)
    assert len(expected) == len(found) == len(NOTES)
    for case, one, other in zip(NOTES, expected, found, strict=True):
        assert relative_error(one, torch.as_tensor(other)) < 1e-4, case.name


@pytest.mark.slow
def test_the_file_is_timed(whole: Any) -> None:
    model, result, inputs, file = whole
    variants = {"original": model, "fused": result.module, "onnxruntime": OnnxSession(file.path, threads=1)}
    timing = reparam.benchmark(variants, inputs, threads=1, min_runs=2, max_seconds=0.05, memory=False)
    assert timed(timing, *variants)


def timed(timing: reparam.Timing, first: str, *others: str) -> bool:
    """Whether every variant has as many samples as the others, and a ratio; nothing is asked of the time."""
    rounds = {len(timing.samples[label]) for label in (first, *others)}
    positive = all(sample > 0 for label in timing.samples for sample in timing.samples[label])
    return len(rounds) == 1 and min(rounds) >= 2 and positive and set(timing.ratios) == set(others)


@pytest.mark.parametrize("case", NOTES, ids=by_name)
def test_each_is_timed(case: BlockCase) -> None:
    model, x = case.make(torch.float32), case.inputs(torch.float32)
    result = reparam.fuse(model, x, verify=False)
    assert_nothing_idle(result.module)
    variants = {"original": model, "fused": result.module}
    timing = reparam.benchmark(variants, x, threads=1, min_runs=2, max_seconds=0.01, memory=False)
    assert timed(timing, *variants)


@pytest.mark.parametrize("kind", ["blocks", "cutout"])
def test_a_forgotten_check_is_refused_and_lifted_by_one_word(kind: str) -> None:
    with torch.random.fork_rng(devices=[]):
        model = notes.forgotten(kind).eval()
    x = torch.randn(2, 4, 8, 9)
    with pytest.raises(
        reparam.CaptureError, match=r"rand(_like|int) in Forgotten 1 \(notes\.py:\d+\).*Forgotten=identity"
    ):
        reparam.fuse(model, x)
    result = reparam.fuse(model, x, inference_form={"Forgotten": "identity"}, verify="quick")
    assert static_counts(result.module)["bn"] == 0
    assert_nothing_idle(result.module)


# --- the two formulas that such notes get wrong ---


def test_the_identity_branch_is_one_at_the_centre_of_its_own_channel() -> None:
    model = next(case for case in NOTES if case.name == "repvgg2d_6_6_k3_s1_g1").make()
    fused = reparam.fuse(model, torch.randn(2, 6, 8, 9, dtype=torch.float64)).module
    (kernel,) = (module.weight for module in fused.modules() if isinstance(module, nn.Conv2d))

    def scaled(kernel: torch.Tensor, norm: Any) -> torch.Tensor:
        return kernel * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]

    own = torch.zeros(6, 6, 3, 3, dtype=torch.float64)
    own[range(6), range(6), 1, 1] = 1
    (dense, first), (point, second) = model.dense, model.point
    others = scaled(dense.weight, first) + nn.functional.pad(scaled(point.weight, second), (1, 1, 1, 1))
    assert relative_error(others + scaled(own, model.norm), kernel) < 1e-14
    for wrong in (torch.ones_like(own), own.amax((2, 3), keepdim=True).expand_as(own)):
        assert relative_error(others + scaled(wrong, model.norm), kernel) > 0.1


def test_epsilon_is_added_to_the_variance_below_the_root() -> None:
    layer, norm = conv(2, 4, 6, 3), bn(2, 6, eps=0.1)
    nn.init.uniform_(norm.running_var, 0.05, 0.5)
    model = nn.Sequential(layer, norm).double().eval()
    fused = reparam.fuse(model, torch.randn(2, 4, 8, 9, dtype=torch.float64)).module
    (kernel,) = (module.weight for module in fused.modules() if isinstance(module, nn.Conv2d))
    ratio = (kernel / layer.weight).mean((1, 2, 3))
    variance = norm.running_var
    assert relative_error((variance + 0.1).rsqrt(), ratio) < 1e-12
    for wrong in (1 / (variance.sqrt() + 0.1), 1 / (variance + 0.1), variance.rsqrt()):
        assert relative_error(wrong, ratio) > 0.01
