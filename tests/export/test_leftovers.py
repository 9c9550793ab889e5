"""Each kind of leftover is found, and those that must stay say why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx import ModelProto, TensorProto
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array
from torch import nn

from reparam.export import export_onnx
from reparam.export.leftovers import KINDS, counted, leftovers

torch.set_num_threads(1)


def model(*nodes: object, outputs: tuple[str, ...] = ("y",), sizes: tuple[object, ...] = ("n", 3)) -> ModelProto:
    """A graph with the input `x` and the constants `c` and `d`."""
    weights = [from_array(torch.ones(3).numpy(), name) for name in ("c", "d", "bn.weight", "bn.bias")]
    values = [make_tensor_value_info(name, TensorProto.FLOAT, list(sizes)) for name in outputs]
    given = [make_tensor_value_info("x", TensorProto.FLOAT, list(sizes))]
    return make_model(make_graph(list(nodes), "g", given, values, weights), opset_imports=[make_opsetid("", 20)])


N = make_node
CASES = [
    ("nothing", [N("Relu", ["x"], ["y"])], ("y",), {}, ""),
    ("a norm", [N("BatchNormalization", ["x", "bn.weight", "bn.bias", "c", "d"], ["y"])], ("y",),
     {"BatchNormalization": 1}, ""),
    ("a dropout", [N("Dropout", ["x"], ["y"])], ("y",), {"Dropout": 1}, ""),
    ("a copy", [N("Identity", ["x"], ["a"]), N("Relu", ["a"], ["y"])], ("y",), {"Identity": 1}, ""),
    ("an input returned", [N("Identity", ["x"], ["y"])], ("y",), {"Identity": 1}, "the model returns an input"),
    ("a result twice", [N("Relu", ["x"], ["y"]), N("Identity", ["y"], ["z"])], ("y", "z"), {"Identity": 1},
     "the model returns the same tensor twice"),
    ("a constant returned", [N("Identity", ["c"], ["y"])], ("y",), {"Identity": 1}, "the model returns a constant"),
    ("chance", [N("RandomNormalLike", ["x"], ["r"]), N("Add", ["x", "r"], ["y"])], ("y",), {"random": 1}, ""),
    ("a constant chain", [N("Add", ["c", "d"], ["a"]), N("Neg", ["a"], ["b"]), N("Mul", ["x", "b"], ["y"])], ("y",),
     {"constant": 2}, ""),
    ("a Constant node", [N("Constant", [], ["a"], value_float=2.0), N("Mul", ["x", "a"], ["y"])], ("y",), {}, ""),
    ("a chain from a Constant node", [N("Constant", [], ["a"], value_float=2.0), N("Sqrt", ["a"], ["b"]),
     N("Mul", ["x", "b"], ["y"])], ("y",), {"constant": 1}, ""),
    ("an open shape", [N("Shape", ["x"], ["y"])], ("y",), {}, ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "outputs", "kinds", "needed"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_counts(nodes: list[object], outputs: tuple[str, ...], kinds: dict[str, int], needed: str) -> None:
    found = leftovers(model(*nodes, outputs=outputs))
    assert counted(found) == {**dict.fromkeys(KINDS, 0), **kinds}
    assert [one.needed for one in found] == [needed] * len(found)


def test_the_shape_of_a_fixed_tensor_is_a_constant() -> None:
    found = leftovers(model(N("Shape", ["x"], ["y"]), sizes=(2, 3)))
    assert [(one.kind, one.operator) for one in found] == [("constant", "Shape")]


def test_inner_graphs_are_looked_into() -> None:
    inner = make_graph(
        [N("Add", ["c", "d"], ["t"])], "inner", [], [make_tensor_value_info("t", TensorProto.FLOAT, None)]
    )
    other = make_graph([N("Relu", ["x"], ["t"])], "other", [], [make_tensor_value_info("t", TensorProto.FLOAT, None)])
    found = leftovers(model(N("If", ["x"], ["y"], then_branch=inner, else_branch=other)))
    assert [one.operator for one in found] == ["Add"]


def test_a_norm_names_its_module() -> None:
    found = leftovers(model(N("BatchNormalization", ["x", "bn.weight", "bn.bias", "c", "d"], ["y"])))
    assert found[0].module == "bn"


class Copies(nn.Module):
    """The exporter writes copies for these: scattered slices, one of them returned; an input; a result twice."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.slice_scatter(x * 2, x[:, :1] + 1, 1, 0, 1)
        return torch.slice_scatter(y.relu(), x[:, :1], 1, 2, 3), y, x, y


def test_only_copies_that_outputs_need_are_left(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    file = export_onnx(Copies().eval(), x, tmp_path / "n.onnx", simplify=False)
    assert file.checked
    assert sorted(one.needed for one in file.leftovers) == [
        "the model returns an input", "the model returns the same tensor twice",
    ]  # fmt: skip
