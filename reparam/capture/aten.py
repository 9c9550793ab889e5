"""Graphs of `torch.export` in the words of `torch` and `torch.nn.functional`, so that passes know one vocabulary.

    aten.conv2d.default(x, w, None, [2, 2])  ->  F.conv2d(x, w, None, [2, 2])

An operator that has a function or method of the same name and order of arguments is replaced by it; those that differ
have a rule below; assertions about sizes that only serve the export go. What is left stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import fx

Rule: TypeAlias = "Callable[[fx.Graph, dict[str, Any]], Any]"
_END = (1 << 63) - 1


def spell_out(graph: fx.Graph) -> None:
    """Rewrites the graph of an exported program in place. `meta` of each node goes to what replaces it."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target.namespace != "aten":
            continue
        name = node.target._schema.name.removeprefix("aten::")
        if name in _DROPPED:
            graph.erase_node(node)
            continue
        with graph.inserting_before(node):
            made = _spelled(graph, node, name)
        if made is not node:
            _replace(graph, node, made)


def _spelled(graph: fx.Graph, node: fx.Node, name: str) -> Any:
    """What replaces a node: a node, a tuple of nodes, or itself."""
    if name in _RULES:
        return _RULES[name](graph, _named(node))
    function = _SAME.get(name) or _same_function(name)
    if function is not None:
        return graph.call_function(function, node.args, dict(node.kwargs))
    if name in _PROPERTIES:
        return graph.call_function(getattr, (*node.args, name))
    if name.startswith("linalg_"):
        function = getattr(torch.linalg, name.removeprefix("linalg_"))
        return graph.call_function(function, node.args, dict(node.kwargs))
    if callable(getattr(torch.Tensor, name, None)) and node.args and isinstance(node.args[0], fx.Node):
        return graph.call_method(name, node.args, dict(node.kwargs))
    return node


def _replace(graph: fx.Graph, node: fx.Node, made: Any) -> None:
    if isinstance(made, tuple):
        for user in list(node.users):
            part = made[user.args[1]]  # type: ignore[index]
            if part is None:
                raise NotImplementedError(f"{node.target} is read for more than its first result")
            user.replace_all_uses_with(part)
            graph.erase_node(user)
        made = made[0]
    else:
        node.replace_all_uses_with(made)
    if isinstance(made, fx.Node) and "nn_module_stack" not in made.meta:
        made.meta = dict(node.meta)
    graph.erase_node(node)


def _named(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by the names of the operator's schema, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found: dict[str, Any] = {}
    for index, argument in enumerate(node.target._schema.arguments):
        if index < len(node.args):
            found[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            found[argument.name] = argument.default_value
    return found


def _same_function(name: str) -> Callable[..., Any] | None:
    """The function that torch generates from the operator's schema: it takes the same arguments in the same order."""
    for owner in (torch, torch._C._nn):
        function = getattr(owner, name, None)
        if isinstance(function, type(torch.relu)) and not name.endswith("_"):
            return function
    return None


def _batch_norm(graph: fx.Graph, a: dict[str, Any]) -> Any:
    order = ("input", "running_mean", "running_var", "weight", "bias")
    return graph.call_function(
        F.batch_norm, tuple(a[name] for name in order), {k: a[k] for k in ("training", "momentum", "eps")}
    )


def _batch_norm_in_eval_mode(graph: fx.Graph, a: dict[str, Any]) -> Any:
    return _batch_norm(graph, {**a, "training": False}), None, None


def _convolution(graph: fx.Graph, a: dict[str, Any]) -> Any:
    functions: tuple[Callable[..., Any], ...] = (F.conv1d, F.conv2d, F.conv3d)
    order = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    if a["transposed"]:
        functions = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
        order = ["input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"]
    return graph.call_function(functions[len(a["stride"]) - 1], tuple(a[name] for name in order))


def _slice(graph: fx.Graph, a: dict[str, Any]) -> Any:
    start = None if a["start"] in (0, None) else a["start"]
    end = None if a["end"] in (_END, None) else a["end"]
    step = None if a["step"] == 1 else a["step"]
    if start is None and end is None and step is None:
        return a["self"]
    return _indexed(graph, a["self"], a["dim"], slice(start, end, step))


def _select(graph: fx.Graph, a: dict[str, Any]) -> Any:
    return _indexed(graph, a["self"], a["dim"], a["index"])


def _indexed(graph: fx.Graph, tensor: fx.Node, dim: int, index: Any) -> Any:
    parts: Any = (..., index, *[slice(None)] * (-dim - 1)) if dim < 0 else (*[slice(None)] * dim, index)
    return graph.call_function(operator.getitem, (tensor, parts))


def _index(graph: fx.Graph, a: dict[str, Any]) -> Any:
    parts = tuple(slice(None) if part is None else part for part in a["indices"])
    return graph.call_function(operator.getitem, (a["self"], parts))


def _pool(function: Callable[..., Any]) -> Rule:
    def rule(graph: fx.Graph, a: dict[str, Any]) -> Any:
        rest = {key: value for key, value in a.items() if key not in ("self", "kernel_size")}
        rest["stride"] = rest["stride"] or None
        return graph.call_function(function, (a["self"], a["kernel_size"]), rest)

    return rule


def _pool_with_indices(function: Callable[..., Any]) -> Rule:
    return lambda graph, a: (_pool(function)(graph, a), None)


def _interpolation(mode: str) -> Rule:
    def rule(graph: fx.Graph, a: dict[str, Any]) -> Any:
        corners = {"align_corners": a["align_corners"]} if "align_corners" in a else {}
        name = "input" if "input" in a else "self"
        size, factors = a.get("output_size"), a.get("scale_factors")
        return graph.call_function(
            F.interpolate, (a[name],), {"size": size, "scale_factor": factors, "mode": mode, **corners}
        )

    return rule


def _padding(mode: str) -> Rule:
    def rule(graph: fx.Graph, a: dict[str, Any]) -> Any:
        pad = a["pad"] if "pad" in a else a["padding"]
        value = {"value": a["value"]} if mode == "constant" else {}
        return graph.call_function(F.pad, (a["self"], pad), {"mode": mode, **value})

    return rule


def _reordered(function: Callable[..., Any], *names: str, **renamed: str) -> Rule:
    """A function of other order or names than the operator; arguments that are not named are dropped."""

    def rule(graph: fx.Graph, a: dict[str, Any]) -> Any:
        keywords = {ours: a[theirs] for ours, theirs in renamed.items() if theirs in a}
        return graph.call_function(function, tuple(a[name] for name in names), keywords)

    return rule


def _method(name: str, *names: str) -> Rule:
    return lambda graph, a: graph.call_method(name, tuple(a[key] for key in names))


def _in_place(function: Callable[..., Any], *names: str) -> Rule:
    """An in-place operator that is neither a function nor a method of torch: the function with `inplace=True`."""
    return lambda graph, a: graph.call_function(function, tuple(a[name] for name in names), {"inplace": True})


def _elu_in_place(graph: fx.Graph, a: dict[str, Any]) -> Any:
    if a["scale"] == a["input_scale"] == 1:
        return graph.call_function(F.elu, (a["self"], a["alpha"]), {"inplace": True})
    return graph.call_function(torch._C._nn.elu_, (a["self"], a["alpha"], a["scale"], a["input_scale"]))


def _cast(graph: fx.Graph, a: dict[str, Any]) -> Any:
    kept = {key: a[key] for key in ("dtype", "device", "memory_format") if a.get(key) is not None}
    return graph.call_method("to", (a["self"],), {**kept, "copy": True})


def _addmm(graph: fx.Graph, a: dict[str, Any]) -> Any:
    weight = graph.call_method("t", (a["mat2"],))
    return graph.call_function(F.linear, (a["mat1"], weight, a["self"]))


def _einsum(graph: fx.Graph, a: dict[str, Any]) -> Any:
    return graph.call_function(torch.einsum, (a["equation"], *a["tensors"]))


def _subtract_from(graph: fx.Graph, a: dict[str, Any]) -> Any:
    return graph.call_function(torch.sub, (a["other"], a["self"]), {"alpha": a["alpha"]})


_RULES: Mapping[str, Rule] = {
    "_native_batch_norm_legit_no_training": _batch_norm_in_eval_mode,
    "_to_copy": _cast,
    "addmm": _addmm,
    "alias": _method("detach", "self"),
    "batch_norm": _batch_norm,
    "constant_pad_nd": _padding("constant"),
    "convolution": _convolution,
    "detach_": _method("detach", "self"),
    "einsum": _einsum,
    "elu_": _elu_in_place,
    "embedding": _reordered(F.embedding, "indices", "weight"),
    "group_norm": _reordered(F.group_norm, "input", "num_groups", weight="weight", bias="bias", eps="eps"),
    "hardsigmoid_": _in_place(F.hardsigmoid, "self"),
    "hardswish_": _in_place(F.hardswish, "self"),
    "hardtanh_": _in_place(F.hardtanh, "self", "min_val", "max_val"),
    "index": _index,
    "layer_norm": _reordered(F.layer_norm, "input", "normalized_shape", weight="weight", bias="bias", eps="eps"),
    "leaky_relu_": _in_place(F.leaky_relu, "self", "negative_slope"),
    "lift_fresh_copy": _method("clone", "self"),
    "max_pool1d": _pool(F.max_pool1d),
    "max_pool2d": _pool(F.max_pool2d),
    "max_pool2d_with_indices": _pool_with_indices(F.max_pool2d),
    "max_pool3d": _pool(F.max_pool3d),
    "max_pool3d_with_indices": _pool_with_indices(F.max_pool3d),
    "mish_": _in_place(F.mish, "self"),
    "pad": _reordered(F.pad, "self", "pad", mode="mode", value="value"),
    "reflection_pad1d": _padding("reflect"),
    "reflection_pad2d": _padding("reflect"),
    "reflection_pad3d": _padding("reflect"),
    "replication_pad1d": _padding("replicate"),
    "replication_pad2d": _padding("replicate"),
    "replication_pad3d": _padding("replicate"),
    "rrelu_": _in_place(F.rrelu, "self", "lower", "upper", "training"),
    "rsub": _subtract_from,
    "select": _select,
    "silu_": _in_place(F.silu, "self"),
    "slice": _slice,
    "split_with_sizes": _reordered(torch.split, "self", "split_sizes", dim="dim"),
    "sym_numel": _method("numel", "self"),
    "sym_size": _method("size", "self", "dim"),
    "upsample_bicubic2d": _interpolation("bicubic"),
    "upsample_bilinear2d": _interpolation("bilinear"),
    "upsample_linear1d": _interpolation("linear"),
    "upsample_nearest1d": _interpolation("nearest"),
    "upsample_nearest2d": _interpolation("nearest"),
    "upsample_nearest3d": _interpolation("nearest"),
    "upsample_trilinear3d": _interpolation("trilinear"),
}

_PROPERTIES = ("mT", "mH", "H", "T")

_SAME: Mapping[str, Callable[..., Any]] = {
    "adaptive_avg_pool1d": F.adaptive_avg_pool1d,
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "adaptive_avg_pool3d": F.adaptive_avg_pool3d,
    "alpha_dropout": F.alpha_dropout,
    "alpha_dropout_": torch.alpha_dropout_,
    "avg_pool1d": F.avg_pool1d,
    "celu_": torch.celu_,
    "dropout": F.dropout,
    "dropout_": torch.dropout_,
    "feature_dropout": F.dropout2d,
    "feature_alpha_dropout": F.feature_alpha_dropout,
    "feature_alpha_dropout_": torch.feature_alpha_dropout_,
    "feature_dropout_": torch.feature_dropout_,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "selu_": torch.selu_,
    "silu": F.silu,
    "split": torch.split,
    "threshold_": torch.threshold_,
}

_DROPPED = (
    "_assert_async",
    "_assert_scalar",
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)

__all__ = ["spell_out"]
