"""Tensors that a forward makes of literals, as they were before they were rounded.

`x * torch.tensor(0.1)` multiplies by 0.1 rounded to the default dtype; so do `arange(8) / 7` and tables of sines. A
graph holds their values. Weights are merged in float64, and compared with a model that runs in float64, so what counts
there are the values in float64: those of a second trace, in which everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from reparam.copying import copied
from reparam.inputs import Inputs
from reparam.widen import all_in

# Rounded numbers differ by less; others are not the same numbers.
_SAME = 1e-2

Trace = Callable[[nn.Module, Inputs], "tuple[nn.Module, fx.Graph]"]


def note_exact(
    model: nn.Module, inputs: Inputs, root: nn.Module, graph: fx.Graph, names: Iterable[str], trace: Trace
) -> None:
    """Gives the nodes that read literal tensors of floating-point numbers these in float64, as `meta["exact"]`.

    Args:
        model: what was traced; not changed.
        inputs: the example inputs.
        root, graph: what tracing gave.
        names: the attributes of `root` that hold literal tensors, or may.
        trace: traces another model in the same way.
    """
    rounded = _floating(root, names)
    tensors = [*model.parameters(), *inputs.tensors()]
    if not rounded or any(tensor.dtype == torch.float64 for tensor in tensors):
        return
    try:
        with all_in(torch.float64), torch.no_grad():
            wide_root, _ = trace(_wide(model), inputs.to(torch.float64))
    except Exception:
        return  # verification then says what rounding did
    exact = _floating(wide_root, rounded)
    for node in graph.find_nodes(op="get_attr"):
        ours, theirs = rounded.get(str(node.target)), exact.get(str(node.target))
        if ours is not None and theirs is not None and _is_rounded(ours, theirs):
            node.meta["exact"] = theirs.detach().clone()


def _floating(root: nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    held = {name: getattr(root, name, None) for name in names}
    return {
        name: value for name, value in held.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def _is_rounded(tensor: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether a tensor is the exact one, rounded."""
    if tensor.shape != exact.shape or exact.dtype != torch.float64:
        return False
    finite = torch.isfinite(exact)
    scale = float(exact[finite].abs().max()) if bool(finite.any()) else 0.0
    return torch.allclose(tensor.to(torch.float64), exact, rtol=0.0, atol=_SAME * scale, equal_nan=True)


def _wide(model: nn.Module) -> nn.Module:
    """A copy in float64, plain tensors among its attributes included."""
    twin = copied(model).eval()
    made: dict[int, Any] = {}

    def wide(value: torch.Tensor) -> torch.Tensor:
        if id(value) not in made:
            exact = value.detach().to(torch.float64)
            made[id(value)] = nn.Parameter(exact, False) if isinstance(value, nn.Parameter) else exact
        return made[id(value)]  # type: ignore[no-any-return]

    for part in twin.modules():
        places: tuple[dict[str, Any], ...] = (part._parameters, part._buffers, vars(part))
        for held in places:
            for name, value in list(held.items()):
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    held[name] = wide(value)
    return twin
