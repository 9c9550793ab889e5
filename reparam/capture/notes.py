"""What the user should know of a model that was captured, in a sentence each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.nn.modules.batchnorm import _BatchNorm

_MOST = 4
_BATCH_NORMS = (
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_batch_norm_with_update",
)


def mode_notes(model: nn.Module) -> tuple[str, ...]:
    """Of modes, and of normalisations that have no eval mode."""
    notes: tuple[str, ...] = ()
    training = [name for name, module in model.named_modules() if module.training]
    if model.training:
        notes = ("the model was in train mode; its inference form was taken (eval mode)",)
    elif training:
        where = listed(training)
        notes = (f"{where} in the model stood in train mode; the inference form was taken there, too (eval mode)",)
    lonely = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (module.running_mean is None or module.running_var is None)
    ]
    if lonely:
        notes += (
            f"without running statistics, {listed(lonely)} {'normalises' if len(lonely) == 1 else 'normalise'} by the "
            "batch at inference, too: what an input gives depends on the others in its batch",
        )
    return notes


def batch_notes(graph: fx.Graph) -> tuple[str, ...]:
    """Of calls that normalise by the batch though they are given running statistics, as exports in train mode do."""
    found = (node.meta for node in graph.nodes if _ignores_statistics(node))
    places = [*dict.fromkeys(meta["module_path"] or meta["source"] or "the forward" for meta in found)]
    if not places:
        return ()
    return (
        f"with training=True, {listed(places)} {'normalises' if len(places) == 1 else 'normalise'} by the batch at "
        "inference, too, and not by the running statistics; a program that was exported in train mode does so: export "
        "it after eval()",
    )


def _ignores_statistics(node: fx.Node) -> bool:
    """Whether this is a batch normalisation with `training=True` that is given running statistics.

    All spellings of it have `training` in the same position; torch's function has the statistics first.
    """
    name = getattr(node.target, "__name__", "").partition(".")[0]
    if node.op != "call_function" or name not in _BATCH_NORMS:
        return False
    mean = node.kwargs.get("running_mean", (*node.args, *[None] * 4)[1 if node.target is F.batch_norm else 3])
    training = node.kwargs.get("training", node.args[5] if len(node.args) > 5 else False)
    return mean is not None and training is True


def compiled_notes(root: nn.Module, graph: fx.Graph) -> tuple[str, ...]:
    """Of modules and functions that nobody looked into."""
    called = dict.fromkeys(str(node.target) for node in graph.find_nodes(op="call_module"))
    compiled = [name for name in called if isinstance(root.get_submodule(name), torch.jit.ScriptModule)]
    notes = []
    if compiled:
        where = listed(compiled)
        notes.append(f"{where}: compiled (TorchScript) and left as it is; what it was compiled from would be fused")
    operators = (node.target for node in graph.nodes if node.op == "call_function")
    names = dict.fromkeys(str(one.name()) for one in operators if isinstance(one, HigherOrderOperator))
    if names:
        notes.append(f"the functions that {listed([*names])} calls are left as they are")
    return tuple(notes)


def size_notes(lines: Sequence[str], what: str) -> tuple[str, ...]:
    """Of the lines at which what the example's tensors are (`what`: sizes, dtypes and devices) decided the graph."""
    if not lines:
        return ()
    return (
        f"{what} of the example decided what was captured ({listed(lines)}); where others decide otherwise, it stops",
    )


def listed(names: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(names[:_MOST]) + (", ..." if len(names) > _MOST else "")
