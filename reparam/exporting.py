"""From a model file to an ONNX file: load, fuse if asked, export, check against the original. A plain function."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reparam.data import LIMIT, read
from reparam.errors import ExportError, InputError
from reparam.export import export_onnx
from reparam.export.leftovers import Leftover
from reparam.export.onnx import EXTERNAL_DATA_BYTES
from reparam.pipeline import fuse
from reparam.report import Report
from reparam.report.exported import Exported
from reparam.source import Source, without_ending
from reparam.stages import Progress, Stages

ENDING = ".onnx"


@dataclass(frozen=True)
class ExportRequest(Source):
    """What `export` is asked to do.

    Attributes:
        out: the file to write, or a folder (which exists, or whose path ends in a separator); None is beside the model,
            as `NAME.onnx`.
        fuse: whether the model is fused first; without, the original is written as it is.
        inference_form: what modules are at inference; as for `reparam.fuse`.
        opset, dynamic_batch, dynamic_size, simplify, float16, float16_io, input_names, output_names,
            external_data_bytes: as for `reparam.export_onnx`.
        metadata: text for the file's metadata, beside what is always there.
        verify: how thoroughly the fused model and the file are compared with the original; "off" leaves that out.
        data, data_limit: inputs of the user's that are compared besides; as for `reparam.verify`.
    """

    out: str | None = None
    fuse: bool = True
    inference_form: Mapping[Any, Any] = field(default_factory=dict)
    opset: int | None = None
    dynamic_batch: bool = True
    dynamic_size: bool = False
    simplify: bool = True
    float16: bool = False
    float16_io: bool = False
    input_names: tuple[str, ...] | None = None
    output_names: tuple[str, ...] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    external_data_bytes: int = EXTERNAL_DATA_BYTES
    verify: str = "standard"
    data: str | None = None
    data_limit: int = LIMIT


def export(request: ExportRequest, progress: Progress | None = None) -> Exported:
    """Loads the model, fuses it unless told not to, and writes it as ONNX.

    The file appears under its name only after it was found equivalent to the original model in onnxruntime.

    Args:
        progress: called with a few words when a stage starts.

    Raises:
        ReparamError: bad input, or a model that cannot be captured or exported.
        NotEquivalentError: the fused model or the file does not agree with the original. Nothing was written.
    """
    stages = Stages(progress)
    target = output_path(request)
    with stages("loading the model"):
        model, inputs, specs = request.load()
        batches, prepared = read(request.data, model, inputs, limit=request.data_limit)
    data = batches if request.data is not None else None
    module, original, report = model, model, None
    if request.fuse:
        result = fuse(
            *(model, inputs),
            seed=request.seed,
            verify=request.verify,
            inference_form=request.inference_form,
            data=data,
            progress=progress,
        )
        module, original, report = result.module, result.reference, result.report
    with stages("writing and checking the ONNX file"), _folder_of(target), _explained(report):
        file = export_onnx(
            *(module, inputs, target),
            opset=request.opset,
            dynamic_batch=request.dynamic_batch,
            dynamic_size=request.dynamic_size,
            simplify=request.simplify,
            float16=request.float16,
            float16_io=request.float16_io,
            input_names=request.input_names,
            output_names=request.output_names,
            metadata={**provenance(request, specs), **request.metadata},
            external_data_bytes=request.external_data_bytes,
            original=original,
            verify=request.verify,
            seed=request.seed,
            data=data,
        )
    file = replace(file, notes=(*prepared, *file.notes))
    seconds = {**(report.seconds if report else {}), **stages.seconds}
    return Exported(
        f"{type(model).__name__} from {request.path}", file, report, reasons_of(file.leftovers, report), seconds
    )


def output_path(request: ExportRequest) -> Path:
    """Where the file is written.

    Raises:
        InputError: that is the model file itself, or a folder.
    """
    source = Path(request.path).expanduser()
    named = without_ending(source.name) + ENDING
    target = source.with_name(named)
    if request.out is not None:
        out = Path(request.out).expanduser()
        target = out / named if out.is_dir() or request.out.endswith(("/", os.sep)) else out
    if target.is_dir():
        raise InputError(f"{target} is a folder; choose another place with --out")
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target} is the model file itself, which is never overwritten; choose another --out")
    return target


def provenance(request: ExportRequest, specs: Sequence[Any]) -> dict[str, str]:
    """Where the file comes from: kept in its metadata beside the versions, which are always there."""
    source = Path(request.path).expanduser()
    facts = {
        "reparam.source": source.name,
        "reparam.fused": "yes" if request.fuse else "no",
        "reparam.example": ", ".join(map(str, specs)),
    }
    if request.arch is not None:
        facts["reparam.arch"] = request.arch
    if source.is_file():
        digest = hashlib.sha256()
        with source.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        facts["reparam.source.sha256"] = digest.hexdigest()
    return facts


def reasons_of(found: Sequence[Leftover], report: Report | None) -> tuple[str, ...]:
    """Why each node stays that inference does not need: what the file knows, and what fusing said of that module."""
    said = {refusal.place.module: refusal.reason for refusal in report.refusals} if report else {}
    unknown = "no reason is known: please report it" if report else "the original was exported as it is"
    undone = {one.rewrite.place.module: one.failure for one in report.undone} if report else {}

    def reason(one: Leftover) -> str:
        if not one.module:
            return unknown
        parts = one.module.split(".")
        places = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        if places[0] in said and places[0] not in undone:
            return said[places[0]]
        return next((f"merging it was undone: {undone[place]}" for place in places if place in undone), unknown)

    return tuple(f"{one.operator} {one.module or one.node}: {one.needed or reason(one)}" for one in found)


@contextmanager
def _folder_of(target: Path) -> Iterator[None]:
    """The target's folder, which goes again if it was made for a file that does not come.

    Raises:
        InputError: it cannot be made.
    """
    missing = [folder for folder in target.absolute().parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{target.parent} cannot be made ({error.strerror or error}); choose another place with --out"
        ) from None
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):  # somebody else put something there
                folder.rmdir()
        raise


@contextmanager
def _explained(report: Report | None) -> Iterator[None]:
    """Says what a user can do with a model that can only be fused in parts, and cannot be exported for that reason."""
    try:
        yield
    except ExportError as error:
        if report is None or report.capture not in ("partial", "modules"):
            raise
        raise ExportError(
            f"{error}; the model could be fused in parts only, and such a model runs in Python: try --no-fuse, which "
            "exports the original"
        ) from error
