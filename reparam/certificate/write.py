"""Makes a certificate of what a run knows, and writes it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reparam.bench.machine import hardware_name
from reparam.certificate.hashes import file_digest, weights_digest
from reparam.data import Batch, digest
from reparam.equivalence import Comparison
from reparam.inputs import Inputs
from reparam.report import Report

FORMAT, VERSION = "reparam certificate", 1
PACKAGES = ("torch", "numpy", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Evidence:
    """What a certificate is made of.

    Attributes:
        report: of the run.
        original, fused: the two models; the original as it was loaded.
        model_file: the file that the original was loaded from.
        options: by name, in plain JSON types.
        inputs: the example; `specs` its sizes.
        data: the user's own inputs.
        compared: kind of file (`archive`, `onnx`) to how it compares, and whether its inputs had other sizes than the
            example's.
    """

    report: Report
    original: nn.Module
    fused: nn.Module
    model_file: Path
    options: Mapping[str, Any]
    inputs: Inputs
    specs: Sequence[str]
    data: tuple[Batch, ...]
    compared: Mapping[str, tuple[Comparison, bool | str]]


def versions() -> dict[str, str]:
    """Of Python, of this package, and of what computes."""
    from reparam import __version__

    found = {"python": platform.python_version(), "reparam": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment(device: torch.device) -> dict[str, str]:
    """Where the figures were computed: processor and number of threads decide their last digits."""
    return {"hardware": hardware_name(device), "threads": str(torch.get_num_threads())}


def device_of(model: nn.Module) -> torch.device:
    """Of the first weight; the CPU without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def write_certificate(path: Path, evidence: Evidence, files: Mapping[str, Path]) -> None:
    """Writes the certificate of a run as JSON.

    Args:
        files: kind to the file that was written; it may still lie elsewhere than it will, under the same name.
    """
    path.write_text(json.dumps(_certificate(evidence, files), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _certificate(evidence: Evidence, files: Mapping[str, Path]) -> dict[str, Any]:
    report = evidence.report
    plain = report.to_dict()
    return {
        "format": FORMAT,
        "version": VERSION,
        "verdict": {"equivalent": report.equivalent, "sentences": _verdict(evidence)},
        "original": {
            "model": report.model,
            "file": evidence.model_file.name,
            "sha256": file_digest(evidence.model_file),
            "weights_sha256": weights_digest(evidence.original.state_dict()),
        },
        "fused": {
            "weights_sha256": weights_digest(evidence.fused.state_dict()),
            "before": plain["before"],
            "after": plain["after"],
        },
        "files": {kind: _file(file) for kind, file in files.items()},
        "versions": versions(),
        "environment": environment(device_of(evidence.original)),
        "options": dict(evidence.options),
        "inputs": {
            "sizes": list(evidence.specs),
            "sha256": digest([Batch("example", evidence.inputs)]),
            "data": [batch.name for batch in evidence.data],
            "data_sha256": digest(evidence.data) if evidence.data else None,
        },
        "rewrites": plain["rewrites"],
        "refusals": plain["refusals"],
        "undone": plain["undone"],
        "notes": plain["notes"],
        "comparisons": {
            "fused": plain["comparison"],
            **{
                kind: {**comparison.to_dict(), "vary_shapes": vary}
                for kind, (comparison, vary) in evidence.compared.items()
            },
        },
    }


def _verdict(evidence: Evidence) -> list[str]:
    fused = evidence.report.comparison
    sentences = [] if fused is None else [f"fused model: {fused.summary()}"]
    return sentences + [f"{kind}: {comparison.summary()}" for kind, (comparison, _) in evidence.compared.items()]


def _file(path: Path) -> dict[str, Any]:
    data = path.with_name(path.name + ".data")
    more = {"data": {"file": data.name, "sha256": file_digest(data)}} if data.exists() else {}
    return {"file": path.name, "sha256": file_digest(path), "bytes": path.stat().st_size, **more}
