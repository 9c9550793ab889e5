"""What an operation reads, writes and returns, as its name and its arguments tell."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from reparam.capture.proxies import READS, UnfitError

_KINDS_OF_FACTS = {
    **dict.fromkeys(("dtype", "is_floating_point", "is_complex", "itemsize", "element_size"), "dtypes"),
    **dict.fromkeys(("device", "is_cuda", "is_cpu", "is_meta"), "devices"),
    **dict.fromkeys(("layout", "is_sparse", "is_quantized"), "layouts"),
    "requires_grad": "gradients",
    **dict.fromkeys(("shape", "size", "numel", "nelement"), "sizes"),
}
_SIZE_READS = ("size", "numel", "nelement", "dim", "ndimension", "is_floating_point", "is_complex")
# The same view as what they are given, whatever its size, strides or dtype.
SAME_VIEW = (
    "dropout",
    "alpha_dropout",
    "feature_dropout",
    "feature_alpha_dropout",
    "detach",
    "data",
    "requires_grad_",
)
SAME_VIEW_MODULES = (nn.Identity, nn.modules.dropout._DropoutNd)
# Functions that write statistics without counting it as a new version of the tensor.
WRITES_UNCOUNTED = ("batch_norm", "instance_norm", "native_batch_norm")
# Methods that change a list, dict or set.
_CHANGES = set("append extend insert remove pop clear sort reverse update setdefault popitem add discard".split())
# A view on some inputs and a copy on others.
PERHAPS_VIEW = ("reshape", "reshape_as", "flatten", "ravel", "contiguous")


def facts_asked_of(node: fx.Node) -> str:
    """Which facts of tensors a number is made of: "sizes", "dtypes", or both and more."""
    pending, seen, kinds = [node], set(), set()
    while pending:
        node = pending.pop()
        seen.add(node)
        read = node.args[1] if node.target is getattr else node.target
        name = read if isinstance(read, str) else getattr(read, "__name__", "")
        if node.op in ("call_function", "call_method") and name in _KINDS_OF_FACTS:
            kinds.add(_KINDS_OF_FACTS[name])
        elif "tensor" not in node.meta:
            pending += [other for other in node.all_input_nodes if other not in seen]
    return " and ".join(sorted(kinds, reverse=True)) or "sizes"


def squeezes(node: fx.Node) -> bool:
    """Whether the sizes of its input decide the rank of its output."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in ("squeeze", "squeeze_")


def names_a_write(target: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation writes to its first argument, or to `out`."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name in ("setitem", "__setitem__", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow")
        or kwargs.get("inplace") is True
        or kwargs.get("out") is not None
    )


def renormalises(target: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether it is the function of an embedding that scales the rows of its weight which are too long."""
    names = ("embedding", "embedding_bag")
    limit = kwargs.get("max_norm", args[3] if len(args) > 3 else None)
    return getattr(target, "__name__", "") in names and limit is not None


def check_containers(kind: str, target: Any, args: Any) -> None:
    """Stops the trace where the forward changes an argument that is a list, dict or set.

    Raises:
        TraceError: it does.
    """
    if not args or not isinstance(args[0], (list, dict, set)):
        return
    if (kind == "call_method" and target in _CHANGES) or target in (operator.setitem, operator.delitem):
        name = target if isinstance(target, str) else target.__name__
        raise fx.proxy.TraceError(f"the forward changes a {type(args[0]).__name__} that it was given ({name})")


def reads_sizes(kind: str, target: Any, args: tuple[Any, ...]) -> bool:
    """Whether a node reads what a tensor is, and nothing of its values."""
    if not args or not isinstance(args[0], torch.Tensor):
        return False
    if target is getattr:
        return args[1] in READS
    return (target if kind == "call_method" else getattr(target, "__name__", "")) in _SIZE_READS


def is_of_numbers(value: Any) -> bool:
    """Whether it is a plain value, or a list of such."""
    if isinstance(value, (tuple, list)):
        return all(map(is_of_numbers, value))
    return type(value) in (int, float, bool, str, torch.dtype, torch.device, torch.layout)


def require_not_drawn(proxy: Any) -> None:
    """Stops the trace where Python asks for the value of a random number.

    Raises:
        UnfitError: it does.
    """
    pending, seen = [proxy.node], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.meta.get("draws"):
            raise UnfitError("the forward decides by a random number")
        pending += node.all_input_nodes
