"""Where weights and inputs are: on one device, with values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import reparam
from reparam.capture.trace import capture
from reparam.errors import InputError


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)).eval()


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model, x = small(), torch.randn(1, 3, 8, 8)
    with pytest.raises(
        InputError, match=r"^0\.weight is on the meta device and has no values; load the weights first$"
    ):
        reparam.fuse(model, x, verify=False)


def test_weights_on_several_devices_are_refused() -> None:
    model = small()
    with FakeTensorMode():
        model[1].running_var = torch.ones(4, device="cuda:1")
    with pytest.raises(InputError, match=r"several devices \(0\.weight on cpu and 1\.running_var on cuda:1\)"):
        reparam.fuse(model, torch.randn(1, 3, 8, 8))


def test_an_input_on_another_device_is_refused() -> None:
    with pytest.raises(InputError, match=r"the model is on cpu .* and an example input on meta"):
        reparam.fuse(small(), torch.randn(1, 3, 8, 8, device="meta"))


def test_sparse_tensors_are_refused() -> None:
    model = small()
    with pytest.raises(InputError, match=r"^an example input is a sparse_coo tensor; make it a dense one"):
        reparam.fuse(model, torch.randn(1, 3, 8, 8).to_sparse(), verify=False)
    model.register_buffer("links", torch.eye(3).to_sparse())
    with pytest.raises(InputError, match=r"^links is a sparse_coo tensor; make it a dense one, with \.to_dense\(\)$"):
        reparam.fuse(model, torch.randn(1, 3, 8, 8), verify=False)


def test_no_module_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module, got int"):
        reparam.fuse(3, torch.randn(1))  # type: ignore[arg-type]


def test_graphs_are_captured_on_the_meta_device_with_aliases() -> None:
    """A graph needs no values; that a view shares its storage is seen there too."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            first = y[:, :2]
            first.mul_(2)
            return torch.nn.functional.batch_norm(y, torch.zeros(4, device=y.device), torch.ones(4, device=y.device))

    with torch.device("meta"):
        graph = capture(Views().eval(), torch.randn(1, 3, 8, 8)).graph
    on_cpu = capture(Views().eval(), torch.randn(1, 3, 8, 8)).graph
    assert [node.name for node in graph.nodes] == [node.name for node in on_cpu.nodes]
    written = [[other.name for other in node.meta.get("writes", ())] for node in graph.nodes]
    assert written == [[other.name for other in node.meta.get("writes", ())] for node in on_cpu.nodes]
    assert any(written)
    aliases = [[other.name for other in node.meta.get("aliases", ())] for node in graph.nodes]
    assert aliases == [[other.name for other in node.meta.get("aliases", ())] for node in on_cpu.nodes]
    assert any(aliases)
