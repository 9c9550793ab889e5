"""`inference_form`: what modules are at inference, said for one call, on the command line, or for a family."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reparam
from reparam import InputError, fuse, register_inference_form, unregister_inference_form
from reparam.capture.inference import parse_inference_forms
from reparam.cli import main
from reparam.export import export_onnx
from tests.idle import RANDOM_IN_ONNX, Beside, assert_nothing_idle
from tests.support import assert_unchanged, executed_counts, relative_error, run, snapshot, static_counts
from tests.zoo import dropouts
from tests.zoo.case import conv_bn, randomise
from tests.zoo.trap import Lambda
from tools import timm_zoo

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


class Noise(nn.Module):
    """Noise whose author forgot to ask whether it trains."""

    def __init__(self, sigma: float = 0.1) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: torch.Tensor, *, loud: bool = False) -> torch.Tensor:
        return x * (1 + self.sigma * torch.randn_like(x) * (2 if loud else 1))


class LoudNoise(Noise):
    """A subclass."""


class Block(nn.Module):
    """A layer, noise, a norm; asks the noise for an attribute, and passes it an option."""

    def __init__(self, noise: nn.Module) -> None:
        super().__init__()
        self.body, self.noise, self.norm = nn.Conv2d(4, 4, 3), noise, nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        y = self.noise(y, loud=True) if self.noise.sigma > 0 else y
        return F.relu(self.norm(y))


def network(noise: type[Noise] = Noise) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomise(nn.Sequential(Block(noise(0.1)), Block(noise(0.5)))).double().eval()


def image() -> torch.Tensor:
    return torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def expected(first: float = 1.0, second: float = 1.0) -> torch.Tensor:
    """What the network gives where its noises are these factors."""
    model, x = network(), image()
    for block, factor in zip(model, (first, second), strict=True):
        x = F.relu(block.norm(factor * block.body(x)))
    return x.detach()


FORMS: dict[str, tuple[Any, tuple[float, float]]] = {
    "class_name": ({"Noise": "identity"}, (1, 1)),
    "dotted_class_name": ({f"{__name__}.Noise": "identity"}, (1, 1)),
    "class": ({Noise: 0.5}, (0.5, 0.5)),
    "zero": ({Noise: 0}, (0, 0)),
    "names": ({"0.noise": "identity", "1.noise": -2.0}, (1, -2)),
    "a_name_goes_before_its_class": ({"Noise": 3.0, "1.noise": "identity"}, (3, 1)),
    "function_to_a_number": ({Noise: lambda module: 1 - module.sigma}, (0.9, 0.5)),
    "function_to_identity": ({Noise: lambda module: "identity"}, (1, 1)),
    "whole_block": ({"1": lambda block: nn.Sequential(block.body, block.norm, nn.ReLU()), "0.noise": 1}, (1, 1)),
}


@pytest.mark.parametrize(
    ("name", "way"), [*((name, "auto") for name in FORMS), ("names", "export"), ("names", "modules")]
)
def test_forms(name: str, way: str) -> None:
    form, factors = FORMS[name]
    model = network()
    before = snapshot(model)
    result = fuse(model, image(), inference_form=form, capture=way, verify="quick")
    assert_unchanged(before, model)
    assert result.report.comparison.passed
    assert relative_error(expected(*factors), run(result.module, image())) < 1e-12
    assert relative_error(expected(*factors), run(result.reference, image())) < 1e-12
    counts = executed_counts(result.module, image())
    assert (counts["bn"], counts["mul"], static_counts(result.module)["identity"]) == (0, 0, 0)
    (note,) = (note for note in result.report.notes if "inference_form" in note)
    assert note.endswith("is compared with the original in that form")
    said = [rewrite for rewrite in result.report.rewrites if "inference_form" in rewrite.identity]
    assert [rewrite.place.module for rewrite in said] == (
        ["0.noise", "1"] if name == "whole_block" else ["0.noise", "1.noise"]
    )


class WithSigma(nn.Module):
    """What a user may put in place."""

    sigma = 1.0

    def forward(self, x: torch.Tensor, loud: bool) -> torch.Tensor:
        return 4 * x


def test_a_module_and_a_function_as_forms() -> None:
    for form in (WithSigma(), lambda module: WithSigma(), WithSigma):
        if form is WithSigma:
            form = lambda module: WithSigma()  # noqa: E731
        module = fuse(network(), image(), inference_form={Noise: form}, verify="quick").module
        assert relative_error(expected(4, 4), run(module, image())) < 1e-12
    model = Lambda(lambda m, x: F.relu(m.n(m.noise(m.a(x)))), a=nn.Conv2d(4, 4, 3), noise=Noise(), n=nn.BatchNorm2d(4))
    model = model.double().eval()
    result = fuse(model, image(), inference_form={Noise: lambda module: lambda x: x * module.sigma}, verify="quick")
    wanted = F.relu(model.n(0.1 * model.a(image())))
    assert relative_error(wanted.detach(), run(result.module, image())) < 1e-12
    assert "scale" not in result.report.notes[0]


WRONG: dict[str, tuple[Any, str]] = {
    "misspelt_class": ({"Noize": "identity"}, "has no module and no class of that name; near it are Noise"),
    "misspelt_name": ({"0.nois": "identity"}, "near it are 0.noise"),
    "nothing_near": ({"zzz": "identity"}, "its own classes are Block, Noise"),
    "subclass_only": ({LoudNoise: "identity"}, "near it are Noise"),
    "true": ({"Noise": True}, "Noise cannot be True at inference; say 'identity', a finite number"),
    "word": ({"Noise": "off"}, "Noise cannot be 'off'"),
    "not_finite": ({"Noise": float("nan")}, "Noise cannot be nan"),
    "function_fails": ({"Noise": lambda module: 1 / 0}, "the inference form of 0.noise fails: ZeroDivisionError"),
    "function_of_nothing": ({"Noise": lambda module: None}, "must be a module, a function, a number or 'identity'"),
    "no_name": ({3: "identity"}, "takes names and classes of modules, not 3"),
    "no_dict": ("Noise", "must be a dict"),
    "the_model_itself": ({"Sequential": "identity"}, "is the model itself"),
    "one_inside_another": ({"Block": "identity", "Noise": "identity"}, "lies inside of another that it names"),
    "does_not_run": ({"Noise": nn.Identity()}, "does not run on the example inputs: AttributeError"),
    "other_shape": ({"0": lambda block: nn.Conv2d(4, 7, 3).double()}, "does not run on the example inputs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_one_sentence(name: str) -> None:
    form, words = WRONG[name]
    with pytest.raises(InputError) as caught:
        fuse(network(), image(), inference_form=form)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hooks_are_not_lost_silently() -> None:
    model = network()
    model[0].noise.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(InputError, match=r"0\.noise has forward hooks"):
        fuse(model, image(), inference_form={"Noise": "identity"})


def test_a_shared_module_is_replaced_everywhere() -> None:
    model = network()
    model[1].noise = model[0].noise
    result = fuse(model, image(), inference_form={"Noise": 0.5})
    assert relative_error(expected(0.5, 0.5), run(result.module, image())) < 1e-12


def test_a_form_is_believed_also_where_nothing_is_random() -> None:
    """It is the user's word; what it was compared with is in the report, and the original stays what it was."""
    model = nn.Sequential(conv_bn(2, 4, 4, 3), nn.Tanh(), conv_bn(2, 4, 4, 3)).double().eval()
    result = fuse(model, image(), inference_form={"Tanh": "identity"})
    assert static_counts(result.module)["conv"] <= 2
    assert result.report.notes[0].startswith("inference_form was believed (Tanh as identity)")
    assert not reparam.verify(model, result.module, image()).passed
    assert reparam.verify(result.reference, result.module, image()).passed


# --- families ---


@pytest.fixture(autouse=True)
def nothing_is_registered_afterwards() -> Iterator[None]:
    yield
    unregister_inference_form(Noise, LoudNoise, f"{__name__}.Noise")


def test_a_family_is_registered_with_one_decorator() -> None:
    @register_inference_form(Noise, LoudNoise)
    def form(module: Noise) -> float:
        return 1 - module.sigma

    for noise in (Noise, LoudNoise):
        result = fuse(network(noise), image())
        assert relative_error(expected(0.9, 0.5), run(result.module, image())) < 1e-12
    assert (
        relative_error(expected(), run(fuse(network(), image(), inference_form={Noise: 1.0}).module, image())) < 1e-12
    )
    unregister_inference_form(Noise)
    fuse(network(LoudNoise), image(), verify=False)
    with pytest.raises(reparam.CaptureError, match="draws random numbers"):
        fuse(network(), image())


def test_subclasses_and_names_of_classes_that_are_not_imported() -> None:
    with register_inference_form(f"{__name__}.Noise", "some.other.DropBlock2d", form="identity"):
        fuse(network(), image(), verify=False)
        with pytest.raises(reparam.CaptureError, match="LoudNoise"):
            fuse(network(LoudNoise), image())
    with register_inference_form(Noise, form="identity", subclasses=True):
        fuse(network(LoudNoise), image(), verify=False)
    with pytest.raises(reparam.CaptureError, match="draws random numbers"):
        fuse(network(), image())


def test_what_cannot_be_registered() -> None:
    for targets, form, words in (
        ((), "identity", "at least one class"),
        (("Noise",), "identity", "no dotted class name"),
        ((3,), "identity", "names and classes of modules"),
        ((Noise,), "off", "cannot be 'off'"),
    ):
        with pytest.raises(InputError, match=words):
            register_inference_form(*targets, form=form)


# --- the command ---


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("noise") / "net.pt"
    torch.save(network().float(), path)
    return path


def invoke(file: Path, *arguments: str) -> click.testing.Result:
    fixed = ["fuse", str(file), "--input", "1x4x9x9", "--no-bench", "--no-archive", "--allow-class", f"{__name__}.*"]
    return click.testing.CliRunner(env={"COLUMNS": "300"}).invoke(main, [*fixed, *arguments])


def test_command_refuses_and_says_the_option(file: Path) -> None:
    result = invoke(file)
    assert result.exit_code == 2
    assert "reparam: error: Sequential draws random numbers in eval mode" in result.stderr
    assert "--inference-form Noise=identity" in result.stderr
    assert not list(file.parent.glob("*.onnx"))


def test_command_with_the_option(file: Path) -> None:
    result = invoke(file, "--inference-form", "Noise=identity", "--inference-form", "1.noise=0.5", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["notes"][0].startswith("inference_form was believed (Noise as identity, Noise as scale by 0.5)")
    assert report["comparison"]["passed"]
    assert report["onnx_comparison"]["passed"]


def test_command_says_what_is_near(file: Path) -> None:
    result = invoke(file, "--inference-form", "Noize=identity")
    assert result.exit_code == 2
    assert "near it are Noise" in result.stderr


def test_option_is_read() -> None:
    assert parse_inference_forms(("a.b=identity", "C=0.5", "d=e=1")) == {"a.b": "identity", "C": 0.5, "d=e": 1.0}
    for item in ("Noise", "=identity", "Noise=off", "Noise="):
        with pytest.raises(InputError, match="--inference-form"):
            parse_inference_forms((item,))


# --- the page ---


@pytest.mark.slow
def test_the_page_runs_as_printed() -> None:
    page = (ROOT / "docs" / "inference.md").read_text()
    program = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refused, believed = done.stdout.splitlines()
    printed = " ".join(re.findall(r"(?m)^    (Sequential draws .*\n(?:    .*\n)*)", page)[0].split())
    assert re.sub(r" \(net.py:\d+\)", "", printed) == refused
    assert believed.startswith("inference_form was believed (Noise as identity)")


# --- what the files hold ---


@pytest.mark.slow
def test_no_operator_of_the_files_is_random_or_idle(tmp_path: Path) -> None:
    """Of the dropout family; `tests/test_notes.py` has the modules of the notes."""
    blocks = dropouts.CASES[::4]  # fused, most of the family are the same
    inputs = tuple({case.input_shape: case.inputs(torch.float32) for case in blocks}.values())
    fused = fuse(Beside(blocks).eval(), inputs, verify=False).module
    assert_nothing_idle(fused)
    nodes = export_onnx(fused, inputs, tmp_path / "net.onnx").nodes
    assert nodes["Conv"] >= len(blocks) // 2
    assert not RANDOM_IN_ONNX & set(nodes), nodes


FAMILIES = {
    "resnet10t": {"drop_path_rate": 0.2, "drop_block_rate": 0.1, "drop_rate": 0.2},
    "convnext_atto": {"drop_path_rate": 0.2, "drop_rate": 0.1},
    "mobilevit_xxs": {"drop_path_rate": 0.2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_drop_paths_of_real_families(name: str) -> None:
    model = timm_zoo.create(name, **FAMILIES[name])
    dropping = {type(module).__name__ for module in model.modules() if "Drop" in type(module).__name__}
    assert dropping
    result = fuse(model, torch.randn(1, 3, 64, 64), verify="quick")
    assert_nothing_idle(result.module)


def test_drop_paths_of_torchvision() -> None:
    """They are functions that tracing does not look into by itself."""
    torchvision = timm_zoo.import_torchvision()
    with torch.random.fork_rng(devices=[]):
        model = torchvision.models.convnext_tiny(weights=None, stochastic_depth_prob=0.3).eval()
    result = fuse(model, torch.randn(1, 3, 32, 32), verify="off")
    assert_nothing_idle(result.module)


def test_a_wrong_name_in_a_model_of_torch_s_own_layers_ends_in_what_to_do() -> None:
    with pytest.raises(InputError, match=r"no class of that name; name one of its named_modules\(\)$"):
        fuse(nn.Sequential(nn.Conv2d(4, 4, 1)).double(), image(), inference_form={"Xyzzy": "identity"})
