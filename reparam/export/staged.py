"""The file in its temporary place: made for the most axes open that are possible, checked, simplified, compared.

What is staged has passed everything that was asked of it, so that moving it into place is all that is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reparam.data import Data
from reparam.equivalence import Comparison, verify
from reparam.errors import ExportError, InputError, NotEquivalentError
from reparam.export.check import check_file, check_weights
from reparam.export.leftovers import Leftover, leftovers
from reparam.export.proto import Built, Plan, build, hopeless, save
from reparam.export.runtime import OnnxSession, UnsupportedByRuntimeError
from reparam.export.shapes import Freedom, Probe, ladder, tensor_leaves
from reparam.export.simplify import NotSimplifiedError, simplified

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Task:
    """What is to be staged, and how it is checked.

    Attributes:
        plan: what is built.
        answers: the module's own answers at the sizes that it runs at, the example's first.
        simplify: whether to try onnxsim.
        threshold: bytes of weights beyond which they go to a file of their own.
        original: what the file must compute; its rounding noise is what is allowed, unless `deployed` is given.
        deployed, exact: the original in float16, and the module before it was, where the file is in float16 and they
            are not; else None.
        given: whether the caller named the original, and did not mean the module itself.
        level: how thoroughly the two are compared; "off" leaves that out.
        seed: of the inputs that are drawn for it.
        data: inputs of the user's that are compared besides; as for `reparam.verify`.
    """

    plan: Plan
    answers: tuple[Probe, ...]
    simplify: bool
    threshold: int
    original: nn.Module
    deployed: nn.Module | None = None
    exact: nn.Module | None = None
    given: bool = False
    level: str = "standard"
    seed: int = 0
    data: Data | None = None


@dataclass(frozen=True)
class Staged:
    """The staged file's facts; as in `OnnxFile`."""

    opset: int
    nodes: Mapping[str, int]
    data_bytes: int
    dynamic_axes: Mapping[str, Mapping[int, str]]
    shapes: Mapping[str, tuple[int | str, ...]]
    dtypes: Mapping[str, str]
    leftovers: tuple[Leftover, ...]
    simplified: bool
    checked: bool
    comparison: Comparison | None
    notes: tuple[str, ...]


def stage(task: Task, staged: Path, allowed: Freedom) -> Staged:
    """The file with the most axes open that can be made and agrees with the module; notes say why others fell.

    Raises:
        ExportError: no file can be made, or it disagrees with the module.
        NotEquivalentError: it does not agree with the original.
    """
    notes: list[str] = []
    steps = ladder(allowed)
    for freedom in steps:
        try:
            made = _stage(task, staged, freedom)
            return replace(made, notes=(*notes, *made.notes))
        except (ExportError, NotEquivalentError) as error:
            # An operator without translation fails in the same way at every step.
            if freedom == steps[-1] or getattr(error, "hopeless", False):
                raise
            notes.append(f"a file with {freedom} open was not possible: {error}")
    raise AssertionError("the ladder is never empty")


def _stage(task: Task, staged: Path, freedom: Freedom) -> Staged:
    """Builds, simplifies, saves and checks the file for one freedom."""
    built = build(task.plan, freedom)
    notes = list(built.notes)
    if freedom.batch and not built.open_batch:
        notes.append("the batch axis is fixed: the model's code makes a constant of its length")
    if freedom.size and not built.open_size:
        notes.append("the size axes are fixed: the model's code makes constants of their lengths")
    plain = _checked(task, built, built.proto, staged)
    if task.simplify:
        try:
            smaller = simplified(built.proto, staged.parent)
            if smaller is not None:
                # Its own checks first: whatever is wrong with it, the plain file stands.
                found = _simplified(task, built, smaller, staged)
                return replace(found, notes=(*notes, *found.notes))
        except NotSimplifiedError as error:
            notes.append(f"not simplified: {error}")
    del built  # with a copy of all weights
    compared, more = _compared(task, staged)
    return replace(plain, comparison=compared, notes=(*notes, *plain.notes, *more))


def _simplified(task: Task, built: Built, model: onnx.ModelProto, staged: Path) -> Staged:
    """The simplified model in the plain one's place, if it passes all that the plain one has to pass.

    Raises:
        NotSimplifiedError: it does not.
    """
    place = staged.parent / "simplified"
    place.mkdir(exist_ok=True)
    other = place / staged.name
    try:
        found = _checked(task, built, model, other)
        compared, more = _compared(task, other)
    except (ExportError, NotEquivalentError) as error:
        raise NotSimplifiedError(f"onnxsim's result was dropped, {error}") from error
    staged.with_name(staged.name + ".data").unlink(missing_ok=True)
    for written in place.iterdir():
        written.replace(staged.with_name(written.name))
    return replace(found, simplified=True, comparison=compared, notes=(*found.notes, *more))


def _checked(task: Task, built: Built, model: onnx.ModelProto, path: Path) -> Staged:
    """Saves a model, and checks that it is valid, has the module's weights, and answers as the module does."""
    facts = _facts(model, built)
    save(model, path, task.threshold)
    module = task.plan.module
    weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    check_weights(path, {name.removeprefix(task.plan.prefix): w for name, w in weights.items()})
    relevant = _relevant(task.answers, built.open_batch, built.open_size)
    checked = check_file(path, task.exact or module, relevant, None if task.exact is None else torch.float16)
    data = path.with_name(path.name + ".data")
    size = data.stat().st_size if data.exists() else 0
    return replace(facts, data_bytes=size, checked=checked.ran, notes=checked.notes)


def _facts(model: onnx.ModelProto, built: Built) -> Staged:
    values = [*model.graph.input, *model.graph.output]
    kinds = {v.name: v.type.tensor_type for v in values}
    return Staged(
        opset=next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx")),
        nodes=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        data_bytes=0,
        dynamic_axes=built.dynamic_axes,
        shapes={name: tuple(d.dim_param or d.dim_value for d in kind.shape.dim) for name, kind in kinds.items()},
        dtypes={name: _dtype_name(kind.elem_type) for name, kind in kinds.items()},
        leftovers=leftovers(model),
        simplified=False,
        checked=False,
        comparison=None,
        notes=(),
    )


def _dtype_name(number: int) -> str:
    """The name that torch and numpy have for an element type of ONNX."""
    from onnx import TensorProto

    name = str(TensorProto.DataType.Name(number)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def _relevant(answers: tuple[Probe, ...], batch: bool, size: bool) -> tuple[Probe, ...]:
    """The example and those probes whose sizes the file says it accepts."""
    example = [t.shape for t in answers[0].inputs.tensors()]

    def accepted(probe: Probe) -> bool:
        for old, new in zip(example, (t.shape for t in probe.inputs.tensors()), strict=True):
            if (old[:1] != new[:1] and not batch) or (old[2:] != new[2:] and not size):
                return False
        return True

    return tuple(probe for probe in answers if accepted(probe))


class _Tensors(nn.Module):
    """Returns the tensors of what a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        return list(tensor_leaves(self.module(*args, **kwargs)))


def _compared(task: Task, path: Path) -> tuple[Comparison | None, tuple[str, ...]]:
    """The file in onnxruntime against the original, at the sizes that the file leaves open.

    Raises:
        NotEquivalentError: they do not agree.
        InputError: the original cannot be compared with anything.
    """
    if task.level == "off":
        return None, ()
    try:
        session = OnnxSession(path, threads=torch.get_num_threads())
    except UnsupportedByRuntimeError as error:
        if task.given:
            raise hopeless(
                f"the file cannot be compared with the original: {error}; turn verification off to write it unchecked"
            ) from error
        return None, ()  # the notes of the check say so already
    inputs, original, deployed = task.plan.inputs, task.original, task.deployed
    if session.returns_a_list:  # a file holds tensors only: what the model returns besides them is not compared
        original, deployed = _Tensors(original), deployed and _Tensors(deployed)
    try:
        comparison = verify(
            *(original, session, inputs),
            level=task.level,
            seed=task.seed,
            vary_shapes=session.takes_other_sizes(list(inputs.tensors())),
            check_structure=False,
            deployed=deployed,
            data=task.data,
        )
    except InputError as error:
        if task.given:
            raise
        return None, (f"compared with the module itself at {len(task.answers)} sizes, not with float64: {error}",)
    if not comparison.passed:
        raise NotEquivalentError(
            f"the ONNX file {comparison.agreement} the original model: {comparison.summary().rstrip('.')}",
            comparison=comparison,
        )
    return comparison, ()
