"""`--arch timm:NAME` and `torchvision:NAME`: built without a download, and failures as sentences."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from reparam.capture.arch import build_arch
from reparam.capture.load import default_input_size, load
from reparam.errors import InputError
from tools.timm_zoo import import_timm, import_torchvision, randomise_batch_norms


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_weights_of_a_library_model(tmp_path: Path, library: str) -> None:
    import_timm() if library == "timm" else import_torchvision()
    name = "test_byobnet" if library == "timm" else "squeezenet1_1"
    model = randomise_batch_norms(build_arch(f"{library}:{name}", {"num_classes": 7})).eval()
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "w.pt")
    loaded = load(tmp_path / "w.pt", f"{library}:{name}", arch_args={"num_classes": 7})
    x = torch.randn(default_input_size(loaded) or ())
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))
    with pytest.raises(InputError, match=r"is \[7, .* in the file and \[1000, .* in the model; .*--arch-args"):
        load(tmp_path / "w.pt", f"{library}:{name}")


def test_a_whole_timm_model_loads_with_the_classes_that_the_message_names(tmp_path: Path) -> None:
    import_timm()
    model = build_arch("timm:test_byobnet").eval()
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"classes .*timm\.models\.byobnet\.ByobNet.*--allow-class 'timm\.\*'"):
        load(tmp_path / "model.pt")
    from reparam.capture.allowed import torch_layers
    from reparam.capture.formats import Format
    from reparam.capture.pickles import globals_in

    names = [name for name in globals_in(tmp_path / "model.pt", Format.TORCH_ZIP) if name not in torch_layers()]
    loaded = load(tmp_path / "model.pt", allow_classes=names)
    assert default_input_size(loaded) == (1, 3, 160, 160)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("timm:test_byobnett", "timm has no model called test_byobnett; did you mean test_byobnet"),
        ("torchvision:zzzzzz", "torchvision has no model called zzzzzz; check the name"),
    ],
)
def test_unknown_names(arch: str, message: str) -> None:
    import_timm()
    with pytest.raises(InputError, match=message):
        build_arch(arch)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=f"needs the package {library}, which is not installed"):
        build_arch(f"{library}:anything")


def test_a_library_that_fails_to_import_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise RuntimeError('operator ops::nms does not exist')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        InputError, match=r"importing timm failed with RuntimeError \(operator ops::nms does not exist\)"
    ):
        build_arch("timm:anything")


@pytest.mark.slow
def test_libraries_are_imported_whose_compiled_operators_do_not_load() -> None:
    """In a process that has imported neither, as the command does it."""
    program = (
        "from reparam.capture.arch import build_arch\n"
        "print(*(type(build_arch(name)).__name__ for name in ('timm:test_byobnet', 'torchvision:squeezenet1_1')))\n"
        "import torch; assert torch.library.register_fake.__module__ == 'torch.library'\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["ByobNet", "SqueezeNet"]), done.stderr[-2000:]


def test_a_callable_or_a_model_will_do() -> None:
    model = nn.Linear(2, 2)
    assert build_arch(model) is model
    assert isinstance(build_arch(nn.Linear, {"in_features": 2, "out_features": 3}), nn.Linear)
