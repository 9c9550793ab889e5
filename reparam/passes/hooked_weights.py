"""Weights that a hook of torch's own computes in every call are computed once.

`torch.nn.utils.weight_norm` and `spectral_norm`, the older forms of the parametrisations of those names, put

    W = g * v / |v|   and   W = V / (u^T V w)

on the layer before each call. In eval mode both depend on parameters and buffers only. Evaluated in float64, rounded
once. Preconditions: the layer has no other hook, and is torch's own; recurrent layers keep their hooks, as they keep
copies of their weights; so does a layer whose own `g`, `v` or `V` the forward reads besides. A layer that is called
twice is refused by the capture, as its weight is written in between.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from reparam.graph.emit import Layer
from reparam.graph.nodes import described, kind, module_of, place, set_module
from reparam.passes.base import Refusal, Rewrite
from reparam.passes.ledger import allowed


@dataclass(frozen=True)
class HookedWeights:
    """The pass."""

    name = "hooked weights"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        rewrites: list[Rewrite] = []
        written: dict[int, Layer] = {}
        read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        for node, module in [(node, module_of(node, root)) for node in graph.find_nodes(op="call_module")]:
            if module is None or not module._forward_pre_hooks or not _is_alone(module):
                continue
            if any(f"{node.target}.{name}" in read for name in _own(module)):
                continue
            norms = " and ".join(dict.fromkeys(type(hook).__name__ for hook in module._forward_pre_hooks.values()))
            what, made = f"{described(node, root)} under {norms}", f"{kind(node, root)} with its weight"
            rewrite = Rewrite(self.name, place(node), (what,), made, "f(W) = C for every input")
            if not allowed(rewrite, node):
                continue
            rewrites.append(rewrite)
            if id(module) not in written:
                exact = _without_hooks(module)
                set_module(root, str(node.target), _like(exact, module))
                written[id(module)] = Layer(exact)
            node.meta["float64"] = partial(written.__getitem__, id(module))
        return rewrites, []


def _is_alone(module: nn.Module) -> bool:
    """Whether the module has hooks that compute its weights, and nothing else that would be lost."""
    norms = all(isinstance(hook, (WeightNorm, SpectralNorm)) for hook in module._forward_pre_hooks.values())
    others = module._forward_hooks or "forward" in module.__dict__ or module._modules or module.training
    own = type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, nn.RNNBase)
    return norms and own and not others


def _own(module: nn.Module) -> list[str]:
    """The parameters and buffers that go with the hooks."""
    return [name for hook in module._forward_pre_hooks.values() for name in _read_by(hook)]


def _read_by(hook: Any) -> list[str]:
    """What a hook computes a weight from."""
    return [f"{hook.name}{end}" for end in (("_orig", "_u", "_v") if isinstance(hook, SpectralNorm) else ("_g", "_v"))]


def _without_hooks(module: nn.Module) -> nn.Module:
    """The module with its weights as they are in eval mode, in float64."""
    held: dict[str, Any] = {**module._parameters, **module._buffers}
    wide = {name: _wide(value) for name, value in held.items()}
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    for hook in hooks:
        given: Any = SimpleNamespace(**wide)
        spectral = isinstance(hook, SpectralNorm)
        with torch.no_grad():
            weight = hook.compute_weight(given, *((False,) if spectral else ()))
        gone = _read_by(hook)
        wide = {**{name: value for name, value in wide.items() if name not in gone}, hook.name: weight}
    return _with(module, wide)


def _like(exact: nn.Module, module: nn.Module) -> nn.Module:
    """The same rounded to the dtype that the module's weights have."""
    dtypes = {name: value.dtype for name, value in module._parameters.items() if value is not None}
    dtype = next(iter(dtypes.values()))
    return _with(exact, {n: None if p is None else p.to(dtypes.get(n, dtype)) for n, p in exact._parameters.items()})


def _wide(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.detach().to(torch.float64)


def _with(module: nn.Module, weights: dict[str, Any]) -> nn.Module:
    """A copy of a module with these parameters, no buffers and no hooks."""
    twin = copy.copy(module)
    state = twin.__dict__
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_buffers"):
        state[name] = type(state[name])()
    state["_parameters"] = {
        name: None if value is None else nn.Parameter(value.clone(), requires_grad=False)
        for name, value in weights.items()
    }
    for name in weights:
        state.pop(name, None)
    return twin


__all__ = ["HookedWeights"]
