"""`reparam.load`: what it takes, what it refuses, and in which words."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reparam.capture.arch import parse_arch_args
from reparam.capture.load import default_input_size, load
from reparam.errors import InputError

NETS = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.bn = nn.BatchNorm2d(channels)
        self.act = torch.nn.functional.relu
    def forward(self, x):
        return self.act(self.bn(self.conv(x)))
def build(channels=4):
    return Net(channels)
def broken():
    raise ValueError("no such thing")
def number():
    return 3
class Config:
    def __init__(self):
        self.rate = 0.1
"""


def plain(channels: int = 4) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Sequential(nn.GELU(), nn.Dropout(0.3))
    )
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module `user_nets` in the current folder, as a user would have it."""
    (tmp_path / "user_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("user_nets", None)
    with monkeypatch.context() as path:
        path.syspath_prepend(str(tmp_path))
        import user_nets  # type: ignore[import-not-found]
    yield user_nets
    sys.modules.pop("user_nets", None)


def same(left: nn.Module, right: nn.Module) -> bool:
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        return torch.equal(left.eval()(x), right.eval()(x))


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "no_ending"])
def test_a_module_of_torchs_own_layers_needs_no_option(tmp_path: Path, name: str) -> None:
    model = plain().train()
    torch.save(model, tmp_path / name)
    loaded = load(tmp_path / name)
    assert not loaded.training
    assert not any(module.training for module in loaded.modules())
    assert same(model, loaded)


def test_wrappers_of_torch_are_taken_off(tmp_path: Path) -> None:
    model = plain()
    torch.save(nn.DataParallel(model), tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    assert type(loaded) is nn.Sequential
    assert same(model, loaded)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


CHECKPOINTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str | None]] = {
    "plain": (lambda s: s, None),
    "ordered": (OrderedDict, None),
    "state_dict": (lambda s: {"state_dict": s, "epoch": 3, "name": "x"}, None),
    "model": (lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []}}, None),
    "parallel": (lambda s: {f"module.{k}": v for k, v in s.items()}, None),
    "compiled": (lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}, None),
    "both wrappers": (lambda s: {"state_dict": {f"module.model.{k}": v for k, v in s.items()}}, None),
    "averaged": (lambda s: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in s.items()}}, None),
    "other weights beside": (lambda s: {"model": s, "loss": {"centers": torch.ones(3)}}, None),
    "ema by key": (lambda s: {"model": {k: torch.zeros_like(v) for k, v in s.items()}, "ema": s}, "ema"),
    "nested key": (lambda s: {"a.b": {"c": s}, "d": s}, "a.b.c"),
    "no counters": (lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, None),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints(tmp_path: Path, name: str, legacy: bool) -> None:
    wrap, key = CHECKPOINTS[name]
    model = plain()
    torch.save(wrap(state(model)), tmp_path / "weights.pt", _use_new_zipfile_serialization=not legacy)
    assert same(model, load(tmp_path / "weights.pt", plain, key=key))


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = plain()
    save_file(state(model), tmp_path / "model.pt")  # the name says nothing
    assert same(model, load(tmp_path / "model.pt", plain))


def test_arch_from_the_current_folder(tmp_path: Path, nets: Any) -> None:
    model = nets.build(6)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    sys.modules.pop("user_nets")
    assert same(model, load(tmp_path / "weights.pt", "user_nets:build", arch_args={"channels": 6}))


def test_a_users_class_loads_by_name_by_package_by_object_and_by_trust(tmp_path: Path, nets: Any) -> None:
    model = nets.build()
    torch.save(model, tmp_path / "model.pt")
    for allowed in ("user_nets.Net", "user_nets.*", nets.Net):
        assert same(model, load(tmp_path / "model.pt", allow_classes=[allowed]))
    assert same(model, load(tmp_path / "model.pt", allow_pickle=True))


def test_a_class_that_moved_is_found(tmp_path: Path, nets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nets.Net, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Net", nets.Net, raising=False)
    model = nets.build()
    torch.save(model, tmp_path / "model.pt")
    with pytest.warns(UserWarning, match="source code"):
        torch.save(model, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--allow-class __main__\.Net=SCRIPT\.Net"):
        load(tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"--allow-class __main__\.Net=SCRIPT\.Net"):
        load(tmp_path / "model.pt", allow_pickle=True)
    assert same(model, load(tmp_path / "model.pt", allow_classes=["__main__.Net=user_nets.Net"]))
    assert same(model, load(tmp_path / "legacy.pt", allow_classes=["__main__.Net=user_nets.Net"], allow_pickle=True))


def test_legacy_whole_models_need_trust(tmp_path: Path) -> None:
    model = plain()
    torch.save(model, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"before torch 1\.6.*--allow-pickle"):
        load(tmp_path / "model.pt")
    assert same(model, load(tmp_path / "model.pt", allow_pickle=True))


def write(name: str, content: bytes | str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder / name

    return make


def saved(content: Any, cut: float = 1.0, **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "file.pt"
        torch.save(content() if callable(content) and not isinstance(content, nn.Module) else content, path, **options)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * cut)])
        return path

    return make


def safetensors(cut: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        from safetensors.torch import save_file

        save_file({"a": torch.ones(300)}, folder / "w.safetensors")
        data = (folder / "w.safetensors").read_bytes()
        (folder / "w.safetensors").write_bytes(data[:cut])
        return folder / "w.safetensors"

    return make


def poisoned(name: str, value: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        model = plain()
        model.state_dict()[name].view(-1)[1] = value
        return saved(model)(folder)

    return make


def onnx_file(folder: Path) -> Path:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph), str(folder / "model.bin"))
    return folder / "model.bin"


def renamed() -> dict[str, torch.Tensor]:
    values = state(plain())
    values["extra.weight"] = torch.ones(1)
    del values["0.weight"]
    return values


BAD: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "missing": (lambda folder: folder / "none.pt", {}, "does not exist"),
    "folder": (lambda folder: folder, {}, "is a folder"),
    "empty": (write("e.pt", ""), {}, "is empty"),
    "text": (write("t.pt", "hello, this is\nno model"), {}, "is a text file"),
    "binary": (write("b.pt", bytes(range(128, 256)) * 3), {}, "no known model format"),
    "page": (write("p.pt", "<!doctype html><html>"), {}, "failed download"),
    "lfs": (write("l.pt", "version https://git-lfs.github.com/spec/v1\noid"), {}, "git lfs pull"),
    "pickle": (write("k.pt", b"\x80\x04\x95\x05."), {}, "plain pickle"),
    "truncated": (saved(plain, 0.6), {}, "truncated"),
    "truncated legacy": (saved(lambda: state(plain()), 0.6, _use_new_zipfile_serialization=False), {}, "damaged"),
    "truncated safetensors": (safetensors(200), {}, "truncated safetensors file"),
    "cut header": (safetensors(30), {}, "header is cut"),
    "no arch": (saved(lambda: state(plain())), {}, r"holds weights only \(7 tensors\).*--arch"),
    "tensor": (saved(torch.ones(2, 3)), {}, r"a tensor of shape \[2, 3\]"),
    "list": (saved([1, 2]), {}, "holds a list"),
    "no weights": (saved({"epoch": 3}), {"arch": plain}, "without weights"),
    "keys": (saved(renamed), {"arch": plain}, r"1 missing \(0\.weight\) and 1 unexpected \(extra\.weight\)"),
    "shapes": (
        saved(lambda: state(plain(5))),
        {"arch": plain},
        r"6 weights .* have another shape .*0\.weight is \[5, 3, 3, 3\] in the file and \[4, 3, 3, 3\] in the model",
    ),
    "several": (
        saved(lambda: {"model": state(plain()), "ema": state(plain())}),
        {"arch": plain},
        "2 sets of weights that fit; choose one with --key: model, ema",
    ),
    "wrong key": (saved(lambda: {"model": state(plain())}), {"key": "ema"}, "nothing under --key ema; it holds model"),
    "nan": (poisoned("0.weight", float("nan")), {}, r"weight 0\.weight holds NaN \(1 element\)"),
    "inf": (poisoned("1.running_var", float("inf")), {}, r"1\.running_var holds infinity"),
    "onnx": (onnx_file, {}, "ONNX file.*needs the PyTorch model"),
    "protocol": (saved(plain, pickle_protocol=4), {}, "pickle_protocol above 2"),
    "no colon": (saved(lambda: state(plain())), {"arch": "resnet18"}, "no known form"),
    "no module": (saved(lambda: state(plain())), {"arch": "nowhere_nets:build"}, "no module named nowhere_nets"),
    "no builder": (saved(lambda: state(plain())), {"arch": "user_nets:none"}, "has no none"),
    "broken builder": (saved(lambda: state(plain())), {"arch": "user_nets:broken"}, "ValueError: no such thing"),
    "builder args": (
        saved(lambda: state(plain())),
        {"arch": "user_nets:build", "arch_args": {"x": 1}},
        r"with \(x=1\)",
    ),
    "no model built": (saved(lambda: state(plain())), {"arch": "user_nets:number"}, "returned a int"),
    "bad allow": (saved(plain), {"allow_classes": ["Net"]}, "no full name"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(tmp_path: Path, nets: Any, name: str) -> None:
    make, options, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        load(make(tmp_path), **options)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_the_message_lists_every_class_the_file_asks_for(tmp_path: Path, nets: Any) -> None:
    model = nets.build()
    model.config = nets.Config()
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(InputError) as caught:
        load(tmp_path / "model.pt")
    assert "2 classes user_nets.Config, user_nets.Net" in str(caught.value)
    assert "--allow-class user_nets.Config --allow-class user_nets.Net" in str(caught.value)
    assert "--allow-pickle" in str(caught.value)
    # what the message says is enough, and a package's wildcard allows its modules only
    loaded = load(tmp_path / "model.pt", allow_classes=["user_nets.Config", "user_nets.Net"])
    assert same(model, loaded)
    assert loaded.config.rate == 0.1
    with pytest.raises(InputError, match=r"the class user_nets\.Config"):
        load(tmp_path / "model.pt", allow_classes=["user_nets.*"])


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (nn.Sequential(nn.ReLU(), nn.Conv2d(5, 4, 3)), (1, 5, 224, 224)),
        (nn.Sequential(nn.Linear(7, 2), nn.Conv2d(5, 4, 3)), (1, 7)),
        (nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 2)), None),
        (nn.ReLU(), None),
    ],
)
def test_default_input_size(model: nn.Module, size: tuple[int, ...] | None) -> None:
    assert default_input_size(model) == size
    model.default_cfg = {"input_size": (3, 160, 160)}  # type: ignore[assignment]
    assert default_input_size(model) == (1, 3, 160, 160)


def test_arch_args() -> None:
    items = ("num_classes=10", "act=relu", "sizes=(1, 2)", "flag=True", "empty=")
    assert parse_arch_args(items) == {"num_classes": 10, "act": "relu", "sizes": (1, 2), "flag": True, "empty": ""}
    with pytest.raises(InputError, match="key=value"):
        parse_arch_args(("ten",))
