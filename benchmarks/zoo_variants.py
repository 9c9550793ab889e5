"""What `benchmarks/zoo_compare.py` measures side by side: a timm model as built, and after each way to convert it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import reparam
from reparam.export import OnnxSession, export_onnx
from reparam.quiet import quiet
from tools import timm_zoo
from tools.compare_authors import CONVERSIONS
from tools.layer_counts import errors, output_of
from tools.record import first_line
from tools.torch_rewrites import optimization

ORIGINAL, AUTHORS, FX, ONNXSIM, OURS = "original", "author's", "torch.fx fuse", "onnxsim", "reparam"
VARIANTS = (ORIGINAL, AUTHORS, FX, ONNXSIM, OURS)
COUNTS = ("convolutions", "batch_norms", "linears", "nodes", "macs")


@dataclass
class Converted:
    """The variants of one model.

    Attributes:
        variants: name -> module or callable; the original first.
        missing: name -> why there is none.
        errors: name -> largest error beside the original's output, relative to its largest value, in float32.
        before, after: counts of operations that ours reports, see `COUNTS`.
    """

    variants: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)


def has_conversion(model: nn.Module) -> bool:
    """Whether some part of the model brings a conversion that its authors wrote."""
    parts = [part for path, part in model.named_modules() if path]
    return any(hasattr(part, method) for part in parts for method in CONVERSIONS)


def authors(model: nn.Module) -> nn.Module:
    """The conversion that timm ships for the model's own blocks.

    Raises:
        ValueError: there is none.
    """
    if not has_conversion(model):
        raise ValueError("timm has no conversion for this model")
    converted: nn.Module = timm_zoo.import_timm().utils.reparameterize_model(copy.deepcopy(model)).eval()
    return converted


def torch_fx(model: nn.Module) -> nn.Module:
    """torch.fx's folding of BatchNorms, which copies."""
    folded: nn.Module = optimization().fuse(model)
    return folded


def convert(model: nn.Module, x: torch.Tensor, device: torch.device, machine: str | None = None) -> Converted:
    """All modules, on `device`; what cannot be made is left out with its reason.

    Raises:
        reparam.ReparamError: ours fails; then there is nothing to compare.
    """
    made = Converted()
    modules: dict[str, nn.Module] = {}
    for name, tool in ((AUTHORS, authors), (FX, torch_fx)):
        try:
            with quiet():
                modules[name] = tool(model)
        except Exception as error:
            made.missing[name] = str(error) if isinstance(error, ValueError) else first_line(error)
    model, x = model.to(device), x.to(device)
    result = reparam.fuse(model, x, verify="quick", machine=machine)
    modules[OURS] = result.module
    made.variants[ORIGINAL] = model
    expected = output_of(model, x)
    for name in VARIANTS:
        if name not in modules:
            continue
        module = modules[name].to(device)
        try:
            made.errors[name] = errors(expected, output_of(module, x))[1]
            made.variants[name] = module
        except Exception as error:
            made.missing[name] = first_line(error)
    made.before, made.after = (
        {key: getattr(counts, key) for key in COUNTS} for counts in (result.report.before, result.report.after)
    )
    return made


def batch_norms(module: nn.Module) -> int:
    """BatchNorms among the modules."""
    return sum(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def plain_export(module: nn.Module, x: torch.Tensor, path: Path) -> None:
    """torch's own exporter at its defaults."""
    with quiet(), torch.no_grad():
        torch.onnx.export(module, (x,), str(path), dynamo=True, verbose=False)


def ours_export(module: nn.Module, x: torch.Tensor, path: Path) -> None:
    """Our exporter, for one size as the others."""
    export_onnx(module, x, path, dynamic_batch=False, dynamic_size=False, verify="quick")


def onnx_files(made: Converted, x: torch.Tensor, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """A file for each variant, and of the others why there is none; `onnxsim` is its result for the original's file."""
    files: dict[str, Path] = {}
    missing = {AUTHORS: made.missing.get(AUTHORS, ""), FX: made.missing.get(FX, "")}
    if FX in made.variants and batch_norms(made.variants[FX]) == batch_norms(made.variants[ORIGINAL]):
        missing[FX] = "torch.fx fuse folds nothing, so that its file would be the original's"
    for name in VARIANTS:
        path = folder / f"{VARIANTS.index(name)}.onnx"
        writer: Callable[[nn.Module, torch.Tensor, Path], None] = ours_export if name == OURS else plain_export
        try:
            if name == ONNXSIM:
                simplify(files[ORIGINAL], path)
            elif name in made.variants and not missing.get(name):
                writer(made.variants[name], x, path)
            else:
                continue
            files[name] = path
        except Exception as error:
            if name == ORIGINAL:
                raise
            missing[name] = first_line(error)
    return files, {name: reason for name, reason in missing.items() if reason}


def simplify(source: Path, target: Path) -> None:
    """onnxsim's simplification of a file."""
    import onnx
    import onnxsim

    with quiet():
        model, _ = onnxsim.simplify(onnx.load(str(source)))
        onnx.save_model(model, str(target))


def sessions(files: dict[str, Path], threads: int) -> dict[str, OnnxSession]:
    """The files in onnxruntime at its highest level."""
    return {name: OnnxSession(path, threads=threads) for name, path in files.items()}
