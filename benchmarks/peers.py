"""reparam beside other tools in one run: what each leaves of real models, and where each is wrong on trivial ones.

    python benchmarks/peers.py [--models repvgg_a0,...] [--size 64] [--skip-inductor]

First table: convolutions / BatchNorms that one forward pass executes (counted at the dispatcher by
`tools/layer_counts.py`, which shares nothing with reparam) as built and after each tool, and the relative float64 error
against the original. Second table: the largest absolute float64 error on models on which some tool is known to be
silently wrong (`tests/zoo/peers.py`). A tool that raises gets `-`; what it said is in the JSON. Only tools that are
installed are run. Written: `benchmarks/results/peers.json` and `.md`.

Exit status 1 if reparam raises or is wrong anywhere.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import fx, nn  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

from benchmarks.peers_table import ModelRow, TrapRow, markdown, verdict  # noqa: E402
from reparam.bench.machine import hardware_name  # noqa: E402
from tests.zoo.peers import PEERS  # noqa: E402
from tools import timm_zoo  # noqa: E402
from tools.layer_counts import count_layers, errors, output_of  # noqa: E402
from tools.record import first_line, write  # noqa: E402
from tools.torch_rewrites import optimization  # noqa: E402

MODELS = "repvgg_a0,mobileone_s0,mobileone_s1,resnet18,resnet50,efficientnet_b0"
SIZE = 64
Tool = Callable[[nn.Module, torch.Tensor], nn.Module]


def torch_fx(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Folds BatchNorm modules into the convolution or linear module before them."""
    folded: nn.Module = optimization().fuse(model)
    return folded


def fuse_fx(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The fusion of torch's graph-mode quantisation."""
    from torch.ao.quantization.quantize_fx import fuse_fx as fuse

    return fuse(model)


class Frozen(nn.Module):
    """A model compiled with freezing on and gradients off.

    Compilation happens in the first call for each shape, so both must be so in every call;
    `torch.compile(options={"freezing": True})` is not enough for constants to be folded.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        torch._dynamo.reset()
        self.compiled = torch.compile(model)

    def forward(self, *inputs: torch.Tensor) -> Any:
        from torch._inductor import config

        with config.patch(freezing=True), torch.no_grad():
            return self.compiled(*inputs)


def inductor(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The compiler with freezing, which folds constants into convolutions."""
    frozen = Frozen(model)
    frozen(x)  # compiles now, so that what it raises is known
    return frozen


def timm_own(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The conversions that timm's authors wrote for their own blocks."""
    converted: nn.Module = timm_zoo.import_timm().utils.reparameterize_model(model)
    return converted.eval()


def ours(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """reparam without verification: the engine alone."""
    from reparam import fuse

    return fuse(model, x, verify=False).module


ON_MODELS: dict[str, Tool] = {"torch.fx fuse": torch_fx, "timm reparameterize_model": timm_own, "reparam": ours}
ON_TRAPS: dict[str, Tool] = {
    "torch.fx fuse": torch_fx,
    "fuse_fx": fuse_fx,
    "Inductor freezing (float32)": inductor,
    "reparam": ours,
}
IN_FLOAT32 = {"Inductor freezing (float32)"}
"""With freezing, Inductor raises on float64 models whose convolutions it would pack for mkldnn."""


def on_model(name: str, size: int) -> ModelRow:
    """One row of the first table."""
    model = timm_zoo.create(name).double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = output_of(model, x)
    left, wrong, raised = {"as built": count_layers(model, x).to_dict()}, {}, {}
    for tool, convert in ON_MODELS.items():
        try:
            converted = convert(copy.deepcopy(model), x)
            left[tool] = count_layers(converted, x).to_dict()
            wrong[tool] = errors(expected, output_of(converted, x))[1]
        except Exception as error:
            left.pop(tool, None)
            raised[tool] = first_line(error)
    return ModelRow(name, left, wrong, raised)


def remove_dropout(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """torch.fx's removal of dropout."""
    removed: nn.Module = optimization().remove_dropout(model)
    return removed


def dropouts(module: nn.Module) -> int:
    """Dropouts that `module` calls, by the names of its modules and, in a graph, of the functions called."""
    layers = sum("dropout" in type(part).__name__.lower() for part in module.modules())
    if not isinstance(module, fx.GraphModule):
        return layers
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    return layers + sum("dropout" in getattr(node.target, "__name__", "") for node in calls)


def dropouts_left() -> dict[str, int]:
    """Dropouts in the traced graph of the model with all kinds of them: as built, and after what removes them."""
    trap = next(trap for trap in PEERS if trap.name == "all_dropouts")
    model, x = trap.make(), trap.example()
    tools: dict[str, Tool] = {"as built": lambda m, x: fx.symbolic_trace(m), "remove_dropout": remove_dropout}
    left = {}
    for tool, convert in {**tools, "reparam": ours}.items():
        converted = convert(copy.deepcopy(model), x)
        assert isinstance(converted, fx.GraphModule)
        # Only what is called counts: a traced module may still hold layers that its graph no longer uses.
        converted.delete_all_unused_submodules()
        left[tool] = dropouts(converted)
    return left


def on_trap(trap: Any, tools: dict[str, Tool]) -> TrapRow:
    """One row of the second table: the error on the example and on another batch size."""
    wrong, raised = {}, {}
    for tool, convert in tools.items():
        dtype = torch.float32 if tool in IN_FLOAT32 else torch.float64
        model, x, more = trap.make().to(dtype), trap.example().to(dtype), trap.example(batch=5).to(dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other tools' deprecations
                converted = convert(copy.deepcopy(model), x)
                pairs = [(output_of(model, inputs), output_of(converted, inputs)) for inputs in (x, more)]
            wrong[tool] = max(errors(expected, got)[0] for expected, got in pairs)
        except Exception as error:
            raised[tool] = first_line(error)
    model, x = trap.make(), trap.example()
    expected = output_of(model, x)
    largest = errors(expected, tree_map(torch.zeros_like, expected))[0]
    return TrapRow(trap.name, largest, wrong, raised)


def command(args: argparse.Namespace) -> str:
    """The command line that measures the same."""
    parts = ["python benchmarks/peers.py"]
    parts += [f"--models {args.models}"] if args.models != MODELS else []
    parts += [f"--size {args.size}"] if args.size != SIZE else []
    parts += ["--skip-inductor"] if args.skip_inductor else []
    return " ".join(parts)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS, help="timm models, with commas; empty for none")
    parser.add_argument("--size", type=int, default=SIZE, help="height and width of the images")
    parser.add_argument("--skip-inductor", action="store_true", help="leave out what needs a C++ compiler and a minute")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def main() -> int:
    args = parse()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    models = []
    for name in [name for name in args.models.split(",") if name]:
        models.append(on_model(name, args.size))
        print(models[-1].line(), flush=True)
    tools = {name: tool for name, tool in ON_TRAPS.items() if not (args.skip_inductor and tool is inductor)}
    traps = []
    for trap in PEERS:
        traps.append(on_trap(trap, tools))
        print(traps[-1].line(), flush=True)
    facts = {
        "command": command(args),
        "hardware": hardware_name(torch.device("cpu")),
        "torch": torch.__version__,
        "timm": timm_zoo.import_timm().__version__,
        "size": args.size,
        "dropouts": dropouts_left(),
    }
    rows = {"models": [row.to_dict() for row in models], "traps": [row.to_dict() for row in traps]}
    write(args.out / "peers.json", json.dumps({**facts, **rows}, indent=1) + "\n")
    write(args.out / "peers.md", markdown(models, traps, facts))
    problems = verdict(models, traps)
    print(*(f"FAIL: {problem}" for problem in problems), sep="\n", end="\n" if problems else "")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
