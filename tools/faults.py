"""Faults that a rewrite may have, put in while the engine writes: the n-th layer that the collapse makes is wrong.

Both forms of the layer are changed, the rounded one and the one in float64 that verification takes for the algebra: a
rewrite that is wrong computes wrong weights, and rounds them properly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from reparam.graph.emit import Layer
from reparam.passes import collapse
from reparam.passes.ledger import current
from reparam.passes.plan import Plan

Change = Callable[[Layer], Layer | None]
"""Makes another layer of one; None where the fault does not exist for such a layer."""


@dataclass
class Injected:
    """What was changed: names of the modules that the changed rewrites stand at."""

    places: list[str] = field(default_factory=list)
    written: int = 0


@contextmanager
def rewrites_sabotaged(changes: Mapping[int, Change] | Callable[[int, Plan], Change | None]) -> Iterator[Injected]:
    """Within it, some rewrites of the collapse are wrong.

    Args:
        changes: the change for each place in the order in which the collapse first writes, counting those plans that
            the change applies to; or a function of that number and the plan.
    """
    injected = Injected()
    write = collapse.write
    known: dict[tuple[str, str, int], Change | None] = {}

    def changed_write(plan: Plan, graph: fx.Graph, root: nn.Module, *rest: Any) -> fx.Node:
        key = (current().path, str(plan.node.meta.get("module_path") or plan.node.name), len(plan.parts))
        if key not in known:
            number, injected.written = injected.written, injected.written + 1
            known[key] = changes.get(number) if isinstance(changes, Mapping) else changes(number, plan)
        change = known[key]
        made = None if change is None else sabotaged(plan, change)
        if made is not None:
            injected.places.append(".".join(filter(None, key[:2])))
        return write(plan if made is None else made, graph, root, *rest)

    with mock.patch.object(collapse, "write", changed_write):
        yield injected


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
