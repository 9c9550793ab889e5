"""One run from file to files: load, fuse, verify, export, verify again, measure. A plain function; others print."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reparam.bench import Timing, benchmark
from reparam.certificate import WEIGHTS_KEY, Evidence, weights_digest, write_certificate
from reparam.data import LIMIT, Batch, read
from reparam.equivalence import Comparison
from reparam.errors import ExportError, InputError, NotEquivalentError
from reparam.export import OnnxSession, export_archive, export_onnx
from reparam.inputs import Inputs
from reparam.latency import change_of, with_reasons
from reparam.pipeline import FuseResult, fuse
from reparam.places import publish, staging
from reparam.report import Report, write_report
from reparam.report.files import require_writable
from reparam.source import Source, without_ending
from reparam.stages import Progress, Stages
from reparam.written import verify_archive

_ENDINGS = {"onnx": ".onnx", "archive": ".pt2", "certificate": ".json"}


@dataclass(frozen=True)
class Request(Source):
    """What `run` is asked to do.

    Attributes:
        out: where to write: a folder (which exists, or whose path ends in a separator), or a path to which `.onnx`,
            `.pt2` and `.json` are added; None is beside the model, as `NAME.fused.onnx` and so on.
        capture: how the graph is captured; as for `reparam.fuse`.
        objective, machine: what to have least of, and on which machine; as for `reparam.fuse`.
        explain: whether to report what was compared for each region.
        inference_form: what modules are at inference; as for `reparam.fuse`.
        verify: how thoroughly the results are checked: quick, standard, thorough, or off.
        data: the user's own inputs, which are compared besides: a folder of images, `.npy`, `.npz`, or
            `package.module:function`; None for none. `data_limit` of them at most.
        strict: whether a rewrite that is found at fault is an error, and not undone.
        fixed_sizes: whether the fused model may run at the example's sizes only, the batch apart.
        onnx, archive: which files to write.
        certificate: whether to write one (`reparam.certificate`), of what is written and verified.
        bench: whether to measure latency; `bench_seconds` long.
        report: where to write the report, as HTML, Markdown or JSON by its ending; None for nowhere.
    """

    out: str | None = None
    capture: str = "auto"
    objective: str = "latency"
    machine: str | None = None
    explain: bool = False
    inference_form: Mapping[Any, Any] = field(default_factory=dict)
    fixed_sizes: bool = False
    verify: str = "standard"
    data: str | None = None
    data_limit: int = LIMIT
    strict: bool = False
    onnx: bool = True
    archive: bool = True
    certificate: bool = True
    bench: bool = True
    bench_seconds: float = 5.0
    report: str | None = None


def run(request: Request, progress: Progress | None = None) -> Report:
    """Loads the model, fuses it, checks the result, writes the files asked for and measures.

    Files appear under their names only after everything that is written was found equivalent to the original. The
    report is written in any case. An interrupt from the keyboard while latency is measured ends the measurement only:
    the files are written, and the report says that it is partial.

    Args:
        progress: called with a few words when a stage starts.

    Returns:
        The report, with the paths of the files that were written.

    Raises:
        ReparamError: bad input, or a model that cannot be captured or exported.
        NotEquivalentError: the fused model or its ONNX file does not agree with the original. No model was written;
            the error carries the report.
    """
    target = _report_path(request)
    try:
        report = _run(request, progress)
    except NotEquivalentError as error:
        if target is not None and error.report is not None:
            error.report = _reported(error.report, target)
        raise
    return report if target is None else _reported(report, target)


def _report_path(request: Request) -> Path | None:
    """Where the report is written, None for nowhere.

    Raises:
        InputError: nothing can be written there, or it is the model file itself.
    """
    if request.report is None:
        return None
    target = require_writable(request.report)
    source = Path(request.path).expanduser()
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target} is the model file itself; choose another place for the report")
    return target


def _reported(report: Report, target: Path) -> Report:
    """Writes the report, and says in it where."""
    report = replace(report, files={**report.files, "report": str(target)})
    try:
        write_report(report, target)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the models were written, the report was not") from None
    return report


def _run(request: Request, progress: Progress | None) -> Report:
    """Everything but the report's file."""
    stages = Stages(progress)
    targets = output_paths(request)
    with stages("loading the model"):
        model, inputs, specs = request.load()
        batches, prepared = read(request.data, model, inputs, limit=request.data_limit)
    result = fuse(
        model,
        inputs,
        seed=request.seed,
        capture=request.capture,
        objective=request.objective,
        machine=request.machine,
        explain=request.explain,
        fixed_sizes=request.fixed_sizes,
        inference_form=request.inference_form,
        verify=request.verify,
        strict=request.strict,
        data=batches if request.data is not None else None,
        progress=progress,
    )
    sizes = tuple(map(str, specs))
    report = replace(
        result.report,
        model=f"{result.report.model} from {request.path}",
        environment={**result.report.environment, "inputs": ", ".join(sizes), "seed": str(request.seed)},
        notes=(*prepared, *result.report.notes),
    )
    with staging(targets) as folder:
        paths = {kind: folder / target.name for kind, target in targets.items()}
        work = _Run(request, stages, model, result, inputs, sizes, batches, paths, report)
        if "archive" in paths:
            work.write_archive()
        if "onnx" in paths:
            work.write_onnx()
        work.report = replace(work.report, seconds={**stages.seconds, **work.report.seconds})
        work.require_equivalent()
        if request.bench:
            work.measure(progress)
        if "certificate" in paths:
            work.certify()
        files = publish(folder, targets, Path(request.path))
    return replace(work.report, files=files, seconds={**work.report.seconds, **stages.seconds})


@dataclass
class _Run:
    """What a run was given, and what it has made so far.

    Attributes:
        sizes: of the inputs, as a user writes them.
        paths: where files are written before they are published, by kind.
        compared: by kind of file, how it compares with the original, and the sizes that it takes.
    """

    request: Request
    stages: Stages
    model: nn.Module
    result: FuseResult
    inputs: Inputs
    sizes: tuple[str, ...]
    batches: tuple[Batch, ...]
    paths: Mapping[str, Path]
    report: Report
    session: OnnxSession | None = None
    compared: dict[str, tuple[Comparison, bool | str]] = field(default_factory=dict)

    @cached_property
    def marks(self) -> dict[str, str]:
        """What every file says of the weights that it was made of."""
        return {WEIGHTS_KEY: weights_digest(self.result.module.state_dict())}

    def write_archive(self) -> None:
        """Writes the torch.export archive and compares it."""
        path, request = self.paths["archive"], self.request
        with self.stages("writing the torch.export archive"), _explained(self.report):
            export_archive(self.result.module, self.inputs, path, metadata=self.marks)
        if request.verify == "off":
            return
        with self.stages("verifying the archive"):
            asked = (request.seed, request.verify, self.batches)
            comparison = verify_archive(self.result.reference, path, self.inputs, *asked)
        self.compared["archive"] = (comparison, True)
        self.report = replace(self.report, archive_comparison=comparison)

    def write_onnx(self) -> None:
        """Writes the ONNX file, which compares itself, and opens it."""
        request = self.request
        stage = self.stages("writing and checking the ONNX file")
        with stage, _explained(self.report), _with_report(self.report):
            file = export_onnx(
                *(self.result.module, self.inputs, self.paths["onnx"]),
                original=self.result.reference,
                verify=request.verify,
                seed=request.seed,
                data=self.batches if request.data is not None else None,
                metadata=self.marks,
            )
            self.session = OnnxSession(file.path, threads=torch.get_num_threads())
        if file.comparison is not None:
            self.compared["onnx"] = (file.comparison, self.session.takes_other_sizes(list(self.inputs.tensors())))
        notes = (*self.report.notes, *(f"ONNX: {note}" for note in file.notes))
        self.report = replace(self.report, onnx_comparison=file.comparison, notes=notes)

    def require_equivalent(self) -> None:
        """Stops a run whose archive does not agree with the original.

        Raises:
            NotEquivalentError: it does not.
        """
        comparison = self.report.archive_comparison
        if comparison is not None and not comparison.passed:
            raise NotEquivalentError(
                f"the torch.export archive {comparison.agreement} the original model: "
                f"{comparison.summary().rstrip('.')}; no file was written, "
                "pass --no-archive to write the ONNX file alone",
                self.report,
            )

    def measure(self, progress: Progress | None) -> None:
        """Measures latency; an interrupt ends that alone."""
        try:
            with self.stages("measuring latency"):
                timing = _measure(self.result, self.session, self.inputs, self.request, progress)
            interrupted = "measuring latency" if timing.partial else ""
            self.report = replace(self.report, timing=timing, interrupted=interrupted)
        except KeyboardInterrupt:  # before the first round; what is verified by now is worth keeping
            self.report = replace(self.report, interrupted="measuring latency")

    def certify(self) -> None:
        """Writes the certificate of the files that were compared."""
        request, report = self.request, self.report
        with self.stages("writing the certificate"):
            evidence = Evidence(
                report,
                self.model,
                self.result.module,
                Path(request.path).expanduser(),
                _options(request),
                self.inputs,
                self.sizes,
                self.batches,
                self.compared,
            )
            paths = {kind: self.paths[kind] for kind in self.compared}
            write_certificate(self.paths["certificate"], evidence, paths)


@contextmanager
def _explained(report: Report) -> Iterator[None]:
    """Says what a user can do with a model whose own forward stays, and that cannot be exported for that reason."""
    try:
        yield
    except ExportError as error:
        if report.capture not in ("partial", "modules"):
            raise
        raise ExportError(
            f"{error}; the model could be fused in parts only, and such a model runs in Python: call reparam.fuse, or "
            "pass --no-archive --no-onnx for the report alone"
        ) from error


def _options(request: Request) -> dict[str, Any]:
    """What decides the result, in plain JSON types."""
    left_out = {"path", "out", "onnx", "archive", "certificate", "bench", "bench_seconds", "report"}
    plain = {name: value for name, value in vars(request).items() if name not in left_out}
    plain["arch_args"] = {name: repr(value) for name, value in request.arch_args.items()}
    plain["inference_form"] = {
        str(name): form if isinstance(form, (int, float)) else str(form)
        for name, form in request.inference_form.items()
    }
    return plain


@contextmanager
def _with_report(report: Report) -> Iterator[None]:
    """An ONNX file that does not agree, with what is known until then."""
    try:
        yield
    except NotEquivalentError as error:
        raise NotEquivalentError(
            f"{error}; no file was written, pass --no-onnx to write the torch.export archive alone",
            replace(report, onnx_comparison=error.comparison),
        ) from error


def _measure(
    result: FuseResult,
    session: OnnxSession | None,
    inputs: Inputs,
    request: Request,
    progress: Progress | None,
) -> Timing:
    variants: dict[str, Any] = {"original": result.reference, "fused": result.module}
    if session is not None:
        variants["fused, onnxruntime"] = session
    share: Callable[[float, str], None] | None = None
    if progress is not None:
        announce = progress

        def share(done: float, text: str) -> None:
            announce(f"measuring latency: {done:.0%}")

    timing = benchmark(variants, inputs, max_seconds=request.bench_seconds, seed=request.seed, progress=share)
    return with_reasons(timing, {"fused": change_of(result)})


def output_paths(request: Request) -> dict[str, Path]:
    """Kind of file -> where it will be written.

    Raises:
        InputError: a target is the model file itself, or a folder, or no path at all.
    """
    try:
        return _output_paths(request)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(
            f"no file can be written beside {_short(request)} ({reason}); give a place with --out"
        ) from None


def _short(request: Request) -> str:
    return request.path if len(request.path) <= 200 else f"{request.path[:200]}..."


def _output_paths(request: Request) -> dict[str, Path]:
    if request.out == "":
        raise InputError("--out is empty; give a folder, or a path without ending")
    source = Path(request.path).expanduser()
    name = without_ending(source.name)
    prefix = source.parent / f"{name}.fused"
    if request.out is not None:
        out = Path(request.out).expanduser()
        if out.is_dir() or request.out.endswith(("/", os.sep)):
            prefix = out / f"{name}.fused"
        else:
            prefix = out.with_suffix("") if out.suffix in _ENDINGS.values() else out
    wanted = {"onnx": request.onnx, "archive": request.archive}
    wanted["certificate"] = request.certificate and request.verify != "off" and any(wanted.values())
    targets = {kind: prefix.with_name(prefix.name + _ENDINGS[kind]) for kind, asked in wanted.items() if asked}
    report = None if request.report is None else Path(request.report).expanduser().absolute()
    for target in targets.values():
        if target.absolute() == report:
            raise InputError(f"--report {request.report} is where the {target.name} of this run goes; choose another")
        if target.is_dir():
            raise InputError(f"{target} is a folder; choose another place with --out")
        if target.exists() and source.exists() and target.samefile(source):
            raise InputError(f"{target} is the model file itself, which is never overwritten; choose another --out")
    return targets
