"""ONNX sessions: called like the module, with one sentence where that is not possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from reparam.errors import ExportError
from reparam.export import OnnxSession, export_onnx
from tests.export import nets

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def keyword_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nets.Keywords]:
    module = nets.Keywords().eval()
    example = {"scale": torch.rand(1), "double": True, "x": torch.randn(1, 3, 8, 8)}
    return export_onnx(module, example, tmp_path_factory.mktemp("k") / "k.onnx").path, module


def test_arguments_by_position_and_by_name(keyword_file: tuple[Path, nets.Keywords]) -> None:
    path, module = keyword_file
    session = OnnxSession(path, threads=1)
    x, scale = torch.randn(2, 3, 8, 8), torch.tensor([3.0])
    expected = module(x, True, scale=scale)
    for got in (session(x, True, scale=scale), session(scale=scale, double=True, x=x), session(x, scale=scale)):
        torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1][1], x)
        assert got[1][2] is None


def test_calls_that_cannot_be_answered(keyword_file: tuple[Path, nets.Keywords]) -> None:
    session = OnnxSession(keyword_file[0], threads=1)
    x, scale = torch.randn(1, 3, 8, 8), torch.ones(1)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ((x, False), {"scale": scale}, "'double' is fixed"),
        ((x,), {"scale": scale, "shift": scale}, "no input for 'shift'"),
        ((x,), {}, r"takes 2 tensor\(s\)"),
        ((x.double(),), {"scale": scale}, "onnxruntime cannot run k.onnx"),
        ((x[:, :2],), {"scale": scale}, "onnxruntime cannot run k.onnx"),
    ]
    for args, kwargs, message in cases:
        with pytest.raises(ExportError, match=message):
            session(*args, **kwargs)


def test_results_with_numbers_come_as_a_list(tmp_path: Path) -> None:
    module = nets.Counted().eval()
    session = OnnxSession(export_onnx(module, torch.randn(2, 4), tmp_path / "c.onnx").path)
    got = session(torch.ones(5, 4))
    assert isinstance(got, list)
    assert len(got) == 1
    torch.testing.assert_close(got[0], module(torch.ones(5, 4))[0])


def test_files_from_elsewhere_give_lists(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    graph = helper.make_graph(
        [helper.make_node("Sub", ["a", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "ab"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(tmp_path / "e.onnx"))
    session = OnnxSession(tmp_path / "e.onnx")
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1.0])
    for got in (session(a, b), session(b=b, a=a), session(a, b=b)):
        assert len(got) == 1
        assert torch.equal(got[0], a - b)


def test_bad_files_and_providers(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist"):
        OnnxSession(tmp_path / "no.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ExportError, match=r"onnxruntime cannot open text.onnx"):
        OnnxSession(tmp_path / "text.onnx")
    with pytest.raises(ExportError, match=r"onnxruntime has no NowhereExecutionProvider here; available: .*CPU"):
        OnnxSession(tmp_path / "text.onnx", providers=["NowhereExecutionProvider"])
