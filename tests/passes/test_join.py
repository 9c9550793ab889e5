"""Parallel layers of one input as one: what is joined, what is not and why, and that readers see no difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reparam import fuse
from reparam.capture.trace import capture
from reparam.equivalence import verify
from reparam.export import OnnxSession, export_onnx
from reparam.graph.normal import normalise
from reparam.inputs import Inputs
from reparam.passes import PIPELINE
from reparam.passes.base import Refusal, Rewrite
from reparam.passes.collapse import Collapse
from reparam.passes.inference_form import InferenceForm
from reparam.passes.join import Join
from tests.zoo.case import CONV, bn, randomise, shape

ALWAYS = (InferenceForm(), Collapse(), Join(least=float("-inf"), elsewhere=()))


class Parallel(nn.Module):
    """Layers of one input, and a function of what they make of it."""

    def __init__(self, layers: list[nn.Module], read: Callable[..., Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.read = read

    def forward(self, x: torch.Tensor) -> Any:
        return self.read(*(layer(x) for layer in self.layers))


def linears(*out: int, d: int = 8) -> list[nn.Module]:
    return [nn.Linear(d, n) for n in out]


def convs(*out: int, rank: int = 2, k: int = 1, d: int = 4, **options: Any) -> list[nn.Module]:
    return [CONV[rank](d, n, k, **options) for n in out]


def relus(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([F.relu(part) for part in parts], -1)


def cat1(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([F.relu(part) for part in parts], 1)


def heads(*parts: torch.Tensor) -> torch.Tensor:
    batch, tokens, _ = parts[0].shape
    q, k, v = (part.view(batch, tokens, 2, -1).transpose(1, 2) for part in parts)
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def attended(*parts: torch.Tensor) -> torch.Tensor:
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts)
    return F.scaled_dot_product_attention(q, k, v)


def positions(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    batch, channels, _, _ = g.shape
    weights = theta.flatten(2).transpose(1, 2) @ phi.reshape(batch, -1, phi.shape[2] * phi.shape[3])
    return weights.softmax(-1) @ g.view(batch, channels, -1).permute(0, 2, 1)


def in_place(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.relu_() + F.silu(b, inplace=True) + a.mean()


def slices(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.relu(a[:, :2]) + b.chunk(2, dim=1)[0].sigmoid() + a.shape[1] + b.size(0)


@dataclass(frozen=True)
class Case:
    """A model, its input's sizes, and how many layers are joined into one."""

    layers: Callable[[], list[nn.Module]]
    read: Callable[..., Any]
    size: tuple[int, ...]
    joined: int = 2

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        return randomise(Parallel(self.layers(), self.read)).to(dtype).eval()


ACCEPT = {
    "linear": Case(lambda: linears(8, 3), relus, (2, 5, 8)),
    "linear_of_vectors": Case(lambda: linears(8, 3), relus, (2, 8)),
    "linear_of_images": Case(lambda: linears(8, 8), relus, (2, 3, 4, 8)),
    "one_without_bias": Case(lambda: [nn.Linear(8, 4), nn.Linear(8, 4, bias=False)], relus, (2, 5, 8)),
    "none_with_bias": Case(lambda: [nn.Linear(8, 4, bias=False) for _ in range(2)], relus, (2, 5, 8)),
    "q_k_v": Case(lambda: linears(8, 8, 8), heads, (2, 5, 8), 3),
    "q_k_v_unflattened": Case(lambda: linears(8, 8, 8), attended, (2, 5, 8), 3),
    "conv1d": Case(lambda: convs(3, 5, rank=1, k=3, padding=1), cat1, shape(1, 4)),
    "conv2d": Case(lambda: convs(3, 5, 2), cat1, shape(2, 4), 3),
    "conv3d": Case(lambda: convs(3, 5, rank=3, k=2, stride=2), cat1, shape(3, 4)),
    "dilated": Case(lambda: convs(3, 5, k=3, padding=2, dilation=2), cat1, shape(2, 4)),
    "reflected": Case(lambda: convs(3, 5, k=3, padding=1, padding_mode="reflect"), cat1, shape(2, 4)),
    "theta_phi_g": Case(lambda: convs(3, 3, 3), positions, shape(2, 4), 3),
    "with_norms": Case(
        lambda: [nn.Sequential(conv, bn(2, 3)) for conv in convs(3, 3, k=3, bias=False)], cat1, shape(2, 4)
    ),
    "two_of_three": Case(lambda: [*convs(3, 3), *convs(3, k=3, padding=1)], cat1, shape(2, 4)),
    "in_place_readers": Case(lambda: convs(3, 3), in_place, shape(2, 4)),
    "slices": Case(lambda: convs(4, 4), slices, shape(2, 4)),
    "view_as": Case(lambda: linears(4, 4), lambda a, b: a.view_as(b).relu() + b.relu(), (2, 5, 8)),
    "view_in_front_of_the_gap": Case(
        lambda: convs(4, 4), lambda a, b: a.view(a.shape[0], 4, -1).relu() * b.flatten(2).relu(), shape(2, 4)
    ),
    "one_is_returned": Case(lambda: convs(3, 3, 3), lambda a, b, c: (F.relu(a) + F.relu(b), {"c": c}), shape(2, 4)),
}


def joins(result: Any) -> list[Rewrite]:
    return [rewrite for rewrite in result.report.rewrites if rewrite.pass_name == "join"]


def refused(result: Any) -> list[Refusal]:
    return [refusal for refusal in result.report.refusals if refusal.pass_name == "join"]


def flat(value: Any) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(value)


@pytest.mark.parametrize("name", ACCEPT)
def test_joined_and_exact_at_every_size(name: str) -> None:
    case = ACCEPT[name]
    model = case.make()
    result = fuse(model, torch.randn(case.size, dtype=torch.float64), passes=ALWAYS)
    (rewrite,) = joins(result)
    assert len(rewrite.replaced) == case.joined
    assert rewrite.before.macs == rewrite.after.macs
    assert rewrite.before.launches == case.joined
    last = case.size[-1] if isinstance(model.layers[0], nn.Linear) else None
    for batch, grow in ((1, 0), (3, 2), (2, 5)):
        middle = [size + grow for size in case.size[1:]]
        middle[0 if last is None else -1] = case.size[1] if last is None else last
        x = torch.randn(batch, *middle, dtype=torch.float64)
        with torch.no_grad():
            expected, got = flat(model(x.clone())), flat(result.module(x.clone()))
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
            assert b.is_contiguous() == a.is_contiguous()
    again = fuse(result.module, torch.randn(case.size, dtype=torch.float64), passes=ALWAYS)
    assert not joins(again), "fusing a fused model changes nothing more"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_joined_in_other_types(dtype: torch.dtype) -> None:
    case = ACCEPT["with_norms"]
    result = fuse(case.make(dtype), torch.randn(case.size).to(dtype), passes=ALWAYS)
    assert joins(result)
    assert result.report.comparison.passed
    assert {p.dtype for p in result.module.parameters()} == {dtype}


def test_the_float64_twin_has_the_weights_before_they_were_rounded() -> None:
    case = ACCEPT["with_norms"]
    model = case.make(torch.float32)
    x = torch.randn(case.size)
    captured = capture(model, Inputs.of(x))
    normalise(captured.graph, captured.root)
    with torch.no_grad():
        for step in ALWAYS:
            step.run(captured.graph, captured.root)
        (node,) = (n for n in captured.graph.nodes if n.op == "call_module" and "float64" in n.meta)
        exact = node.meta["float64"]().module
        rounded = captured.root.get_submodule(node.target)
    scales = [norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt() for _, norm in model.layers]
    weight = torch.cat(
        [s[:, None, None, None] * c.weight.double() for s, (c, _) in zip(scales, model.layers, strict=True)]
    )
    torch.testing.assert_close(exact.weight, weight, rtol=1e-14, atol=1e-14)
    assert torch.equal(rounded.weight, exact.weight.float())
    assert not torch.equal(rounded.weight.double(), exact.weight)


class Called(nn.Module):
    """One layer called on one input twice, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).relu() + self.b(x).relu() + self.a(x).sigmoid()


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x).relu() + self.b(x).relu()


class Functional(nn.Module):
    """Weights that are no module's of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return relus(F.linear(x, self.w), F.linear(x, self.v))


def hooked(kind: str) -> nn.Module:
    model = Parallel([*linears(8, 8), nn.ReLU()], lambda a, b, c: a + b + c)
    target = model.layers[0]
    getattr(target, f"register_forward_{kind}")(lambda *args: None)
    return model


def viewed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.view(-1).relu() + b.reshape(-1).relu()


REFUSE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "other_kernel": (lambda: Parallel([*convs(3), *convs(3, k=3, padding=1)], cat1), shape(2, 4), ""),
    "other_stride": (
        lambda: Parallel([*convs(3, k=2, stride=2), *convs(3, k=2)], lambda a, b: a.relu().mean() + b.relu().mean()),
        shape(2, 4),
        "",
    ),
    "groups": (lambda: Parallel(convs(4, 4, groups=2), cat1), shape(2, 4), ""),
    "depthwise": (lambda: Parallel(convs(4, 4, k=3, groups=4), cat1), shape(2, 4), ""),
    "transposed": (lambda: Parallel([nn.ConvTranspose2d(4, 3, 2) for _ in range(2)], cat1), shape(2, 4), ""),
    "returned": (lambda: Parallel(convs(3, 3), lambda a, b: (a, b)), shape(2, 4), "the model's output"),
    "view_returned": (
        lambda: Parallel(convs(3, 3), lambda a, b: {"a": a.flatten(2), "b": [b.transpose(1, 2)]}),
        shape(2, 4),
        "the model's output",
    ),
    "view_across_the_gap": (lambda: Parallel(linears(4, 4), viewed), (2, 5, 8), "view"),
    "view_merges_batch": (
        lambda: Parallel(convs(4, 4), lambda a, b: a.view(-1, *a.shape[2:]).relu() + b.flatten(0, 1).relu()),
        shape(2, 4),
        "view",
    ),
    "pooled": (
        lambda: Parallel(convs(4, 4), lambda a, b: F.max_pool2d(a, 2) + F.max_pool2d(b, 2)),
        shape(2, 4),
        "max_pool2d",
    ),
    "strides_read": (
        lambda: Parallel(convs(4, 4), lambda a, b: a.relu() * a.stride(0) + b.relu() * b.stride(0)),
        shape(2, 4),
        "stride",
    ),
    "tied": (lambda: Tied(), (2, 5, 8), "used in other calls"),
    "hooked": (lambda: hooked("hook"), (2, 5, 8), ""),
    "hooked_before": (lambda: hooked("pre_hook"), (2, 5, 8), ""),
}


@pytest.mark.parametrize("name", REFUSE)
def test_not_joined(name: str) -> None:
    build, size, reason = REFUSE[name]
    torch.manual_seed(0)
    model = build().double().eval()
    x = torch.randn(size, dtype=torch.float64)
    result = fuse(model, x, passes=ALWAYS)
    assert joins(result) == []
    assert [reason in refusal.reason for refusal in refused(result)] == ([True] if reason else [])
    assert all(refusal.reason and "parallel" in refusal.subject for refusal in refused(result))
    for a, b in zip(flat(model(x)), flat(result.module(x)), strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()
        assert b.untyped_storage().nbytes() == a.untyped_storage().nbytes()


def test_layers_of_different_inputs_are_not_joined() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x.relu()).relu() + self.b(x.sigmoid()).relu()

    result = fuse(Chain().eval(), torch.randn(2, 8), passes=ALWAYS)
    assert joins(result) == refused(result) == []


def test_a_layer_called_twice_stays_one_layer() -> None:
    result = fuse(Called().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64), passes=ALWAYS)
    assert joins(result) == []
    assert "other calls" in refused(result)[0].reason
    assert sum(p.numel() for p in result.module.parameters()) == 2 * (64 + 8)


def test_functional_layers_are_joined_under_a_name_of_their_own() -> None:
    result = fuse(Functional().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64), passes=ALWAYS)
    assert len(joins(result)) == 1
    assert [tuple(p.shape) for p in result.module.parameters()] == [(12, 8)]


class Named(nn.Module):
    """Query, key and value inside a block, which may have something under the joined layer's name."""

    def __init__(self, taken: bool) -> None:
        super().__init__()
        self.block = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q", "k", "v")})
        if taken:
            self.block["q_k_v"] = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = heads(*(self.block[name](x) for name in ("q", "k", "v")))
        return self.block["q_k_v"](y) if "q_k_v" in self.block else y


@pytest.mark.parametrize(("taken", "name"), [(False, "block.q_k_v"), (True, "block.q_k_v_joined")])
def test_the_joined_name_tells_where_it_comes_from_and_is_nobody_elses(taken: bool, name: str) -> None:
    result = fuse(Named(taken).eval(), torch.randn(2, 5, 8), passes=ALWAYS)
    keys = set(result.module.state_dict())
    assert keys - {"block.q_k_v.weight", "block.q_k_v.bias"} <= {f"{name}.weight", f"{name}.bias"}
    assert tuple(result.module.get_submodule(name).weight.shape) == (24, 8)


def test_many_branches_have_a_short_name() -> None:
    result = fuse(Parallel(linears(*[4] * 6), relus).eval(), torch.randn(2, 5, 8), passes=ALWAYS)
    assert set(result.module.state_dict()) == {"layers.0_to_5.weight", "layers.0_to_5.bias"}


def test_channels_last() -> None:
    for name in ("theta_phi_g", "view_in_front_of_the_gap", "in_place_readers", "slices"):
        case = ACCEPT[name]
        model = case.make()
        x = torch.randn(case.size, dtype=torch.float64).to(memory_format=torch.channels_last)
        fused = fuse(model, torch.randn(case.size, dtype=torch.float64), passes=ALWAYS).module
        torch.testing.assert_close(fused(x.clone()), model(x.clone()), rtol=1e-12, atol=1e-12)


def test_default_rule_joins_small_linear_layers_only() -> None:
    for tokens, d, expected in ((4, 32, 1), (16, 64, 1), (1024, 64, 0), (128, 256, 0), (16, 1024, 0)):
        result = fuse(Parallel(linears(d, d, d, d=d), heads).eval(), torch.randn(1, tokens, d), verify=False)
        assert len(joins(result)) == expected, (tokens, d)
        assert len(refused(result)) == 1 - expected
    model, x = Parallel(convs(16, 16, 16, d=32), cat1).eval(), torch.randn(1, 32, 4, 4)
    assert "copies the parts" in refused(fuse(model, x, verify=False))[0].reason
    assert len(joins(fuse(model, x, verify=False, passes=(Join(elsewhere=()),)))) == 1
    assert any(isinstance(step, Join) for step in PIPELINE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q_k_v", "theta_phi_g", "with_norms"])
def test_a_joined_model_runs_in_onnxruntime(name: str, tmp_path: Path) -> None:
    case = ACCEPT[name]
    model, x = case.make(torch.float32), torch.randn(case.size)
    result = fuse(model, x, passes=ALWAYS)
    assert joins(result)
    session = OnnxSession(export_onnx(result.module, Inputs.of(x), tmp_path / "m.onnx").path, threads=1)
    assert verify(model, session, Inputs.of(x), vary_shapes=False, check_structure=False).passed


def test_no_graph_with_one_layer_per_input_is_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass costs a deep graph next to nothing."""
    monkeypatch.setattr("reparam.passes.join.LiftedGraph", None)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    assert joins(fuse(model, torch.randn(2, 8), passes=ALWAYS)) == []
