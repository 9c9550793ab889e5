"""What looks foldable in a fused model has a refusal, and nothing else has one.

What looks foldable is read from the fused graph here, by the names of its operations: this file knows nothing of the
passes that refuse.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import fx, nn

import reparam
from reparam import Refusal
from reparam.errors import ReparamError
from reparam.passes import collapse
from tests.support import relative_error, sampled
from tests.test_silently_wrong import ALL
from tests.zoo import BLOCKS, BlockCase
from tests.zoo.trap import Lambda, Trap
from tools import timm_zoo

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")

REAL = {
    "resnet18": 64,
    "densenet121": 64,
    "levit_128s": 224,
    "nextvit_small": 64,
    "fastvit_t8": 64,
    "convnext_atto": 64,
    "mobilenetv3_small_050": 64,
    "regnety_002": 64,
    "edgenext_xx_small": 64,
}
"""Models and image sizes."""

_WORDS = {
    "layer": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convtranspose1d convtranspose2d "
    "convtranspose3d linear",
    "norm": "batch_norm batchnorm1d batchnorm2d batchnorm3d syncbatchnorm",
    "arithmetic": "add add_ iadd sub sub_ isub rsub mul mul_ imul div div_ truediv itruediv addcmul",
    "plain": "view reshape permute transpose flatten unflatten squeeze unsqueeze contiguous identity narrow avg_pool1d "
    "avg_pool2d avg_pool3d avgpool1d avgpool2d avgpool3d pad cat concat "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptiveavgpool1d adaptiveavgpool2d "
    "adaptiveavgpool3d mean swapaxes swapdims",
}
SORTS = {word: sort for sort, words in _WORDS.items() for word in words.split()}
NOTHING_HELPS = (
    "is exact, but",
    "also feeds",
    "nothing linear is beside it",
    "which no layer makes that could absorb it",
    "to save a cheap operation",
    "its constant",
    "broadcasts",
    "pads the channels or the batch",
    "the branches",
    "without a copy",
)
"""What the reasons without a remedy say: a wish for another model would be none."""
SHAPES = ("size", "dim", "shape", "ndim", "getattr", "require_rank", "require_size")


def name_of(node: fx.Node, module: fx.GraphModule) -> str:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__.lower()
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


@dataclass(frozen=True)
class Fused:
    """A fused graph as a reader sees it."""

    module: fx.GraphModule
    refusals: tuple[Refusal, ...]

    @functools.cached_property
    def constants(self) -> set[fx.Node]:
        found: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            computed = node.op in ("call_function", "call_method") and node.all_input_nodes
            if node.op == "get_attr" or (computed and all(other in found for other in node.all_input_nodes)):
                found.add(node)
        return found

    def operands(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n not in self.constants and name_of(n, self.module) not in SHAPES]

    def readers(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if name_of(user, self.module) not in SHAPES]

    def sort(self, node: fx.Node) -> str:
        """layer, norm, scale, sum, plain, or nothing linear."""
        name = name_of(node, self.module)
        if node.op in ("placeholder", "output", "get_attr") or node in self.constants:
            return "other"
        if node.target is operator.getitem:
            return "plain" if "tensor" in node.meta and isinstance(node.args[1], tuple) else "other"
        sort = SORTS.get(name, "other")
        if sort == "layer" and len(self.operands(node)) != 1:
            return "other"
        if sort == "arithmetic":
            if len(self.operands(node)) == 1:
                return "scale" if self._by_channel(node) else "other"
            return "sum" if name in ("add", "add_", "iadd", "sub", "sub_", "isub") else "other"
        return sort

    def _by_channel(self, node: fx.Node) -> bool:
        """Whether every constant has one number for each channel: an image's or a token's."""
        like = node.meta.get("tensor")
        held = [other.meta.get("tensor") for other in node.all_input_nodes if other in self.constants]
        if like is None or not held or any(other is None for other in held) or len(like.shape) < 2:
            return False
        shapes = [(1,) * (len(like.shape) - len(other.shape)) + tuple(other.shape) for other in held]
        axes = (1, len(like.shape) - 1)
        return any(
            all(size == (like.shape[i] if i == axis else 1) for shape in shapes for i, size in enumerate(shape))
            for axis in axes
        )

    def names(self, node: fx.Node) -> set[str]:
        """What a refusal may call a node."""
        owners = {str(other.target).rpartition(".")[0] for other in node.all_input_nodes if other.op == "get_attr"}
        return {node.name, str(node.target), node.meta.get("module_path") or "", *owners} - {""}

    def about(self, *nodes: fx.Node) -> list[Refusal]:
        """The refusals that are about one of these nodes."""
        names = set().union(*(self.names(node) for node in nodes))
        lines = {node.meta.get("source") for node in nodes if not node.meta.get("module_path")} - {None}
        return [r for r in self.refusals if r.place.module in names or r.place.source in lines]

    def in_front(self, node: fx.Node) -> Iterator[fx.Node]:
        """Layers, norms and scales whose output reaches a node through plain operations only."""
        for operand in self.operands(node):
            sort = self.sort(operand)
            if sort in ("layer", "norm", "scale"):
                yield operand
            elif sort == "plain" and (len(self.operands(operand)) == 1 or len(self.readers(operand)) == 1):
                yield from self.in_front(operand)

    def behind(self, node: fx.Node) -> Iterator[fx.Node]:
        """What reads a node, through plain operations."""
        for user in node.users:
            if self.sort(user) == "plain":
                yield from self.behind(user)
            else:
                yield user

    def of(self, *sorts: str) -> list[fx.Node]:
        return [node for node in self.module.graph.nodes if self.sort(node) in sorts]

    @functools.cached_property
    def pairs(self) -> list[tuple[fx.Node, fx.Node]]:
        """What is neighbours and looks as if it could be one: (in front, behind)."""
        return [(first, node) for node in self.of("layer", "norm", "scale") for first in self.in_front(node)]

    @functools.cached_property
    def branches(self) -> list[tuple[fx.Node, fx.Node, fx.Node]]:
        """Two layers of one tensor whose results are added, and their sum."""
        found = []
        for node in self.of("sum"):
            layers = [part for part in self._summands(node) if self.sort(part) == "layer"]
            sources = [self.operands(part)[0] for part in layers]
            found += [
                (layers[i], layers[j], node) for j in range(len(layers)) for i in range(j) if sources[i] is sources[j]
            ]
        return found

    def _summands(self, node: fx.Node) -> Iterator[fx.Node]:
        for operand in self.operands(node):
            if self.sort(operand) == "sum" and len(operand.users) == 1:
                yield from self._summands(operand)
            elif len(operand.users) == 1:
                yield operand

    def unexplained(self) -> list[str]:
        """Whatever looks foldable and has no refusal."""
        found = [f"norm {node}" for node in self.of("norm") if not self.about(node)]
        for first, second in self.pairs:
            scales = [node for node in (first, second) if self.sort(node) == "scale"]
            layers = [first, second] if self.sort(first) == self.sort(second) == "layer" else []
            if not any("storage" in refusal.reason for refusal in self.about(first)):
                found += [f"scale {node}" for node in scales if not self.about(node)]
            if layers and not self.about(*layers):
                found.append(f"chain {first} -> {second}")
        return found + [f"branches {pair}" for pair in self.branches if not self.about(*pair)]

    def unfounded(self) -> list[str]:
        """Refusals about a layer that stands alone, or about a view."""
        together = {node for pair in (*self.pairs, *self.branches) for node in pair}
        found = []
        for node in self.of("layer"):
            alone = not {node, *self.in_front(node)} & together
            beside = any(self.sort(o) == "sum" for o in (*self.operands(node), *self.behind(node)))
            exact = [r for r in self.refusals if r.place.module == node.target and r.subject != "scale and shift"]
            if alone and not beside and not any(self.sort(user) in ("norm", "scale") for user in node.users):
                alike = len([o for o in self.of("layer") if self.operands(o) == self.operands(node)]) > 1
                exact = [r for r in exact if not (alike and "parallel" in r.subject)]
                found += [f"{r.where}: {r.subject}: {r.reason}" for r in exact]
        views = ("view", "reshape", "permute", "transpose", "flatten", "indexing", "cat", "contiguous")
        return found + [f"{r.where}: {r.subject}" for r in self.refusals if r.subject in views]


def norms_left(fused: Fused) -> Counter[str]:
    return Counter(node.meta.get("module_path") or node.name for node in fused.of("norm"))


def check(fused: Fused) -> None:
    texts = [f"{r.where}: {r.subject}: {r.reason}" for r in fused.refusals]
    about_norms = [r for r in fused.refusals if "norm" in r.subject.lower() and "weights of" not in r.subject]
    refused = Counter(r.place.module for r in about_norms)
    assert refused == norms_left(fused), texts
    assert fused.unexplained() == [], texts
    assert fused.unfounded() == []
    for refusal, text in zip(fused.refusals, texts, strict=True):
        assert refusal.place.module, text
        assert len(refusal.reason.split()) > 4, text
        assert refusal.remedy or any(words in refusal.reason for words in NOTHING_HELPS), text


def fuse(case: BlockCase | Trap) -> Fused:
    inputs = case.inputs() if isinstance(case, BlockCase) else case.example()
    try:
        result = reparam.fuse(case.make(), inputs, verify=False)
    except ReparamError:
        if not case.may_refuse:
            raise
        pytest.skip("refused as a whole")
    return Fused(result.module, result.report.refusals)


ZOO = (*BLOCKS, *ALL)


@pytest.mark.parametrize("case", sampled(ZOO, 5), ids=lambda case: case.name)
def test_zoo(case: BlockCase | Trap) -> None:
    check(fuse(case))


@functools.cache
def real(name: str) -> Fused:
    """Fused, with random BatchNorms; what its numbers are is of no importance here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm_zoo.import_timm().create_model(name, pretrained=False).eval()
    x = torch.randn(1, 3, REAL[name], REAL[name], generator=torch.Generator().manual_seed(0))
    result = reparam.fuse(timm_zoo.randomise_batch_norms(model), x, verify=False)
    return Fused(result.module, result.report.refusals)


@pytest.mark.parametrize("name", sampled(list(REAL), 4))
def test_real_models(name: str) -> None:
    fused = real(name)
    check(fused)
    assert all(r.place.source for r in fused.refusals)


def pair(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


IMAGE = (1, 16, 8, 8)
# Name, model, input, objective, what is refused, what the sentence must hold, and the remedy.
SENTENCES = [
    (
        "64-16-64: 4096 instead of 2048",
        pair(nn.Linear(64, 16), nn.Linear(16, 64)),
        (4, 64),
        "latency",
        ("0", "Linear"),
        "merging it into 1 is exact, but one dense layer computes 2.0 times the multiply-adds of the two",
        "",
    ),
    (
        "depthwise and pointwise: 9*16 instead of 9+16",
        pair(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1)),
        IMAGE,
        "macs",
        ("0", "Conv2d"),
        "one dense 3x3 layer computes 5.8 times the multiply-adds of the two",
        "",
    ),
    (
        "64-30-64: 4096 instead of 3840, and a launch less",
        pair(nn.Linear(64, 30), nn.Linear(30, 64)),
        (4, 64),
        "macs",
        ("0", "Linear"),
        "one dense layer computes 1.07 times the multiply-adds",
        "choose the objective latency",
    ),
    (
        "a shift under zero padding",
        pair(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, padding=1)),
        IMAGE,
        "latency",
        ("0", "Conv2d"),
        "its shift cannot cross the zero padding",
        "move the padding in front of it, pad with its shift, or fuse for one image size (fixed sizes)",
    ),
    (
        "BatchNorm between nonlinearities",
        pair(nn.Tanh(), nn.BatchNorm2d(16), nn.Tanh()),
        IMAGE,
        "latency",
        ("1", "BatchNorm2d"),
        "nothing linear is beside it: it reads 0 and feeds 2",
        "",
    ),
]


@pytest.mark.parametrize(
    ("build", "shape", "objective", "about", "reason", "remedy"),
    [row[1:] for row in SENTENCES],
    ids=[row[0] for row in SENTENCES],
)
def test_sentences(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    objective: str,
    about: tuple[str, str],
    reason: str,
    remedy: str,
) -> None:
    model, x = build().eval(), torch.randn(shape)
    (refusal,) = reparam.fuse(model, x, objective=objective).report.refusals
    assert (refusal.place.module, refusal.subject) == about
    assert reason in refusal.reason
    assert refusal.remedy == remedy
    if remedy.startswith("choose the objective "):
        other = remedy.removeprefix("choose the objective ")
        assert not reparam.fuse(model, x, objective=other).report.refusals


def upsampled(*sizes: int) -> nn.Module:
    parts = {"up": nn.ConvTranspose2d(16, 16, 3, 2, 1), "norm": nn.BatchNorm2d(16)}
    if not sizes:
        return Lambda(lambda m, x: m.norm(m.up(x, output_size=[2 * n for n in x.shape[2:]])).relu(), **parts)
    return Lambda(lambda m, x: m.norm(m.up(x, list(sizes))).relu(), **parts)


def under_a_norm(norm: Callable[..., nn.Module]) -> nn.Module:
    """Besides the norm's, the layer has a hook of somebody's own; without that, its weight is computed once."""
    layer = norm(nn.Conv2d(16, 16, 3))
    layer.register_forward_pre_hook(lambda module, args: None)
    return nn.Sequential(layer, nn.BatchNorm2d(16), nn.ReLU())


# What is refused twice: the layer by its own call, the BatchNorm for the layer beside it.
BESIDE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "output_size": (lambda: upsampled(15, 15), "its output_size is an argument of the call", "output_padding"),
    "output_size_of_sizes": (upsampled, "its output_size is an argument of the call", "output_padding"),
    "weight_norm": (
        lambda: under_a_norm(torch.nn.utils.weight_norm),
        "torch.nn.utils.weight_norm computes its weight in a hook",
        "torch.nn.utils.remove_weight_norm",
    ),
    "spectral_norm": (
        lambda: under_a_norm(torch.nn.utils.spectral_norm),
        "torch.nn.utils.spectral_norm computes its weight in a hook",
        "torch.nn.utils.remove_spectral_norm",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", BESIDE)
def test_a_norm_beside_a_layer_that_stays_is_told_why_that_stays(name: str) -> None:
    build, reason, remedy = BESIDE[name]
    model, x = build().eval(), torch.randn(IMAGE)
    layer, norm = reparam.fuse(model, x).report.refusals
    assert layer.reason.startswith(reason)
    assert norm.subject == "BatchNorm2d"
    assert f"{layer.place.module} beside it stays as it is: {reason}" in norm.reason
    assert remedy in layer.remedy
    assert remedy in norm.remedy


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_the_remedies_for_norms_of_weights_help(name: str) -> None:
    model, x = BESIDE[name][0]().eval(), torch.randn(IMAGE)
    expected = model(x)
    getattr(torch.nn.utils, f"remove_{name}")(model[0])  # type: ignore[index]
    model[0]._forward_pre_hooks.clear()  # type: ignore[index]
    result = reparam.fuse(model, x)
    assert result.report.after.batch_norms == 0
    assert relative_error(expected, result.module(x)) < 1e-5


def test_nothing_is_said_about_what_does_not_look_foldable() -> None:
    layers = (nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Tanh(), nn.Flatten(2), nn.Sigmoid())
    assert not reparam.fuse(nn.Sequential(*layers).eval(), torch.randn(IMAGE), verify=False).report.refusals


SABOTAGED = [
    "norm_after_relu_padded",
    "separable",
    "norm_behind_max_pool",
    "second_consumer_besides_the_norm",
    "branches_zeros_and_reflect",
]


@pytest.mark.parametrize("name", SABOTAGED)
def test_a_missing_refusal_is_noticed(name: str) -> None:
    """Each refusal in turn is dropped, then replaced by one about something else."""
    fused = fuse(next(case for case in ZOO if case.name == name))
    check(fused)
    assert fused.refusals
    for index, refusal in enumerate(fused.refusals):
        others = fused.refusals[:index] + fused.refusals[index + 1 :]
        elsewhere = replace(refusal, place=replace(refusal.place, module="elsewhere", source=None))
        for changed in (others, (*others, elsewhere)):
            with pytest.raises(AssertionError):
                check(replace(fused, refusals=changed))


def test_a_pass_that_drops_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collapse.reasons
    monkeypatch.setattr(collapse, "reasons", lambda *args: whole(*args)[1:])
    with pytest.raises(AssertionError):
        check(fuse(next(case for case in ZOO if case.name == "separable")))


def test_a_refusal_about_a_lone_layer_is_noticed() -> None:
    fused = fuse(next(case for case in ZOO if case.name == "relu_between_conv_and_norm"))
    lone = Refusal("collapse", replace(fused.refusals[0].place, module="0"), "Conv2d", "it stands between two others")
    with pytest.raises(AssertionError):
        check(replace(fused, refusals=(*fused.refusals, lone)))
