"""Capture by torch.export: one vocabulary for the passes, so the same blocks collapse to the same layers."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import reparam
from reparam import OtherInputError
from reparam.capture import exported as exported_programs
from reparam.capture.aten import spell_out
from reparam.capture.trace import capture
from reparam.export import OnnxSession, export_archive, export_onnx
from reparam.inputs import Inputs
from tests.capture.test_odd_forwards import call, counter, image, noise, odd
from tests.support import executed_counts, relative_error, sampled
from tests.test_blocks import BLOCKS
from tests.zoo.case import BlockCase

EVERY = 9
"""Of the blocks of the zoo, every so manieth is exported with open sizes, as `fuse` does; the others for one size,
which is faster, and with open sizes where that comes to other counts."""

IN_FLOAT32 = {"normalised_input", "normalised_input_padded"}
"""Blocks with a literal made in float32: an export casts it to float64 in a model of that type, a trace does not."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", sampled(BLOCKS, 20), ids=lambda case: case.name)
def test_both_captures_come_to_the_same_layers(case: BlockCase, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, bound = (torch.float32, 1e-5) if case.name in IN_FLOAT32 else (torch.float64, 1e-11)
    model, inputs = case.make(dtype), case.inputs(dtype)
    symbolic = reparam.fuse(model, inputs, capture="symbolic", verify=False)
    wanted = executed_counts(symbolic.module, inputs)

    def is_same() -> bool:
        exported = reparam.fuse(model, inputs, capture="export", verify=False)
        assert exported.report.capture == "export"
        assert relative_error(model(inputs), exported.module(inputs)) < bound
        return executed_counts(exported.module, inputs) == wanted

    if BLOCKS.index(case) % EVERY:
        attempts = exported_programs._attempts
        with monkeypatch.context() as patched:
            patched.setattr(exported_programs, "_attempts", lambda model, given: [*attempts(model, given)][-1:])
            if is_same():
                return
    assert is_same()


Function = Callable[[torch.Tensor], Any]
SPELLINGS: dict[str, Function] = {
    "slices": lambda x: (x[:, 1:3], x[..., ::2], x[:, -1], x[..., 0, :], x[:, [0, 2]]),
    "pads": lambda x: (F.pad(x, (1, 0, 2, 1)), F.pad(x, (1, 1, 1, 1), "reflect"), F.pad(x, (1, 2), "constant", 3.0)),
    "pools": lambda x: (
        F.max_pool2d(x, 2),
        F.avg_pool2d(x, 3, 1, 1),
        F.adaptive_avg_pool2d(x, 2),
        F.lp_pool2d(x, 2, 2),
    ),
    "sizes": lambda x: (F.interpolate(x, scale_factor=2), F.interpolate(x, (5, 7), mode="bilinear")),
    "activations": lambda x: (
        F.relu6(x),
        F.gelu(x),
        F.silu(x),
        F.hardswish(x),
        F.elu(x),
        F.leaky_relu(x, 0.2),
        x.sigmoid(),
    ),
    "norms": lambda x: (F.layer_norm(x, x.shape[-1:]), F.group_norm(x, 2), F.instance_norm(x), F.normalize(x)),
    "splits": lambda x: (*x.chunk(2, 1), *x.split([1, 3], 1), *x.split(3, 2), *x.unbind(1)),
    "arithmetic": lambda x: (2 - x, x.sub(x, alpha=2), x / 3, -x, x**2, torch.add(x, x, alpha=0.5), 1 / (x * x + 1)),
    "moves": lambda x: (x.permute(0, 2, 3, 1), x.transpose(1, 2), x.flatten(2), x.unsqueeze(1).squeeze(1), x.flip(1)),
    "reductions": lambda x: (
        x.mean((2, 3)),
        x.sum(1, keepdim=True),
        x.amax((2, 3)),
        x.var(1),
        x.softmax(1),
        x.argmax(1),
    ),
    "stacks": lambda x: (torch.cat([x, x], 1), torch.stack([x, x], 2), x.expand(3, *x.shape), x.repeat(1, 2, 1, 1)),
    "casts": lambda x: (x.to(torch.float32), x.long(), x.clone(), x.detach() + 1, x.type_as(x)),
    "matrices": lambda x: (x @ x.mT, torch.einsum("bchw,bdhw->bcd", x, x), F.scaled_dot_product_attention(x, x, x)),
    "in place": lambda x: (x.clone().relu_().add_(1).mul_(2), F.relu(x.clone(), inplace=True)),
    "made of sizes": lambda x: (x + torch.arange(x.shape[-1]), x * torch.ones(x.shape[2], 1), x.new_zeros(x.shape)),
}


class Calls(nn.Module):
    """One function of its input."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SPELLINGS)
def test_operators_are_spelled_as_functions(name: str) -> None:
    model, x = Calls(SPELLINGS[name]).eval(), image(2, 8, 8)
    captured = capture(model, x, way="export")
    left = [str(n.target) for n in captured.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert left == []
    module = fx.GraphModule(captured.root, captured.graph)
    for example in (x, image(3, 8, 8)):
        expected, actual = model(example), module(example)
        assert len(expected) == len(actual)
        for a, b in zip(expected, actual, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name


def test_decomposed_batch_norm_and_convolution_are_known() -> None:
    aten, graph = torch.ops.aten, fx.Graph()
    x, w, b, v = (graph.placeholder(name) for name in ("x", "w", "b", "v"))
    conv = graph.call_function(aten.convolution.default, (x, w, b, [1, 1], [1, 1], [1, 1], False, [0, 0], 1))
    norm = graph.call_function(aten._native_batch_norm_legit_no_training.default, (conv, b, b, b, v, 0.1, 1e-5))
    graph.output(graph.call_function(operator.getitem, (norm, 0)))
    spell_out(graph)
    graph.lint()
    x_, w_, b_, v_ = image(2), torch.randn(4, 4, 3, 3).double(), torch.randn(4).double(), torch.rand(4).double() + 0.5
    expected = F.batch_norm(F.conv2d(x_, w_, b_, padding=1), b_, v_, b_, b_, eps=1e-5)
    assert torch.allclose(fx.GraphModule(nn.Module(), graph)(x_, w_, b_, v_), expected)


def test_places_are_those_of_the_users_model() -> None:
    result = reparam.fuse(odd(lambda s, x: s.b(F.relu(s.a(x)))), image(2), capture="export")
    assert {rewrite.place.module for rewrite in result.report.rewrites if "Norm" in str(rewrite.replaced)} <= {"a", "b"}
    assert {rewrite.place.module.partition(".")[0] for rewrite in result.report.rewrites} == {"a", "b"}
    assert any("test_odd_forwards.py:" in rewrite.where for rewrite in result.report.rewrites)


def test_sizes_stay_open_or_are_checked() -> None:
    def branch(s: Any, x: torch.Tensor) -> torch.Tensor:
        return s.a(x) if x.shape[2] % 8 == 0 else s.b(x)

    original, fused = odd(branch), reparam.fuse(odd(branch), image(2), capture="export", verify=False).module
    for x in (image(2), image(5), image(3, 16, 9)):
        assert relative_error(call(original, (x,)), call(fused, (x,))) < 1e-12
    for module in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert relative_error(call(original, (image(3),)), call(module, (image(3),))) < 1e-12
        with pytest.raises(OtherInputError, match="this model was captured for"):
            call(module, (image(2, 11, 8),))
    assert reparam.fuse(fused, image(2)).report.rewrites == ()


@pytest.mark.slow
def test_what_was_exported_can_be_exported_again(tmp_path: Path) -> None:
    original = odd(lambda s, x: s.linear(F.relu(s.b(F.relu(s.a(x)))).mean((2, 3)))).float()
    fused = reparam.fuse(original, image(2).float(), capture="export").module
    export_archive(fused, Inputs.of(image(2).float()), tmp_path / "m.pt2")
    session = OnnxSession(export_onnx(fused, Inputs.of(image(2).float()), tmp_path / "m.onnx").path, threads=1)
    for x in (image(1).float(), image(3, 11, 9).float()):
        expected = call(original, (x,))
        assert relative_error(expected, torch.export.load(tmp_path / "m.pt2").module()(x)) < 1e-6
        assert relative_error(expected, session(x)) < 1e-6


def test_the_model_is_not_shared_and_not_changed() -> None:
    model = odd(lambda s, x: s.linear(s.a(x).mean((2, 3)))).train()
    fused = reparam.fuse(model, image(2), capture="export").module
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert theirs.isdisjoint(p.untyped_storage().data_ptr() for p in fused.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("forward", [counter, noise])
def test_what_no_graph_can_hold_is_refused_by_export_too(forward: Any) -> None:
    with pytest.raises(reparam.CaptureError):
        reparam.fuse(odd(forward), image(2), capture="export", verify=False)


IN_PLACE = [
    *(nn.ReLU(True), nn.ReLU6(True), nn.Hardswish(True), nn.Hardsigmoid(True), nn.Hardtanh(-0.5, 0.7, inplace=True)),
    *(nn.SiLU(True), nn.Mish(True), nn.LeakyReLU(0.2, True), nn.ELU(1.2, True), nn.SELU(True), nn.CELU(1.3, True)),
    *(nn.Threshold(0.1, 0.2, True), nn.RReLU(inplace=True)),
]


@pytest.mark.parametrize("activation", IN_PLACE, ids=lambda module: type(module).__name__)
def test_activations_in_place_hide_nothing(activation: nn.Module) -> None:
    """An operator that was not known to write in place kept a dropout and a BatchNorm behind it."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(4, 4, 3), activation, nn.Dropout(inplace=True), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(*layers).double().eval()
    result = reparam.fuse(model, image(2), capture="export")
    assert (result.report.after.batch_norms, result.report.after.dropouts) == (0, 0)
    assert relative_error(copy.deepcopy(model)(image(2)), result.module(image(2))) < 1e-12


def test_the_module_of_a_program_is_fused_like_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout()).eval()
    x, batch = torch.randn(2, 3, 8, 8), torch.export.Dim.AUTO
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    hooks = [len(program._forward_pre_hooks), len(program._forward_hooks)]
    for given, expected in (
        (program, model),
        (nn.Sequential(program, nn.Sigmoid()), nn.Sequential(model, nn.Sigmoid())),
    ):
        result = reparam.fuse(given, x)
        after = result.report.after
        assert (after.convolutions, after.batch_norms, after.dropouts) == (1, 0, 0)
        other = torch.randn(5, 3, 8, 8)
        torch.testing.assert_close(result.module(other), expected(other))
        with pytest.raises(OtherInputError, match="captured for other inputs"):
            result.module(torch.randn(2, 3, 9, 9))
    assert [len(program._forward_pre_hooks), len(program._forward_hooks)] == hooks, "the given one is left alone"
    program.register_forward_hook(lambda module, inputs, output: output * 2.0)
    with pytest.raises(reparam.InputError, match="has forward hooks"):
        reparam.fuse(program, x)
