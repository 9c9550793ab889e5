"""Random models as Python source: drawn statement by statement, each one run when it is drawn."""

from __future__ import annotations

import linecache
import warnings
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.fuzz.layout_ops import LAYOUT_OPS
from tests.fuzz.ops import OPS, Op, Scope, Statement
from tests.zoo.case import randomise

VOCABULARY: list[tuple[int, Op]] = [*OPS, *LAYOUT_OPS]
SHAPES = ((2, 4, 7, 8), (2, 6, 9, 7), (2, 4, 11), (2, 6, 9), (2, 3, 5, 4, 6), (3, 6), (2, 5, 6))
LARGEST = 1e4
MOST_VALUES = 30_000

HEADER = """import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
"""
FOOTER = """

torch.manual_seed({seed})
net = Net()
for module in net.modules():  # default statistics hide errors
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        nn.init.normal_(module.running_mean, 0, 0.5)
        nn.init.uniform_(module.running_var, 0.3, 2.0)
        if module.affine:
            nn.init.normal_(module.weight, 0.3)
            nn.init.normal_(module.bias, 0, 0.5)
net = net.double().eval()
with torch.no_grad():
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.is_floating_point():
            tensor.div_(1.1)  # numbers that float32 cannot hold
x = torch.randn({shape}, dtype=torch.float64)
"""
CHECK = """
import copy

import reparam

module = reparam.fuse(net, x, verify=False).module
with torch.no_grad():
    expected, actual = copy.deepcopy(net)(x.clone()), module(x.clone())
for a, b in zip(expected, actual, strict=True):
    print(tuple(a.shape), tuple(b.shape), (a - b).abs().max().item())
"""


@dataclass(frozen=True)
class Program:
    """A model as source text.

    Attributes:
        seed: of its weights.
        shape: of its input `x`, batch first.
        layers: source line that sets an attribute of `self`, by name, in order.
        statements: of `forward`, in order.
        outputs: names returned, as a tuple.
        magnitude: the largest value met while it was drawn; rounding errors are judged against it.
    """

    seed: int
    shape: tuple[int, ...]
    layers: dict[str, str] = field(hash=False)
    statements: tuple[Statement, ...]
    outputs: tuple[str, ...]
    magnitude: float = 1.0

    def source(self) -> str:
        """The model, its weights `net` and an input `x`, as code that runs on its own."""
        used = {layer for statement in self.statements for layer in statement.layers}
        lines = [HEADER]
        lines += [f"        {line}\n" for name, line in self.layers.items() if name in used]
        lines += ["\n    def forward(self, x):\n"]
        lines += [f"        {statement.source()}\n" for statement in self.statements]
        lines += [f"        return ({''.join(f'{name}, ' for name in self.outputs)})\n"]
        return "".join(lines) + FOOTER.format(seed=self.seed, shape=self.shape)

    def reproduction(self) -> str:
        """The source and a check of `reparam.fuse` on it; pasted into a file, it prints the differences."""
        return self.source() + CHECK

    def build(self) -> tuple[nn.Module, torch.Tensor]:
        """(model, input); the global random state is left as it was."""
        source = self.source()
        file = f"<fuzz {self.seed}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        scope: dict[str, Any] = {"__name__": "fuzz"}
        with torch.random.fork_rng(devices=[]):
            exec(compile(source, file, "exec"), scope)
        return scope["net"], scope["x"]


class _Holder(nn.Module):
    """Stands for `self` while statements are drawn."""


def draw(seed: int, length: int = 12) -> Program:
    """A random program of about `length` statements; the same for the same seed."""
    rng = Random(seed)
    shape = rng.choice(SHAPES)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        holder = _Holder().double().eval()
        values = {"x": torch.randn(shape, dtype=torch.float64)}
        layers: dict[str, str] = {}
        statements: list[Statement] = []
        length = rng.randint(3, length)
        for _ in range(20 * length):
            if len(statements) == length:
                break
            scope = Scope(rng, values, layers)
            op = rng.choices([op for _, op in VOCABULARY], [weight for weight, _ in VOCABULARY])[0]
            statement = op(scope)
            if statement is not None and "{t}" not in statement.template:
                _try(statement, scope, holder, statements)
            elif statement is not None:
                _try(replace(statement, target=f"v{len(statements)}"), scope, holder, statements)
        outputs = _outputs(rng, values, statements)
        largest = max(float(tensor.abs().max()) for tensor in values.values())
    return Program(seed, shape, layers, tuple(statements), outputs, max(1.0, largest))


def _try(statement: Statement, scope: Scope, holder: nn.Module, statements: list[Statement]) -> None:
    """Runs `statement`; keeps it with its new layers if it is legal and the numbers stay in range."""
    before = {name: tensor.clone() for name, tensor in scope.values.items()}
    space: dict[str, Any] = {**scope.values, "self": holder, "torch": torch, "nn": nn, "F": F}
    made = {name: line for name, line in scope.made.items() if name in statement.layers}
    try:
        for line in made.values():
            exec(line, space)
        randomise(holder).double().eval()
        exec(statement.source(), space)
    except (RuntimeError, ValueError, IndexError, TypeError):
        kept = False
    else:
        kept = all(_in_range(space[name]) for name in (*scope.values, statement.target) if name)
    if not kept:
        for name, tensor in before.items():
            scope.values[name].copy_(tensor)
        return
    scope.layers.update(made)
    statements.append(statement)
    if statement.target:
        scope.values[statement.target] = space[statement.target]


def _in_range(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and 0 < value.numel() < MOST_VALUES
        and value.is_floating_point()
        and bool(torch.isfinite(value).all())
        and float(value.abs().max()) < LARGEST
    )


def _outputs(rng: Random, values: dict[str, torch.Tensor], statements: list[Statement]) -> tuple[str, ...]:
    """What nobody reads, at most three of them, and sometimes a tensor from within."""
    read = {name for statement in statements for name in statement.reads if statement.target}
    names = list(values)
    leaves = [name for name in names if name not in read][-3:] or names[-1:]
    if rng.random() < 0.3:
        leaves.append(rng.choice(names))
    return tuple(dict.fromkeys(leaves))
