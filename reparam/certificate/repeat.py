"""Does again what a certificate says was done, and tells sentence by sentence what holds and what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from reparam.capture.archives import archive_metadata
from reparam.capture.imports import printable
from reparam.capture.inference import in_inference_form
from reparam.capture.load import load
from reparam.capture.scripts import graph_of_script
from reparam.certificate.figures import moved_figures, share
from reparam.certificate.hashes import WEIGHTS_KEY, file_digest, weights_digest
from reparam.certificate.read import Certificate, File
from reparam.certificate.write import environment, versions
from reparam.data import Batch, digest, read
from reparam.equivalence import Comparison, verify
from reparam.errors import InputError, ReparamError
from reparam.export import OnnxSession
from reparam.inputs import Inputs
from reparam.source import Source

Kind = Literal["holds", "changed", "differs"]
SHOWN = 5
REPEATABLE = 0.01
"""By what share of itself a figure may move where versions, processor and threads are the same: kernels may choose
another order of summation by the addresses of their buffers."""
_NAMES = {"archive": "torch.export archive", "onnx": "ONNX file"}


@dataclass(frozen=True)
class Moved:
    """Where files are that do not lie beside the certificate any more; None for those that do."""

    original: str | None = None
    archive: str | None = None
    onnx: str | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        kind: `holds`; `changed`, if the certificate does not hold for that reason; `differs`, if it may all the same.
        sentence: what was found.
    """

    kind: Kind
    sentence: str


@dataclass(frozen=True)
class Repeated:
    """What came of a repetition.

    Attributes:
        certificate: its path.
        findings: in the order in which they were made.
        comparisons: kind of file to how it compares now.
    """

    certificate: str
    findings: tuple[Finding, ...]
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether nothing has changed that the certificate depends on."""
        return not any(finding.kind == "changed" for finding in self.findings)

    def summary(self) -> str:
        """The verdict as one sentence."""
        if self.holds:
            return f"{self.certificate} still holds."
        changed = [finding.sentence for finding in self.findings if finding.kind == "changed"]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        return f"{self.certificate} does NOT hold any more: {changed[0].rstrip('.')}{more}."

    def to_dict(self) -> dict[str, Any]:
        """The value as plain JSON types."""
        return {
            "certificate": self.certificate,
            "holds": self.holds,
            "summary": self.summary(),
            "findings": [asdict(finding) for finding in self.findings],
            "comparisons": {kind: comparison.to_dict() for kind, comparison in self.comparisons.items()},
        }


def repeat(
    certificate: Certificate,
    source: Source,
    moved: Moved = Moved(),
    *,
    data: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Repeated:
    """Hashes the files again, and compares the original with the fused files on the same inputs.

    Args:
        source: how to load the original: builder, its arguments, allowed classes. They decide which code runs, so they
            are the user's, and what the certificate says of them is only compared. Path, key, dtype, sizes and seed are
            the certificate's.
        moved: files that lie elsewhere.
        data: as for `verify`; has to be given where the certificate names a function.

    Raises:
        InputError: a file is missing, the original cannot be loaded, or code would have to be named by the certificate.
    """
    tell = progress or (lambda text: None)
    folder = certificate.path.parent
    paths = {
        "original": folder / certificate.original.name,
        **{k: folder / f.name for k, f in certificate.files.items()},
    }
    paths.update({kind: Path(path).expanduser() for kind, path in vars(moved).items() if path is not None})
    _require_own_code(certificate, source, data)
    tell("hashing the files")
    where = _where_it_runs(certificate)
    findings = [
        _hashed(paths["original"], certificate.original, "the original"),
        *(one for kind, file in certificate.files.items() for one in _hashed_all(paths[kind], file, _NAMES[kind])),
        *where,
    ]
    tell("loading the models")
    original, inputs, batches, found = _inputs(certificate, source, paths["original"], data)
    findings += found
    comparisons = {}
    for kind in certificate.files:
        tell(f"verifying the {_NAMES[kind]}")
        try:
            candidate, weights = _candidate(kind, paths[kind], source)
        except ReparamError as error:
            if not any(
                one.kind == "changed" and one.sentence.startswith(f"the {_NAMES[kind]} {paths[kind]}")
                for one in findings
            ):
                raise
            findings.append(Finding("changed", f"the {_NAMES[kind]} cannot be read any more: {error}"))
            continue
        findings.append(
            _weights(weights, certificate.fused_weights, f"the weights named in the metadata of the {_NAMES[kind]}")
        )
        if isinstance(candidate, nn.Module):
            own = weights_digest(candidate.state_dict())
            findings.append(_weights(own, certificate.fused_weights, f"the weights in the {_NAMES[kind]}"))
        recorded = certificate.comparisons[kind]
        comparisons[kind] = verify(
            *(original, _callable(candidate), inputs),
            level=certificate.options["verify"],
            seed=certificate.options["seed"],
            vary_shapes=recorded["vary_shapes"],
            check_structure=False,
            data=batches,
        )
        same_machine = not any(finding.kind == "differs" for finding in where)
        findings += _compared(_NAMES[kind], recorded, comparisons[kind], same_machine)
    return Repeated(str(certificate.path), tuple(findings), comparisons)


def _require_own_code(certificate: Certificate, source: Source, data: str | None) -> None:
    """What decides which code runs is never taken from a certificate.

    Raises:
        InputError: the certificate was made with such options, and they were not given again.
    """
    options = certificate.options
    missing = []
    if options["arch"] is not None and source.arch is None:
        arguments = "".join(f" --arch-args {key}={value}" for key, value in options["arch_args"].items())
        missing.append(f"--arch {options['arch']}{arguments}")
    if options["allow_classes"] and not source.allow_classes and not source.allow_pickle:
        missing += [f"--allow-class {name}" for name in options["allow_classes"]]
    if options["allow_pickle"] and not source.allow_pickle and not source.allow_classes:
        missing.append("--allow-pickle")
    if options["data"] is not None and data is None and not _is_plain(options["data"]):
        missing.append(f"--data {options['data']}")
    if missing:
        raise InputError(
            printable(
                f"{certificate.path} was made with {' '.join(missing)}, which decides what code or data is loaded, and "
                "a certificate never decides that; if you trust it, give it again on the command line",
                600,
            )
        )


def _is_plain(data: str) -> bool:
    path = Path(data).expanduser()
    return path.is_dir() or path.is_file()


def _hashed(path: Path, file: File, what: str) -> Finding:
    return _same(file_digest(path), file.sha256, f"{what} {path}")


def _hashed_all(path: Path, file: File, what: str) -> Iterator[Finding]:
    yield _hashed(path, file, f"the {what}")
    if file.data is not None:
        yield _hashed(path.with_name(file.data.name), file.data, f"the weights of the {what}")


def _same(now: str, before: str, what: str) -> Finding:
    if now == before:
        return Finding("holds", f"{what}: SHA-256 {now[:16]}... as certified")
    return Finding("changed", f"{what}: SHA-256 is {now[:16]}... and was {before[:16]}...")


def _weights(now: str | None, before: str, what: str) -> Finding:
    if now is None:
        return Finding("changed", f"{what}: none, its metadata has no {WEIGHTS_KEY}")
    return _same(now, before, what)


def _where_it_runs(certificate: Certificate) -> list[Finding]:
    now = {**versions(), **environment(torch.device("cpu"))}
    before = {**certificate.versions, **certificate.environment}
    found = [
        Finding("differs", f"{name} is {now.get(name, 'not known')} and was {before.get(name, 'not known')}")
        for name in {**before, **now}
        if now.get(name) != before.get(name)
    ]
    return found or [Finding("holds", "versions, processor and number of threads are the same")]


def _inputs(
    certificate: Certificate, source: Source, path: Path, data: str | None
) -> tuple[nn.Module, Inputs, tuple[Batch, ...], list[Finding]]:
    """The original in its inference form, the example and the user's data, and whether they are what they were."""
    options = certificate.options
    same = replace(
        *(source,),
        path=str(path),
        key=options["key"],
        inputs=tuple(options["inputs"]),
        dtype=options["dtype"],
        seed=options["seed"],
    )
    model, inputs, _ = same.load()
    findings = [
        _weights(weights_digest(model.state_dict()), certificate.original_weights, "the weights of the original")
    ]
    now = digest([Batch("example", inputs)])
    findings.append(_same(now, certificate.inputs_sha256, "the example input"))
    batches, _ = read(data or options["data"], model, inputs, limit=options["data_limit"])
    if certificate.data_sha256 is not None or batches:
        found = digest(batches) if batches else "no data given"
        findings.append(_same(found, certificate.data_sha256 or "no data given", "the data"))
    if isinstance(model, torch.jit.ScriptModule):
        model = graph_of_script(model, inputs)
    return in_inference_form(model, options["inference_form"])[0], inputs, batches, findings


def _candidate(kind: str, path: Path, source: Source) -> tuple[Any, str | None]:
    """A fused file as something that runs, and the hash of its weights that it carries."""
    if kind == "onnx":
        session = OnnxSession(path, threads=torch.get_num_threads())
        return session, session.metadata.get(WEIGHTS_KEY)
    found = archive_metadata(path).get(WEIGHTS_KEY)
    return load(path, allow_pickle=source.allow_pickle), found


def _callable(candidate: Any) -> Callable[..., Any]:
    """As `fuse` compared it: by its answers alone, as the hash says all about its weights."""
    return (lambda *args, **kwargs: candidate(*args, **kwargs)) if isinstance(candidate, nn.Module) else candidate


def _compared(what: str, recorded: Mapping[str, Any], now: Comparison, same_machine: bool) -> Iterator[Finding]:
    yield Finding("holds" if now.passed else "changed", f"the {what} is {now.summary().rstrip('.')}")
    moved = moved_figures(recorded, now.to_dict())
    if not moved:
        yield Finding("holds", f"every figure of the {what} is the same, to the last bit")
        return
    beyond = [one for one in moved if share(one[1], one[2]) > REPEATABLE]
    shown = beyond if same_machine and beyond else moved
    listed = "; ".join(f"{name}: {_short(old)} then, {_short(new)} now" for name, old, new in shown[:SHOWN])
    more = f"; and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    kind: Kind = "changed" if same_machine and beyond else "differs"
    yield Finding(kind, f"{len(shown)} figures of the {what} moved ({listed}{more})")


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text[:60]
