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
from typing import Any

import pytest
import torch
from torch import fx, nn

import reparam
from reparam import Refusal
from reparam.errors import ReparamError
from reparam.passes import collapse
from tests.test_silently_wrong import ALL
from tests.zoo import BLOCKS, BlockCase
from tests.zoo.trap import Trap
from tools import timm_zoo

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel:UserWarning")

REAL = {
    "densenet121": 64,
    "levit_128s": 224,
    "nextvit_small": 64,
    "fastvit_t8": 64,
    "convnext_atto": 64,
    "resnet18": 64,
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
    "adaptiveavgpool3d mean",
}
SORTS = {word: sort for sort, words in _WORDS.items() for word in words.split()}
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
            beside = any(self.sort(o) == "sum" for o in (*self.operands(node), *node.users))
            exact = [r for r in self.refusals if r.place.module == str(node.target)]
            if alone and not beside and not any(self.sort(user) in ("norm", "scale") for user in node.users):
                found += [f"{r.where}: {r.subject}: {r.reason}" for r in exact]
        views = ("view", "reshape", "permute", "transpose", "flatten", "indexing", "cat", "contiguous")
        return found + [f"{r.where}: {r.subject}" for r in self.refusals if r.subject in views]


def norms_left(fused: Fused) -> Counter[str]:
    return Counter(node.meta.get("module_path") or node.name for node in fused.of("norm"))


def check(fused: Fused) -> None:
    texts = [f"{r.where}: {r.subject}: {r.reason}" for r in fused.refusals]
    refused = Counter(r.place.module for r in fused.refusals if "norm" in r.subject.lower())
    assert refused == norms_left(fused), texts
    assert fused.unexplained() == [], texts
    assert fused.unfounded() == []
    for refusal, text in zip(fused.refusals, texts, strict=True):
        assert refusal.place.module, text
        assert len(refusal.reason.split()) > 4, text
        assert "its output " not in refusal.remedy, text


def fuse(case: BlockCase | Trap) -> Fused:
    inputs = case.inputs() if isinstance(case, BlockCase) else case.example()
    try:
        result = reparam.fuse(case.make(), inputs, verify=False)
    except ReparamError:
        if not case.may_refuse:
            raise
        pytest.skip("refused as a whole")
    return Fused(result.module, result.report.refusals)


@pytest.mark.parametrize("case", [*BLOCKS, *ALL], ids=lambda case: case.name)
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


@pytest.mark.parametrize("name", list(REAL))
def test_real_models(name: str) -> None:
    fused = real(name)
    check(fused)
    assert all(r.place.source for r in fused.refusals)
