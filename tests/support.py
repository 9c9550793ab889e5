"""What the tests measure with, independent of the engine: errors between outputs, counts of operations, samples.

Operations are counted twice, by two means that cannot share a mistake: `static_counts` reads modules and graphs,
`executed_counts` runs the module and looks at what the dispatcher is asked to do.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn.modules import batchnorm, conv, dropout
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from reparam.inputs import Inputs

EXACT = 1e-11
"""Largest relative error, in float64, that rounding explains; folding wrongly costs ten orders of magnitude more."""

_FUNCTION_KINDS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "_convolution"), "conv"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "conv"),
    **dict.fromkeys(("batch_norm", "native_batch_norm", "_native_batch_norm_legit"), "bn"),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm"), "bn"),
    **dict.fromkeys(("linear", "addmm", "mm"), "linear"),
    **dict.fromkeys(("add", "add_", "iadd", "sub", "sub_", "isub", "rsub", "subtract"), "add"),
    **dict.fromkeys(("mul", "mul_", "imul", "multiply", "div", "div_", "truediv", "itruediv", "divide"), "mul"),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"), "dropout"),
    **dict.fromkeys(("feature_alpha_dropout", "native_dropout", "dropout_", "bernoulli", "bernoulli_"), "dropout"),
}
_MODULE_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (conv._ConvNd, "conv"),
    (batchnorm._BatchNorm, "bn"),
    (nn.Linear, "linear"),
    (dropout._DropoutNd, "dropout"),
    (nn.Identity, "identity"),
)


def _module_kind(module: nn.Module) -> str | None:
    return next((kind for types, kind in _MODULE_KINDS if isinstance(module, types)), None)


def _function_kind(target: Any) -> str | None:
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return _FUNCTION_KINDS.get(name)


def _called(module: nn.Module) -> Iterator[str]:
    """The kind of every operation that `module` calls, read from graphs where there are, else from modules."""
    kind = _module_kind(module)
    if kind is not None:
        yield kind
    elif isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            if node.op == "call_module":
                yield from _called(module.get_submodule(node.target))
            elif node.op in ("call_function", "call_method"):
                found = _function_kind(node.target)
                if found is not None and not _only_about_shapes(node):
                    yield found
    else:
        for child in module.children():
            yield from _called(child)


def _only_about_shapes(node: fx.Node) -> bool:
    """Arithmetic on sizes, not on tensors."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return isinstance(value, (int, float, bool, torch.SymInt))


def static_counts(module: nn.Module) -> Counter[str]:
    """Operations by kind: conv, bn, linear, add (and sub), mul (and div), dropout, identity; one for each call site."""
    return Counter(_called(module))


def idle_layers(module: nn.Module) -> list[str]:
    """Names of convs, BNs and linears that a graph module holds and never calls: dead weight in every file."""
    if not isinstance(module, fx.GraphModule):
        return []
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    attributes = {str(node.target).rpartition(".")[0] for node in module.graph.nodes if node.op == "get_attr"}
    kinds = {"conv", "bn", "linear"}
    return [
        name
        for name, child in module.named_modules()
        if _module_kind(child) in kinds
        and name not in attributes
        and not any(name == target or name.startswith(target + ".") for target in called)
    ]


def counts_of(counts: Counter[str], kinds: Iterable[str]) -> dict[str, int]:
    """The counts of `kinds`; a kind "conv+linear" is the sum of its parts."""
    return {kind: sum(counts[part] for part in kind.split("+")) for kind in kinds}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _function_kind(func)
        if kind is None and func.overloadpacket is torch.ops.aten.bmm and any(arg.stride(0) == 0 for arg in args):
            kind = "linear"  # one weight for the whole batch: a linear layer on a permuted tensor, without bias
        if kind is not None:
            self.counts[kind] += 1
        return func(*args, **(kwargs or {}))


def executed_counts(module: nn.Module, inputs: Any) -> Counter[str]:
    """Operations by kind (conv, bn, linear, add, mul, dropout) that one forward pass really dispatches."""
    recorder = _Recorder()
    fresh = Inputs.of(inputs).clone()
    with torch.no_grad(), recorder:
        module(*fresh.args, **fresh.kwargs)
    return recorder.counts


def run(module: nn.Module, inputs: Any) -> Any:
    """The output of a private copy of `module` in eval mode, on private copies of the inputs."""
    return Inputs.of(inputs).call(copy.deepcopy(module).eval())


def relative_error(expected: Any, actual: Any) -> float:
    """The largest `max|actual - expected| / max|expected|` over all outputs; infinite if anything else differs.

    Structure, shapes, dtypes, plain values and the places of non-finite numbers must be the same.
    """
    wanted, wanted_spec = pytree.tree_flatten(expected)
    got, got_spec = pytree.tree_flatten(actual)
    if wanted_spec != got_spec:
        return float("inf")
    return max((_leaf_error(a, b) for a, b in zip(wanted, got, strict=True)), default=0.0)


def _leaf_error(wanted: Any, got: Any) -> float:
    if not isinstance(wanted, torch.Tensor):
        return 0.0 if wanted == got else float("inf")
    if not isinstance(got, torch.Tensor) or wanted.shape != got.shape or wanted.dtype != got.dtype:
        return float("inf")
    if not wanted.is_floating_point() or wanted.numel() == 0:
        return 0.0 if torch.equal(wanted, got) else float("inf")
    a, b = wanted.to(torch.float64), got.to(torch.float64)
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)):
        return float("inf")
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = (a[finite] - b[finite]).abs().max().item()
    largest = a[finite].abs().max().item()
    if largest == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float(difference / largest)


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything of a model that `fuse` must leave alone: tensors bit for bit, flags, hooks, attributes' identity."""
    return {
        "tensors": {
            name: (tensor.detach().clone(), tensor.data_ptr(), getattr(tensor, "requires_grad", False))
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        },
        "training": {name: child.training for name, child in module.named_modules()},
        "types": {name: type(child) for name, child in module.named_modules()},
        "hooks": {name: len(child._forward_hooks) for name, child in module.named_modules()},
        "attributes": {name: sorted(vars(child)) for name, child in module.named_modules()},
    }


def assert_unchanged(before: dict[str, Any], module: nn.Module) -> None:
    """Asserts that `module` is what it was when the snapshot `before` was taken."""
    after = snapshot(module)
    for key in ("training", "types", "hooks", "attributes"):
        assert after[key] == before[key], key
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (tensor, pointer, grad) in before["tensors"].items():
        now, now_pointer, now_grad = after["tensors"][name]
        assert torch.equal(tensor.nan_to_num(), now.nan_to_num()), f"{name} was written to"
        assert (pointer, grad) == (now_pointer, now_grad), f"{name} was replaced"


def sampled(cases: Sequence[Any], every: int) -> list[Any]:
    """Parameters of a test: every so manieth of the cases by default, the others by `-m slow`."""
    found = []
    for number, case in enumerate(cases):
        marks = () if number % every == 0 else pytest.mark.slow
        found.append(pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks))
    return found
