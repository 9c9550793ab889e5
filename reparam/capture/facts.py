"""What a forward asks of what its tensors are (dtype, device, layout), where the graph cannot tell.

torch.export writes down the way that the example's dtypes take, and its guards are about sizes alone. So the model is
watched while it runs: where its own code asks, the captured graph checks the arguments for that.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from reparam.capture.arguments import is_given, name_of
from reparam.checks import require_fact
from reparam.copying import parameters_kept, twin_of
from reparam.inputs import Inputs

_TORCH = os.path.dirname(torch.__file__) + os.sep
_T = torch.Tensor


def _read(attribute: str) -> Any:
    return getattr(_T, attribute).__get__


_ASKS: dict[Any, str] = {
    **dict.fromkeys((_read("dtype"), _T.is_floating_point, torch.is_floating_point, _T.is_complex), "dtype"),
    **dict.fromkeys((torch.is_complex, _T.element_size, _read("itemsize"), _T.type), "dtype"),
    **dict.fromkeys((_read("device"), _read("is_cuda"), _read("is_meta"), _T.get_device, _read("is_cpu")), "device"),
    **dict.fromkeys((_read("layout"), _read("is_sparse")), "layout"),
}


class _Asked(TorchFunctionMode):
    """Which facts the user's code asks for, each with the line of the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fact = _ASKS.get(func)
        caller = sys._getframe(1)
        if fact is not None and not caller.f_code.co_filename.startswith(_TORCH):
            file = os.path.basename(caller.f_code.co_filename)
            self.lines.setdefault(fact, f"{file}:{caller.f_lineno}")
        return func(*args, **(kwargs or {}))


def facts_asked(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """`dtype`, `device` and `layout`, as far as the forward asks for them, and the line where it does.

    Raises:
        UnfitModelError: the forward writes to parameters.
        Exception: whatever it raises on these inputs.
    """
    twin = twin_of(model)
    fresh = inputs.clone()
    asked = _Asked()
    with torch.random.fork_rng(devices=[]), torch.no_grad(), parameters_kept(twin), asked:
        twin(*fresh.args, **fresh.kwargs)
    return asked.lines


def check_facts(graph: fx.Graph, asked: dict[str, str]) -> None:
    """Adds a check of every argument for what the forward asks for."""
    for node in list(graph.nodes):
        tensor = node.meta.get("tensor")
        if tensor is None or not is_given(node):
            continue
        # What an argument that no layer reads is, is asked for just as well.
        facts = {"dtype": tensor.dtype, "device": tensor.device.type, "layout": torch.strided}
        with graph.inserting_after(_last_placeholder(graph) if node.op == "placeholder" else node):
            for fact, line in asked.items():
                check = graph.call_function(require_fact, (node, fact, facts[fact], name_of(node), line))
                check.meta.update({"module_path": "", "source": line})


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    placeholders: list[fx.Node] = graph.find_nodes(op="placeholder")
    return placeholders[-1]
