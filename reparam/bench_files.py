"""`reparam bench`: files become variants, options a grid, and every cell is on disk as soon as it is measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reparam import __version__
from reparam.bench import Series, Timing
from reparam.bench.backends import ALL, BACKENDS
from reparam.bench.footprint import Footprint
from reparam.bench.grid import Setting, resized, settings
from reparam.bench.machine import hardware_name
from reparam.bench.placement import DTYPES
from reparam.bench.placement import placement as checked_placement
from reparam.bench.series import Cell, earlier, write
from reparam.errors import InputError, ReparamError
from reparam.export import OnnxSession
from reparam.export.providers import missing_provider
from reparam.inputs import Inputs
from reparam.latency import Variants, change_of, timed
from reparam.opened import example_for, for_file, is_onnx
from reparam.pipeline import fuse
from reparam.quiet import without_copying_warnings
from reparam.runtimes import CUDA, RUNTIMES
from reparam.source import Source

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What `bench_files` is asked to do.

    Attributes:
        source: the first file, and the example inputs for all of them.
        others: further files; without them the model is fused, and original and fused are measured.
        backends: as for `reparam.benchmark`.
        batches, sizes, dtypes, threads: axes of the grid; what is empty is left as it is.
        device: "cpu", "cuda" or another of torch's; None is the CPU, where files are loaded.
        channels_last, cuda_graphs, seconds: as for `reparam.benchmark`; `seconds` are for each cell.
        out: file for the results, written after every cell, and gone on from if it is there.
    """

    source: Source
    others: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("eager",)
    batches: tuple[int, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    dtypes: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    device: str | None = None
    channels_last: bool = False
    cuda_graphs: bool = False
    seconds: float = 5.0
    out: Path | None = None


def bench_files(request: Request, progress: Progress | None = None) -> Series:
    """Latency of the models in several files, or of one and its fused form, in pairs, for every cell of the grid.

    After an interrupt from the keyboard the series holds what was measured, and `partial` is set.

    Raises:
        InputError: a file cannot be loaded, an option cannot be used, or the file of results is for something else.
        ExportError: an ONNX file cannot be run at all.
        NotEquivalentError: the fused model does not agree with the original.
        KeyboardInterrupt: interrupted before the first cell had a result.
    """
    tell = progress or (lambda text: None)
    grid = settings(request.batches, request.sizes, request.dtypes, request.threads)
    _check(request)
    done = earlier(request.out, _about(request)) if request.out is not None else {}
    run = _Run(request, tell)
    cells: dict[Setting, Cell] = {setting: done[setting] for setting in grid if setting in done}
    partial = False

    def series() -> Series:
        ordered = tuple(cells[setting] for setting in grid if setting in cells)
        return Series(_about(request), ordered, partial or len(ordered) < len(grid), tuple(run.notes))

    if done:
        run.notes.append(f"{len(cells)} of {len(grid)} cells were measured by an earlier run, in {request.out}")
    try:
        for number, setting in enumerate(grid, 1):
            if setting in done:
                continue
            cells[setting] = run.cell(setting, f"{number} of {len(grid)}: {setting}" if len(grid) > 1 else "")
            partial = bool((timing := cells[setting].timing) and timing.partial)
            if request.out is not None:
                write(series(), request.out)
            if partial:
                break
    except KeyboardInterrupt:
        partial = True
        if not cells:
            raise
        if request.out is not None:
            write(series(), request.out)
    return series()


def _check(request: Request) -> None:
    """Faults that need no file to be loaded.

    Raises:
        InputError: an option cannot be used.
    """
    for dtype in request.dtypes or (None,):
        checked_placement(request.device, dtype, request.channels_last, request.cuda_graphs, None)
    known = (*BACKENDS, *RUNTIMES, ALL)
    for name in request.backends:
        if name not in known:
            raise InputError(f"there is no backend {name!r}; choose from {', '.join(known)}")
    out = request.out
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise InputError(f"{out} is a folder, or stands in one that does not exist; give --out the name of a file")


def _about(request: Request) -> dict[str, str]:
    """What all cells have in common, in words; what differs keeps a run from going on with another's results."""
    source = request.source
    paths = [Path(path).expanduser() for path in (source.path, *request.others)]
    stats = [path.stat() if path.exists() else None for path in paths]
    options = {
        "arch": source.arch,
        "inputs": ", ".join(source.inputs),
        "key": source.key,
        "backends": ", ".join(request.backends),
        "device": request.device,
        "layout": "channels last" if request.channels_last else None,
        "CUDA graphs": "on" if request.cuda_graphs else None,
    }
    device = torch.device(request.device or "cpu")
    return {
        "files": ", ".join(map(str, paths)),
        "bytes and times of the files": ", ".join(f"{s.st_size} at {s.st_mtime_ns}" if s else "missing" for s in stats),
        **{name: value for name, value in options.items() if value},
        "seconds": f"{request.seconds:g}",
        "seed": str(source.seed),
        "hardware": hardware_name(device),
        "torch": torch.__version__,
        "reparam": __version__,
    }


@dataclass
class _Run:
    """One run: models are loaded once, and fused once for each dtype."""

    request: Request
    tell: Progress
    notes: list[str] = field(default_factory=list)
    _loaded: dict[str, tuple[nn.Module, Footprint]] = field(default_factory=dict)
    _inputs: Inputs | None = None
    _fused: dict[torch.dtype | None, Variants] = field(default_factory=dict)

    def cell(self, setting: Setting, where: str) -> Cell:
        """One cell, the `where`-th of several; what the models cannot do there is its result, and an error if alone."""
        try:
            variants = self._variants(setting)
            assert self._inputs is not None
            timing = self._measured(variants, resized(self._inputs, setting), setting, where)
        except ReparamError as error:
            if not where:
                raise
            return Cell(setting, failed=str(error))
        return Cell(setting, timing)

    def _measured(self, variants: Variants, inputs: Inputs, setting: Setting, where: str) -> Timing:
        request = self.request
        what = f"cell {where}, " if where else ""
        self.tell(f"measuring latency: {what}building")
        return timed(
            variants,
            inputs,
            backends=request.backends,
            device=request.device,
            dtype=setting.dtype,
            threads=setting.threads,
            channels_last=request.channels_last,
            cuda_graphs=request.cuda_graphs,
            max_seconds=request.seconds,
            seed=request.source.seed,
            progress=lambda done, text: self.tell(f"measuring latency: {what}{done:.0%}"),
        )

    def _variants(self, setting: Setting) -> Variants:
        if not self.request.others:
            return self._original_and_fused(setting)
        self.tell("loading the models")
        models: dict[str, Any] = {}
        files: dict[str, Footprint] = {}
        for path in (self.request.source.path, *self.request.others):
            name = _label(path, models)
            models[name], files[name] = self._session(path, setting) if is_onnx(path) else self._model(path)
        if self._inputs is None:
            self._inputs = self._example(models)
        return Variants(models, {}, files)

    def _example(self, models: Mapping[str, Any]) -> Inputs:
        """Inputs for all of the models: as the first PyTorch model tells, else as the first ONNX file does."""
        paths = dict(zip(models, (self.request.source.path, *self.request.others), strict=True))
        modules = [name for name, model in models.items() if isinstance(model, nn.Module)]
        sessions = [name for name in models if name not in modules]
        first = [*modules, *sessions][0]
        source = for_file(self.request.source, paths[first])
        return example_for(source, models[first], models[sessions[0] if sessions else first])

    def _model(self, path: str) -> tuple[nn.Module, Footprint]:
        """The model in a file, loaded once."""
        if path not in self._loaded:
            start = time.perf_counter()
            model = for_file(self.request.source, path).model()
            self._loaded[path] = model, Footprint(disk_bytes=_bytes(path), load_seconds=time.perf_counter() - start)
        return self._loaded[path]

    def _session(self, path: str, setting: Setting) -> tuple[OnnxSession, Footprint]:
        """An ONNX file in onnxruntime, on the GPU if that is asked for and can be."""
        providers = None
        if (self.request.device or "").startswith("cuda"):
            missing = missing_provider(CUDA)
            providers = None if missing else [CUDA, "CPUExecutionProvider"]
            if missing and (note := f"{path} runs on the CPU: {missing}") not in self.notes:
                self.notes.append(note)
        start = time.perf_counter()
        threads = setting.threads or torch.get_num_threads()
        session = OnnxSession(Path(path).expanduser(), threads=threads, providers=providers)
        return session, Footprint(disk_bytes=_bytes(path), load_seconds=time.perf_counter() - start)

    def _original_and_fused(self, setting: Setting) -> Variants:
        """Original and fused, in the dtype of the cell, so that what is verified is what is timed."""
        request = self.request
        if is_onnx(request.source.path):
            raise InputError(
                f"{request.source.path} is an ONNX file, which cannot be fused; give the PyTorch model, or further "
                "files to measure against"
            )
        dtype = None if setting.dtype is None else DTYPES[setting.dtype]
        if not self._loaded:
            self.tell("loading the model")
        model, file = self._model(request.source.path)
        if self._inputs is None:
            self._inputs = self._example({"original": model})
        inputs = self._inputs
        if dtype not in self._fused:
            with without_copying_warnings():
                here = copy.deepcopy(model).to(device=request.device, dtype=dtype)
            moved = inputs.map(lambda tensor: tensor.to(request.device or tensor.device))
            moved = moved if dtype is None else moved.to(dtype)
            result = fuse(here, moved, seed=request.source.seed, progress=self.tell)
            models: dict[str, Any] = {"original": result.reference, "fused": result.module}
            self._fused[dtype] = Variants(models, {"fused": change_of(result)}, {"original": file})
        found = self._fused[dtype]
        elements = [sum(t.numel() for t in given.tensors()) for given in (inputs, resized(inputs, setting))]
        scale = elements[1] / max(elements[0], 1)
        return replace(found, changes={name: replace(one, scale=scale) for name, one in found.changes.items()})


def _bytes(path: str) -> int:
    """Size on disk, weights beside an ONNX file included."""
    file = Path(path).expanduser()
    beside = file.with_name(file.name + ".data")
    return file.stat().st_size + (beside.stat().st_size if beside.exists() else 0)


def _label(path: str, taken: dict[str, Any]) -> str:
    names: Sequence[str] = (Path(path).name, path, *(f"{path} ({number})" for number in range(2, len(taken) + 2)))
    return next(name for name in names if name not in taken)
