"""A model file of any format as something that runs, and example inputs for several of them at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from reparam.capture.examples import InputSpec, check_runs, example_inputs
from reparam.capture.formats import Format, identify
from reparam.equivalence import Elsewhere
from reparam.errors import InputError
from reparam.export import OnnxInput, OnnxSession, OnnxWeights, UnsupportedByRuntimeError, onnx_inputs
from reparam.inputs import Inputs
from reparam.source import Source

Opened: TypeAlias = "nn.Module | OnnxSession"


@dataclass(frozen=True)
class Named:
    """Stands for a model of which nothing is known but the names of its inputs."""

    input_names: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("it is there for the names")


def is_onnx(path: str) -> bool:
    """Whether the file holds an ONNX model."""
    return identify(Path(path).expanduser()) is Format.ONNX


def opened(source: Source, path: str, threads: int | None = None) -> Opened:
    """The model in a file; `source` says who builds it and what the file may hold.

    Raises:
        InputError, ExportError: it cannot be loaded.
    """
    if is_onnx(path):
        return OnnxSession(Path(path).expanduser(), threads=threads or torch.get_num_threads())
    return for_file(source, path).model()


def for_file(source: Source, path: str) -> Source:
    """`source` for another file: archives hold the whole model, so nothing is built or chosen for them."""
    whole = identify(Path(path).expanduser()) in (Format.EXPORT_ARCHIVE, Format.TORCHSCRIPT)
    return replace(source, path=path, arch=None, key=None) if whole else replace(source, path=path)


def example_for(source: Source, first: Opened, second: Opened) -> Inputs:
    """Example inputs on which `first` was seen to run.

    They come from `--input`; else from what a PyTorch model tells of itself; else from the sizes in the ONNX file.

    Raises:
        InputError: nothing tells the sizes, or the model does not run on them.
        ExportError: the ONNX file does not run on them.
    """
    if isinstance(first, nn.Module):
        try:
            inputs, specs = example_inputs(first, source.inputs, seed=source.seed)
        except InputError:
            if source.inputs or not isinstance(second, OnnxSession):
                raise
            inputs, specs = _of_onnx(second, (), source.seed, None)
        check_runs(first, inputs, specs, given=bool(source.inputs))
        return inputs
    inputs = _of_onnx(first, source.inputs, source.seed, second)[0]
    first.run_flat(in_call_order(first, inputs))
    return inputs


def elsewhere(session: OnnxSession, inputs: Inputs, seed: int) -> Elsewhere:
    """An ONNX file with all that a comparison can ask of it; `inputs` are an example."""
    content = OnnxWeights.of(session)
    plain = Elsewhere(session, content.dtype, content.weights, input_names=session.names)
    if content.dtype == torch.float64:
        return replace(plain, float64=session)
    try:
        exact = content.float64(in_call_order(session, inputs))
    except UnsupportedByRuntimeError as error:
        without = str(error)
    else:

        def rounded(others: Mapping[str, torch.Tensor]) -> Callable[..., Any] | None:
            return content.rounded64(others, seed)

        return replace(plain, float64=exact, rounded64=rounded)
    try:
        return replace(plain, disturbed=content.disturbed(seed), without=without)
    except UnsupportedByRuntimeError as error:
        raise InputError(
            f"{session.path} can be no reference: it cannot be run in float64 ({without}), and its noise cannot be "
            f"estimated ({error}); give the PyTorch model first"
        ) from error


def in_call_order(session: OnnxSession, inputs: Inputs) -> list[torch.Tensor]:
    """The tensors of a call in the order in which the session takes them."""
    if set(inputs.kwargs) == set(session.names) and not inputs.args:
        return [inputs.kwargs[name] for name in session.names]
    return list(inputs.tensors())


def _of_onnx(
    session: OnnxSession, texts: Sequence[str], seed: int, other: Opened | None
) -> tuple[Inputs, tuple[InputSpec, ...]]:
    """Inputs drawn for an ONNX file, in the sizes of the file or of `--input`."""
    facts = {fact.name: fact for fact in onnx_inputs(OnnxWeights.of(session).proto)}
    wanted = _sizes(session, facts, [InputSpec.parse(text) for text in texts])
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: _draw(facts[name], wanted[name], generator) for name in session.names}
    specs = tuple(InputSpec(tuple(tensor.shape), name, tensor.dtype) for name, tensor in drawn.items())
    if other is not None and session.takes_names and len(drawn) > 1 and _other_order(session.names, other):
        return Inputs((), drawn), specs
    return Inputs(tuple(drawn.values())), specs


def _sizes(
    session: OnnxSession, facts: Mapping[str, OnnxInput], specs: Sequence[InputSpec]
) -> dict[str, tuple[int, ...]]:
    """The sizes of each input, with those of the user where there are any; an open first axis is a batch of one.

    Raises:
        InputError: an axis is open, or a specification does not fit the file.
    """
    label, names = session.path.name, session.names
    given: dict[str, InputSpec] = {spec.name: spec for spec in specs if spec.name is not None}
    given.update(zip((name for name in names if name not in given), (s for s in specs if s.name is None), strict=False))
    if set(given) - set(names) or len(given) < len(specs):
        raise InputError(f"--input does not fit {label}, whose inputs are {', '.join(map(str, facts.values()))}")
    found = {}
    for name in names:
        shape = facts[name].shape
        spec = given.get(name)
        if spec is not None:
            fixed = all(isinstance(a, str) or a == b for a, b in zip(shape, spec.shape, strict=False))
            if len(spec.shape) != len(shape) or not fixed or spec.dtype not in (None, facts[name].dtype):
                raise InputError(f"--input {spec} does not fit the input {facts[name]} of {label}")
            found[name] = spec.shape
            continue
        sizes = (1, *shape[1:]) if shape and isinstance(shape[0], str) else shape
        if any(isinstance(side, str) for side in sizes):
            example = "x".join("8" if isinstance(side, str) else str(side) for side in sizes)
            raise InputError(
                f"the input {facts[name]} of {label} has open sizes; give them, as in --input {name}={example}"
            )
        found[name] = tuple(int(side) for side in sizes)
    return found


def _draw(fact: OnnxInput, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if fact.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device="cpu").to(fact.dtype)
    most = 2 if fact.dtype is torch.bool else fact.most
    return torch.randint(0, most, shape, generator=generator, device="cpu").to(fact.dtype)


def _other_order(names: Sequence[str], other: Opened) -> bool:
    """Whether another model has inputs of the same names in another order, so that they have to be given by name."""
    if isinstance(other, OnnxSession):
        theirs = list(other.names) if other.takes_names else []
    else:
        try:
            theirs = list(inspect.signature(other.forward).parameters)[: len(names)]
        except (TypeError, ValueError):
            return False
    return set(theirs) == set(names) and theirs != list(names)
