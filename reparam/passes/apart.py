"""Channels that are taken apart, scaled one by one, and put together again are scaled together.

    cat([s_0 * x[:, 0:1] + t_0, s_1 * x[:, 1:2] + t_1, ...], 1) = s * x + t

So is an image's normalisation written now and then, with `x[:, i]`, `stack` or `split` as well; `s * x + t` is one
operation, which moves into the layer behind it. Preconditions: all parts are of one tensor, each is a choice of its
channels by number, scaled and shifted by one number each, and read by nobody else. Of an input whose channels are not
counted by a layer, `narrow` takes as many as are read, which fails where the original fails: when there are fewer. A
slice does not fail then, so the last part may be one only where a layer counts the channels of the whole.

Not done: writing into a copy channel by channel, `y[:, i] = ...`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn

from reparam.algebra import Inexact, from_scale_shift
from reparam.graph.emit import Layer, insert_layer, layer_for
from reparam.graph.lift import LiftTable
from reparam.graph.nodes import described, escapes, free_name, info, kind, pinned, place, stand_for
from reparam.graph.normal import eliminate_dead_code
from reparam.graph.table import TABLE
from reparam.passes.base import Refusal, Rewrite
from reparam.passes.ledger import allowed
from reparam.passes.scaling import Surroundings, only_reader

_CATS = (torch.cat, torch.concat, torch.concatenate)
_TAKE = (torch.select, "select", torch.narrow, "narrow")
_ALL = slice(None)


@dataclass(frozen=True)
class Part:
    """A part: `scale * source[..., start:stop, ...] + shift`; `gone` if the axis is not there, as in `x[:, 0]`."""

    source: fx.Node
    gone: bool
    scale: float = 1.0
    shift: float = 0.0
    start: int = -1
    stop: int = -1
    nodes: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Apart:
    """The pass. `table` says what is affine."""

    table: LiftTable = TABLE
    name = "channels apart"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        rewrites: list[Rewrite] = []
        surroundings: Surroundings | None = None
        for node in list(graph.nodes):
            if node.target not in (*_CATS, torch.stack) or info(node) is None or pinned(node) is not None:
                continue
            surroundings = surroundings or Surroundings(graph, root, self.table)
            axis, parts = _parts(node, surroundings)
            together = _put_together(node, axis, parts) if len(parts) > 1 else None
            if together is None:
                continue
            gone = [one for part in parts for one in part.nodes]
            what = tuple(described(one, root) for one in (*gone, node))
            said = f"scale and shift of {kind(parts[0].source, root)}"
            rewrite = Rewrite(self.name, place(node), what, said, "cat(s_i * x[:, i] + t_i) = s * x + t")
            if allowed(rewrite, *gone, node):
                _write(node, axis, together, surroundings, graph, root)
                rewrites.append(rewrite)
                surroundings = None
        eliminate_dead_code(graph)
        return rewrites, []


def _parts(node: fx.Node, surroundings: Surroundings) -> tuple[int, list[Part]]:
    """The parts that a node puts together, along which axis; no parts if they are not all of one tensor."""
    given = node.args[0] if node.args else node.kwargs.get("tensors")
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    tensor = info(node)
    assert tensor is not None
    if type(axis) is not int or not isinstance(given, (list, tuple)) or len(given) < 2:
        return 0, []
    axis %= len(tensor.shape)
    stacked = node.target is torch.stack
    found: list[Part] = []
    for value in given:
        if not isinstance(value, fx.Node) or only_reader(value) is not node:
            return axis, []
        part = _traced(Part(value, stacked), axis, surroundings)
        if part is None or (found and part.source is not found[0].source):
            return axis, []
        found.append(part)
    source = info(found[0].source)
    fits = source is not None and (source.dtype, len(source.shape)) == (tensor.dtype, len(tensor.shape))
    together = tensor.shape[axis] == sum(part.stop - part.start for part in found)
    consecutive = all(one.stop == other.start for one, other in pairwise(found))
    counted = surroundings.sizes.dims(node)[axis].literal is not None or not _takes_fewer(found[-1], axis, surroundings)
    return axis, found if fits and together and consecutive and counted and pinned(found[0].source) is None else []


def _takes_fewer(part: Part, axis: int, surroundings: Surroundings) -> bool:
    """Whether a part has fewer channels, or none, of a tensor that has fewer; else it fails."""
    chosen = part.nodes[0]
    index = chosen.args[1] if chosen.target is operator.getitem else None
    sliced = isinstance(index[axis] if isinstance(index, tuple) else index, slice)
    return sliced and surroundings.sizes.dims(part.source)[axis].literal is None


def _traced(part: Part, axis: int, surroundings: Surroundings) -> Part | None:
    """From a part back to the tensor it is chosen from."""
    while True:
        node = part.source
        if info(node) is None or pinned(node) is not None or not node.op.startswith("call") or not node.args:
            return None
        source = node.args[0]
        longer = replace(part, nodes=(node, *part.nodes))
        window = _window(node, axis, part.gone) if isinstance(source, fx.Node) else None
        if window is not None and isinstance(source, fx.Node):
            through: Any = source if info(source) is not None else source.args[0]
            return replace(longer, source=through, start=window[0], stop=window[1]) if _is_node(through) else None
        if not part.gone and isinstance(source, fx.Node) and _adds(node, axis):
            part = replace(longer, source=source, gone=True)
        else:
            run = surroundings.single(node)
            if run is None or run.axis is not None:
                return None
            shift = part.shift + part.scale * run.shift.item()
            part = replace(longer, source=run.source, scale=part.scale * run.scale.item(), shift=shift)
        if only_reader(part.source) is not node:
            return None


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node) and info(value) is not None


def _adds(node: fx.Node, axis: int) -> bool:
    """Whether a node only puts the axis there (`unsqueeze(1)`, `[:, None]`)."""
    if node.target in (torch.unsqueeze, "unsqueeze"):
        at = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return type(at) is int and at % len(info(node).shape) == axis  # type: ignore[union-attr]
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    parts = node.args[1]
    return len(parts) > axis and parts[axis] is None and all(_is_all(p) for i, p in enumerate(parts) if i != axis)


def _is_all(part: Any) -> bool:
    return isinstance(part, slice) and part == _ALL


def _window(node: fx.Node, axis: int, gone: bool) -> tuple[int, int] | None:
    """The channels that a node chooses, if they are known by number, whatever the size of what it chooses from."""
    if node.target in _TAKE:
        takes = node.target in _TAKE[:2]
        if node.kwargs or len(node.args) != (3 if takes else 4) or not all(type(one) is int for one in node.args[1:]):
            return None
        source, at, start, *length = node.args
        rank = len(info(source).shape) if isinstance(source, fx.Node) and info(source) is not None else 0  # type: ignore[union-attr]
        same = rank > 0 and at % rank == axis  # type: ignore[operator]
        return _checked(start, start + (1 if takes else length[0]), gone, takes) if same else None  # type: ignore[arg-type, operator]
    if node.target is not operator.getitem:
        return None
    source, index = node.args
    if isinstance(source, fx.Node) and info(source) is None:
        return _of_split(source, index, axis, gone)
    parts = index if isinstance(index, tuple) else (index,)
    if len(parts) <= axis or not all(_is_all(part) for at, part in enumerate(parts) if at != axis):
        return None
    chosen = parts[axis]
    if type(chosen) is int:
        return _checked(chosen, chosen + 1, gone, True)
    if isinstance(chosen, slice) and type(chosen.stop) is int and chosen.step in (None, 1):
        start = 0 if chosen.start is None else chosen.start
        return _checked(start, chosen.stop, gone, False) if type(start) is int else None
    return None


def _of_split(split: fx.Node, index: Any, axis: int, gone: bool) -> tuple[int, int] | None:
    """`x.unbind(1)[i]`, `x.split(1, 1)[i]`."""
    takes = split.target in (torch.unbind, "unbind")
    if not takes and split.target not in (torch.split, "split"):
        return None
    rest = [*split.args[1:], *([split.kwargs["dim"]] if list(split.kwargs) == ["dim"] else [])]
    if type(index) is not int or len(rest) + (0 if list(split.kwargs) == ["dim"] else len(split.kwargs)) != 2 - takes:
        return None
    source = split.args[0] if split.args else None
    tensor = info(source) if isinstance(source, fx.Node) else None
    if (
        tensor is None
        or type(rest[-1]) is not int
        or rest[-1] % len(tensor.shape) != axis
        or rest[0] not in (1, rest[-1])
    ):
        return None
    return _checked(index, index + 1, gone, takes) if takes or rest[0] == 1 else None


def _checked(start: int, stop: int, gone: bool, takes: bool) -> tuple[int, int] | None:
    """The window, if the axis is missing where it was taken, and counted from the front."""
    return (start, stop) if 0 <= start < stop and gone == takes else None


@dataclass(frozen=True)
class _Together:
    """What stands for all parts: `layer` (None for nothing) of the channels from `start` to `stop` of `source`."""

    source: fx.Node
    start: int
    stop: int
    layer: Layer | None


def _put_together(node: fx.Node, axis: int, parts: list[Part]) -> _Together | None:
    """The scale and shift of all channels; None if they cannot be written."""
    tensor = info(node)
    assert tensor is not None
    scale, shift = (
        torch.tensor(
            [value for part in parts for value in [getattr(part, which)] * (part.stop - part.start)],
            dtype=torch.float64,
            device=tensor.device,
        )
        for which in ("scale", "shift")
    )
    window = (parts[0].source, parts[0].start, parts[-1].stop)
    if not bool((scale != 1).any()) and not bool(shift.any()):
        return None if escapes(node) else _Together(*window, None)  # a caller would get hold of another tensor
    layer = layer_for(from_scale_shift(scale, shift), tensor, axis, shift)
    return None if isinstance(layer, Inexact) else _Together(*window, layer)


def _write(
    node: fx.Node, axis: int, made: _Together, surroundings: Surroundings, graph: fx.Graph, root: nn.Module
) -> None:
    source, length = made.source, made.stop - made.start
    with graph.inserting_before(node):
        if surroundings.sizes.dims(source)[axis].literal != length:
            source = graph.call_method("narrow", (source, axis, made.start, length))
            stand_for(source, node)
            source.meta.update(tensor=info(node), aliases=(made.source,))
        if made.layer is not None:
            source = insert_layer(graph, root, source, made.layer, free_name(root, node))
            stand_for(source, node)
            source.meta["tensor"] = info(node)
    node.replace_all_uses_with(source)


__all__ = ["Apart"]
