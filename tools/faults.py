"""Faults that a rewrite may have, put in while the engine writes: the n-th layer that the collapse makes is wrong.

Both forms of the layer are changed, the rounded one and the one in float64 that verification takes for the algebra: a
rewrite that is wrong computes wrong weights, and rounds them properly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from reparam.graph.emit import Layer
from reparam.graph.nodes import attribute
from reparam.passes import collapse
from reparam.passes.ledger import current
from reparam.passes.plan import Plan

Change = Callable[[Layer], "Layer | None"]
"""Makes another layer of one; None where the fault does not exist for such a layer."""
Fault = Callable[[Plan, nn.Module], "Change | None"]
"""The change for a plan whose graph refers to a module; None where the fault does not exist for such a plan."""


@dataclass
class Injected:
    """What was changed: names of the modules that the changed rewrites stand at, each once."""

    places: list[str] = field(default_factory=list)
    written: int = 0


Choose = Callable[[int, Plan, nn.Module], "Change | None"]


@contextmanager
def rewrites_sabotaged(changes: Mapping[int, Change] | Choose) -> Iterator[Injected]:
    """Within it, some rewrites of the collapse are wrong, the same ones whenever a model is fused anew.

    Args:
        changes: the change for each number in the order in which the collapse first writes; or a function of that
            number, the plan, and the module that its graph refers to.
    """
    injected = Injected()
    write = collapse.write
    known: dict[tuple[str, str, int], Change | None] = {}

    def changed_write(plan: Plan, graph: fx.Graph, root: nn.Module, *rest: Any) -> fx.Node:
        path, module = current().path, str(plan.node.meta.get("module_path") or plan.node.name)
        key = (path, module, len(plan.parts))
        if key not in known:
            number, injected.written = injected.written, injected.written + 1
            known[key] = changes.get(number) if isinstance(changes, Mapping) else changes(number, plan, root)
        change = known[key]
        made = None if change is None or change is drop_an_output else sabotaged(plan, change)
        place = ".".join(filter(None, (path, module)))
        if (made is not None or change is drop_an_output) and place not in injected.places:
            injected.places.append(place)
        if change is drop_an_output:
            output = graph.output_node()
            output.args = (tuple(output.args[0][1:]),)
        return write(plan if made is None else made, graph, root, *rest)

    with mock.patch.object(collapse, "write", changed_write):
        yield injected


def once(faults: Sequence[Fault], start: int) -> Choose:
    """Each fault in turn at the first plan from number `start` on that it exists for, one for each plan."""
    waiting = list(faults)

    def choose(number: int, plan: Plan, root: nn.Module) -> Change | None:
        for fault in waiting if number >= start else ():
            change = fault(plan, root)
            if change is drop_an_output or (change is not None and sabotaged(plan, change) is not None):
                waiting.remove(fault)
                return change
        return None

    return choose


def anywhere(change: Change) -> Fault:
    """A fault that only depends on the layer."""
    return lambda plan, root: change


def drop_an_output(layer: Layer) -> Layer | None:
    """Stands for a rewrite that loses the first of several outputs of the model."""
    return layer


def sabotaged(plan: Plan, change: Change) -> Plan | None:
    """The plan with its first layer changed; None if the change exists for none of its layers."""
    parts = list(plan.parts)
    for index, part in enumerate(parts):
        layer = None if part.layer is None else both(part.layer, change)
        if layer is not None:
            parts[index] = replace(part, layer=layer)
            return replace(plan, parts=tuple(parts))
    return None


def both(layer: Layer, change: Change) -> Layer | None:
    """The layer changed, and so the one before rounding."""
    if layer.module is None:
        return None
    changed, exact = change(_copied(layer)), layer.float64
    if changed is None or exact is None:
        return changed

    def wide() -> Layer:
        made = exact()
        assert isinstance(made, Layer)
        other = change(_copied(made))
        assert other is not None
        return other

    return replace(changed, float64=wide)


def _copied(layer: Layer) -> Layer:
    """With weights that may be written to."""
    assert layer.module is not None
    module = copy.copy(layer.module)
    module._parameters = {
        name: None if p is None else nn.Parameter(torch.empty_like(p, device=p.device).copy_(p), False)
        for name, p in layer.module._parameters.items()
    }
    return replace(layer, module=module)


def in_place(edit: Callable[[nn.Module], bool | None]) -> Change:
    """A change that edits the layer's module; False where it does not apply."""

    def change(layer: Layer) -> Layer | None:
        assert layer.module is not None
        with torch.no_grad():
            return None if edit(layer.module) is False else layer

    return change


@in_place
def perturb_one_weight(module: Any) -> None:
    flat = module.weight.view(-1)
    flat[flat.abs().argmax()] *= 1.001


@in_place
def swap_two_channels(module: Any) -> bool:
    if len(module.weight) < 2:
        return False
    for tensor in (module.weight, module.bias):
        if tensor is not None:
            tensor[[0, 1]] = tensor[[1, 0]]
    return True


@in_place
def drop_a_bias(module: Any) -> bool:
    if module.bias is None or not bool(module.bias.any()):
        return False
    module.bias = None
    return True


@in_place
def break_the_border(module: Any) -> bool:
    """The padding repeats the image's edge where it should be zero."""
    padding = getattr(module, "padding", 0)
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or not any(padding) or isinstance(padding, str):
        return False
    module.padding_mode = "replicate"
    module._reversed_padding_repeated_twice = [p for size in reversed(padding) for p in (size, size)]
    return True


@in_place
def insert_a_nan(module: Any) -> None:
    module.weight.view(-1)[0] = float("nan")


@in_place
def return_a_constant(module: Any) -> bool:
    if module.bias is None:
        return False
    module.weight.zero_()
    return True


@dataclass(frozen=True)
class Statistics:
    """What a BatchNorm holds; each tensor of shape [channels], float64."""

    mean: torch.Tensor
    variance: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    eps: float


def statistics(plan: Plan, root: nn.Module) -> Statistics | None:
    """Those of the last BatchNorm that goes into a plan; None if there is none."""
    node: Any = plan.node
    for _ in range(4):
        module = root.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return _statistics(module.running_mean, module.running_var, module.weight, module.bias, module.eps)
        if node.target is torch.nn.functional.batch_norm:
            held = {**dict(zip(_BATCH_NORM, node.args, strict=False)), **node.kwargs}
            tensors = [attribute(root, str(held[name].target)) for name in _BATCH_NORM[1:5]]
            return _statistics(*tensors, held.get("eps", 1e-5))
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return None


_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def _statistics(mean: Any, variance: Any, gamma: Any, beta: Any, eps: float) -> Statistics:
    return Statistics(*(tensor.detach().double() for tensor in (mean, variance, gamma, beta)), eps)


def wrong_eps(plan: Plan, root: nn.Module) -> Change | None:
    """The BatchNorm is folded with a hundred times its eps."""
    found = statistics(plan, root)
    if found is None:
        return None
    ratio = ((found.variance + found.eps) / (found.variance + 100 * found.eps)).sqrt()
    return _rescaled(ratio, found.beta * (1 - ratio))


def fold_twice(plan: Plan, root: nn.Module) -> Change | None:
    """The BatchNorm is folded into the layer, and once more."""
    found = statistics(plan, root)
    if found is None:
        return None
    scale = found.gamma / (found.variance + found.eps).sqrt()
    return _rescaled(scale, found.beta - found.mean * scale)


def _rescaled(scale: torch.Tensor, shift: torch.Tensor) -> Change:
    def edit(module: Any) -> bool:
        weight, bias = module.weight, module.bias
        if bias is None or len(weight) != len(scale) or len(bias) != len(scale):
            return False
        weight.copy_(weight.double() * scale.reshape(-1, *[1] * (weight.dim() - 1)))
        bias.copy_(bias.double() * scale + shift)
        return True

    return in_place(edit)


FAULTS: dict[str, Fault] = {
    "one weight": anywhere(perturb_one_weight),
    "two channels": anywhere(swap_two_channels),
    "no bias": anywhere(drop_a_bias),
    "border": anywhere(break_the_border),
    "eps": wrong_eps,
    "folded twice": fold_twice,
    "constant": anywhere(return_a_constant),
    "NaN": anywhere(insert_a_nan),
    "no output": anywhere(drop_an_output),
}
"""Those that leave less of what is behind them to be seen come last."""
