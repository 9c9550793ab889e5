"""A module becomes an ONNX file.

The exported program is traced with its batch and size axes open, translated, simplified, and *run*: onnxruntime must
give the module's own answers at the example's size and at other sizes that the file says it accepts. An axis for which
that fails is closed again and the value says so. The strict comparison with the original is `verify`'s work; the
check here catches a size that was baked in, a wrong output, a translation error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reparam.errors import ExportError
from reparam.export.check import Checked, check_file, check_weights, simplified
from reparam.export.files import publish, staging
from reparam.export.program import argument_names, path_names, private_copy
from reparam.export.proto import Plan, build, save
from reparam.export.shapes import Freedom, Probe, explore, ladder
from reparam.inputs import ExampleInputs, Inputs
from reparam.quiet import quiet, reason

# Above this many bytes of weights a protobuf message cannot hold the model, and they go to a file beside it.
EXTERNAL_DATA_BYTES = 2_000_000_000


@dataclass(frozen=True)
class OnnxFile:
    """What was written.

    Attributes:
        path: the file; weights beyond 2 GB are beside it in `<path>.data`.
        opset: version of the default operator set.
        nodes: number of nodes by operator type.
        bytes: size on disk, external data included.
        inputs, outputs: names, in order.
        dynamic_axes: for each input, the axes that may vary and the name of each.
        simplified: whether the file is onnxsim's simplification of the exporter's graph.
        checked: whether onnxruntime ran the file and agreed with the module at every size tried.
        notes: sentences on what was asked for and not achieved, and why.
    """

    path: Path
    opset: int
    nodes: Mapping[str, int]
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    simplified: bool
    checked: bool
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The value as plain JSON types."""
        plain = asdict(self)
        plain["path"] = str(self.path)
        plain["dynamic_axes"] = {n: {str(a): s for a, s in axes.items()} for n, axes in self.dynamic_axes.items()}
        return {**plain, "inputs": list(self.inputs), "outputs": list(self.outputs), "notes": list(self.notes)}


def export_onnx(
    module: nn.Module,
    example_inputs: ExampleInputs,
    path: str | Path,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = True,
    simplify: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
) -> OnnxFile:
    """Writes `module` in eval mode as an ONNX file.

    Args:
        module: any module that torch.export can capture; it is copied, never changed.
        example_inputs: tensor, tuple of arguments or dict of keyword arguments. Arguments that are no tensors
            (flags, None) are fixed in the file.
        path: file to write, usually `*.onnx`; replaced in one step.
        opset: version of the default operator set; None takes the exporter's own.
        dynamic_batch: leave the batch axis (axis 0) open where the model allows it.
        dynamic_size: leave axes 2 and up of the inputs open where the model allows it.
        simplify: simplify with onnxsim; kept only if the result is smaller, valid and agrees.
        input_names, output_names: names of the file's inputs and outputs; None takes the names of `forward`'s
            parameters and the keys of its result.
        metadata: text for the file's `metadata_props`, beside the provenance that is always there.
        external_data_bytes: weights beyond this many bytes go to `<path>.data`.

    Returns:
        What was written, and what of the request could not be had.

    Raises:
        InputError: example_inputs is no example.
        ExportError: the module cannot be exported, the file disagrees with it, or it cannot be written. The target is
            then unchanged.
    """
    inputs, target = Inputs.of(example_inputs), Path(path)
    private = private_copy(module)
    found_inputs = [name for name, leaf in path_names(argument_names(private, inputs)) if _is_tensor(leaf)]
    allowed, answers = _explore(private, inputs, dynamic_batch, dynamic_size)
    taken = _names(input_names, found_inputs, "input")
    plan = Plan(
        private,
        inputs,
        taken,
        _names(output_names, _output_names(private, inputs), "output", taken),
        opset,
        dict(metadata or {}),
    )
    notes = []
    if dynamic_batch and not allowed.batch:
        notes.append("the batch axis is fixed: the model does not run with another batch length than the example's")
    if dynamic_size and not allowed.size and any(t.ndim > 2 for t in inputs.tensors()):
        notes.append("the size axes are fixed: the model does not run with other sizes than the example's")
    with staging(target) as folder:
        staged = folder / target.name
        written, more = _most_general(plan, staged, allowed, answers, simplify, external_data_bytes)
        publish(staged, target)
    size = target.stat().st_size + written.data_bytes
    return OnnxFile(
        path=target,
        opset=written.opset,
        nodes=written.nodes,
        bytes=size,
        inputs=plan.input_names,
        outputs=plan.output_names,
        dynamic_axes=written.dynamic_axes,
        simplified=written.simplified,
        checked=written.checked,
        notes=(*notes, *more, *written.notes),
    )


@dataclass(frozen=True)
class _Written:
    """The staged file's facts."""

    opset: int
    nodes: Mapping[str, int]
    data_bytes: int
    dynamic_axes: Mapping[str, Mapping[int, str]]
    simplified: bool
    checked: bool
    notes: tuple[str, ...]


def _most_general(
    plan: Plan, staged: Path, allowed: Freedom, answers: tuple[Probe, ...], simplify: bool, threshold: int
) -> tuple[_Written, list[str]]:
    """The file with the most axes open that can be made and agrees with the module, and why the others fell."""
    notes: list[str] = []
    steps = ladder(allowed)
    for freedom in steps:
        try:
            return _write(plan, staged, freedom, answers, simplify, threshold), notes
        except ExportError as error:
            # An operator without translation fails in the same way at every step.
            if freedom == steps[-1] or getattr(error, "hopeless", False):
                raise
            notes.append(f"a file with {freedom} open was not possible: {error}")
    raise AssertionError("the ladder is never empty")


def _write(
    plan: Plan, staged: Path, freedom: Freedom, answers: tuple[Probe, ...], simplify: bool, threshold: int
) -> _Written:
    """Builds, saves, checks and simplifies the file for one freedom."""
    import onnx

    built = build(plan, freedom)
    external = save(built.proto, staged, threshold)
    relevant = _relevant(answers, built.open_batch, built.open_size)
    weights = {**dict(plan.module.named_parameters()), **dict(plan.module.named_buffers())}
    check_weights(onnx.load(str(staged)), weights)
    checked: Checked = check_file(staged, plan.module, relevant)
    kept = False
    notes = [*built.notes, *checked.notes]
    if freedom.batch and not built.open_batch:
        notes.append("the batch axis is fixed: the model's code makes a constant of its length")
    if freedom.size and not built.open_size:
        notes.append("the size axes are fixed: the model's code makes constants of their lengths")
    model = built.proto
    if simplify and external:
        notes.append("not simplified: the weights exceed what onnxsim can hold")
    elif simplify:
        smaller, note = simplified(staged, plan.module, relevant, weights)
        if note:
            notes.append(note)
        if smaller is not None:
            model, kept = smaller, True
    data = staged.with_name(staged.name + ".data")
    return _Written(
        opset=next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        nodes=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        data_bytes=data.stat().st_size if data.exists() else 0,
        dynamic_axes=built.dynamic_axes,
        simplified=kept,
        checked=checked.ran,
        notes=tuple(notes),
    )


def _relevant(answers: tuple[Probe, ...], batch: bool, size: bool) -> tuple[Probe, ...]:
    """The example and those probes whose sizes the file says it accepts."""
    example = [t.shape for t in answers[0].inputs.tensors()]

    def accepted(probe: Probe) -> bool:
        for old, new in zip(example, (t.shape for t in probe.inputs.tensors()), strict=True):
            if (old[:1] != new[:1] and not batch) or (old[2:] != new[2:] and not size):
                return False
        return True

    return tuple(probe for probe in answers if accepted(probe))


def _explore(module: nn.Module, inputs: Inputs, batch: bool, size: bool) -> tuple[Freedom, tuple[Probe, ...]]:
    """`explore` with the errors a user can cause."""
    try:
        with quiet():
            allowed, answers = explore(module, inputs, batch, size)
    except Exception as error:
        raise ExportError(f"{type(module).__name__} fails on the example inputs: {reason(error)}") from error
    if not answers[0].outputs:
        raise ExportError(f"{type(module).__name__} returns no tensor; there is nothing to export")
    return allowed, answers


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _output_names(module: nn.Module, inputs: Inputs) -> list[str]:
    """Keys of a dict, `output` for one tensor, `output_0`, `output_1`, ... for a sequence."""
    with quiet():
        result = inputs.call(module)
    top = "" if isinstance(result, Mapping) else "output"
    return [name for name, leaf in path_names(result, top) if _is_tensor(leaf)]


def _names(chosen: Sequence[str] | None, found: Sequence[str], kind: str, taken: Sequence[str] = ()) -> tuple[str, ...]:
    """The names to use: what the user chose, checked, or what was found, made different from each other and `taken`."""
    if chosen is None:
        names: list[str] = []
        for name in found:
            while name in names or name in taken:
                name += "_out"
            names.append(name)
        return tuple(names)
    if len(chosen) != len(found) or len(set(chosen)) != len(chosen):
        raise ExportError(
            f"{kind}_names has {len(chosen)} name(s), {len(set(chosen))} of them different; "
            f"the model has {len(found)} {kind}(s), each needs its own name"
        )
    both = [name for name in chosen if name in taken]
    if both:
        raise ExportError(f"the name {both[0]!r} is used both for an input and for an output; choose another")
    return tuple(chosen)
