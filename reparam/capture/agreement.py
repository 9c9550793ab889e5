"""Whether two runs of the same operations answer alike: a model called again, or a model and the graph of it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from reparam.copying import copied, parameters_kept, twin_of
from reparam.errors import UnfitModelError
from reparam.inputs import Inputs, not_dense

CALLS = 3
# In units of the machine precision of the output: a repeated run is nearly always exactly equal.
_ALLOWED = 1024.0
_PLAIN = (bool, int, float, str, bytes)


def answers_alike(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a copy of `model`, called again on the same input, returns what it returned before."""
    twin = twin_of(model)
    first = _answer(twin, inputs)
    return all(_alike(first, _answer(twin, inputs)) for _ in range(CALLS - 1))


def same_answers(a: nn.Module, b: nn.Module, inputs: Inputs) -> bool:
    """Whether two models answer the example alike; neither is written to."""
    return _alike(_answer(copied(a), inputs), _answer(copied(b), inputs))


class Answers:
    """What a copy of `model` answers to the example, and whether it does so again; each call is made once.

    Attributes:
        name: the model's class.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._model, self._inputs = model, inputs
        self._called: nn.Module | None = None
        self._otherwise: dict[int, bool] = {}
        self.name = type(model).__name__

    @cached_property
    def first(self) -> Any:
        """The answer of a call that starts from seed 0."""
        twin = twin_of(self._model)
        answer = _answer(twin, self._inputs)
        self._called = twin
        return answer

    def differ_again(self, seed: int) -> bool:
        """Whether a second call, which starts from `seed`, is answered otherwise."""
        if seed not in self._otherwise:
            self._otherwise[seed] = self._differs(seed)
        return self._otherwise[seed]

    def _differs(self, seed: int) -> bool:
        try:
            first, twin = self.first, self._called
            self._called = None  # its buffers need not stay
            if twin is None:
                twin = twin_of(self._model)
                _answer(twin, self._inputs)
            return not _alike(first, _answer(twin, self._inputs, seed))
        except UnfitModelError:
            raise
        except Exception:
            return False  # it cannot run at all, which is for others to say


def graph_answers_as(own: Answers, inputs: Inputs, root: nn.Module, graph: fx.Graph) -> bool:
    """Whether a graph answers the example as its model does: what Python asked of a tensor may have escaped.

    The buffers of `root` are left as they were.
    """
    try:
        expected = own.first
    except UnfitModelError:
        raise
    except Exception:
        return True  # it cannot run at all, which is for others to say
    twin = fx.Graph()  # a copy, as a graph belongs to the first module that is made of it
    twin.output(twin.graph_copy(graph, {}))
    before = {name: buffer.clone() for name, buffer in root.named_buffers()}
    try:
        return _alike(expected, _answer(fx.GraphModule(root, twin), inputs))
    except Exception:
        return False
    finally:
        _put_back(root, before)


@torch.no_grad()
def _put_back(root: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, buffer in root.named_buffers():
        if buffer._version or not _alike_leaf(buffer, before[name]):
            buffer.copy_(before[name])


def _answer(module: nn.Module, inputs: Inputs, seed: int = 0) -> Any:
    """What the module returns, copied; the random state is the same each time and left as it was."""
    with torch.random.fork_rng(devices=[]), parameters_kept(module):
        torch.manual_seed(seed)
        answer = inputs.call(module)
    for leaf in pytree.tree_leaves(answer):
        kind = not_dense(leaf) if isinstance(leaf, torch.Tensor) else None
        if kind is not None:
            raise UnfitModelError(
                f"{type(module).__name__} returns a {kind} tensor, which cannot be compared; return a dense one"
            )
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), answer)


def _alike(a: Any, b: Any) -> bool:
    (a_leaves, a_spec), (b_leaves, b_spec) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return bool(a_spec == b_spec) and all(map(_alike_leaf, a_leaves, b_leaves))


def _alike_leaf(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and (not isinstance(a, _PLAIN) or a == b or a != a)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta:
        return True  # shapes are all that can be compared there
    if not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    scale = float(a.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return torch.allclose(a, b, rtol=0.0, atol=_ALLOWED * torch.finfo(a.dtype).eps * scale, equal_nan=True)
