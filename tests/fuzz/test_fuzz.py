"""Random models, and proof that the fuzzer would have seen an error."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.fuzz import program as program_module
from tests.fuzz.program import draw
from tests.support import executed_counts, sampled
from tools import fuzz_graphs
from tools.fuzz_graphs import campaign, check, engine, minimise
from tools.torch_rewrites import optimization


@pytest.mark.parametrize(("count", "seed"), sampled([(50, 0), (200, 50)], 2))
def test_random_models_are_exact(count: int, seed: int) -> None:
    outcomes, failing = campaign(count, seed=seed)
    shown = [minimise(program) for program in failing]
    assert not failing, "\n".join(f"{check(program)}\n{program.reproduction()}" for program in shown)
    assert outcomes["exact"] >= 0.9 * count, outcomes


@pytest.mark.slow
def test_random_models_are_exact_at_fixed_sizes() -> None:
    outcomes, failing = campaign(40, seed=5_000_000, fuse=fuzz_graphs.engine_at_fixed_sizes)
    shown = [minimise(program, fuzz_graphs.engine_at_fixed_sizes) for program in failing]
    assert not failing, "\n".join(program.reproduction() for program in shown)
    assert outcomes["exact"] >= 36, outcomes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dropout2d")
def test_the_models_are_worth_fusing() -> None:
    """The fuzzer says little if its models hold nothing to fold: layers go in many of them, and some stay."""
    before, after, changed = Counter[str](), Counter[str](), 0
    for seed in range(60):
        model, x = draw(seed).build()
        original, fused = executed_counts(model, x), executed_counts(engine(model, x), x)
        before, after, changed = before + original, after + fused, changed + (original != fused)
    assert changed > 20
    assert min(before[kind] for kind in ("conv", "bn", "linear", "add", "mul")) > 20
    assert after["conv"] < before["conv"]
    assert 0 < after["bn"] < before["bn"]


IDIOMS = (
    "torch.cat",
    ".chunk(",
    ".split(",
    "[:, :",
    "channel_shuffle",
    "index_select",
    ".flip(1)",
    "unflatten(1",
    ".permute(",
    ".transpose(1, 2)",
    ".flatten(1)",
    ".mean((2, 3))",
    "adaptive_avg_pool2d",
    "max_pool",
    "nn.Linear",
    "nn.BatchNorm1d",
    "nn.Conv3d",
    "nn.ConvTranspose2d",
)


def test_the_models_mix_every_idiom() -> None:
    programs = [draw(seed) for seed in range(200)]
    for idiom in IDIOMS:
        assert sum(idiom in program.source() for program in programs) >= 4, idiom
    assert sum(len(program.outputs) > 1 for program in programs) > 100
    assert sum(len(program.statements) for program in programs) > 1200


def test_most_drawn_statements_are_legal(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, kept = 0, 0
    keep = program_module._try

    def counted(*args: Any) -> None:
        nonlocal tried
        tried += 1
        keep(*args)

    monkeypatch.setattr(program_module, "_try", counted)
    for seed in range(60):
        kept += len(draw(seed).statements)
    assert kept > 0.9 * tried


def test_models_are_reproducible() -> None:
    for seed in range(20):
        assert draw(seed) == draw(seed)
        (first, x), (second, y) = draw(seed).build(), draw(seed).build()
        assert torch.equal(x, y)
        with torch.no_grad():
            for a, b in zip(first(x.clone()), second(y.clone()), strict=True):
                assert torch.equal(a, b)


def perturbed(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Rounds one weight to float32."""
    module = engine(model, x)
    with torch.no_grad():
        for parameter in list(module.parameters())[:1]:
            parameter.copy_(parameter.float())
    return module


def forgetful(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Loses a bias."""
    module = engine(model, x)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
                break
    return module


def without_norms(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Replaces every BatchNorm module by an identity."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(model, name, nn.Identity())
    return model


def batch_of_the_example(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Right on the example's batch size only."""

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.batch = model, x.shape[0]

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(y[: self.batch] for y in self.inner(x))

    return Repeated()


def raising(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Fails with an exception that is no refusal."""
    raise AttributeError("no such thing")


@pytest.mark.parametrize("fuse", sampled([without_norms, perturbed, forgetful, batch_of_the_example, raising], 3))
def test_a_sabotaged_fuse_is_caught(fuse: fuzz_graphs.Fuse) -> None:
    outcomes, failing = campaign(40, 0, fuse, stop_after=40)
    assert len(failing) >= 4, outcomes
    small = min((minimise(program, fuse) for program in failing[:3]), key=lambda program: len(program.statements))
    assert check(small, fuse).failed
    assert not check(small).failed
    assert len(small.statements) <= 2


@pytest.mark.slow
def test_a_published_fold_that_is_silently_wrong_is_caught() -> None:
    """torch's own fold of Conv and BatchNorm is wrong on shared convolutions; the fuzzer finds that by itself."""

    def peer(model: nn.Module, x: torch.Tensor) -> nn.Module:
        folded: nn.Module = optimization().fuse(model)
        return folded

    outcomes, failing = campaign(150, 0, peer, stop_after=50)
    assert outcomes["wrong"] > 0
    wrong = next(program for program in failing if check(program, peer).kind == "wrong")
    small = minimise(wrong, peer)
    assert check(small, peer).kind == "wrong"
    assert len(small.statements) <= 4, small.source()


@pytest.mark.slow
def test_the_reproduction_runs_on_its_own_and_shows_the_error(tmp_path: Path) -> None:
    program = next(program for program in map(draw, range(20)) if len(program.statements) > 3)
    file = tmp_path / "reproduction.py"
    file.write_text(program.reproduction())
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, file], capture_output=True, text=True, cwd=root, env={"PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(program.outputs)
    assert all(float(line.rsplit(" ", 1)[1]) < 1e-9 for line in lines)


def test_the_command_tells_success_from_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz_graphs.py", "--count", "5", "--seed", "3"])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert fuzz_graphs.main() == 0
    assert "5 models from seed 3" in capsys.readouterr().out
    monkeypatch.setattr(fuzz_graphs.reparam, "fuse", lambda model, x, verify: moved(model))
    assert fuzz_graphs.main() == 1
    assert "class Net(nn.Module)" in capsys.readouterr().out


class Result:
    """What `fuse` returns, with a module that adds to every output."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def moved(model: nn.Module) -> Result:
    """Moves every output by a thousandth."""

    class Moved(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(y + 1e-3 for y in model(x))

    return Result(Moved())
