"""Example inputs from `--input 1x3x224x224`, or from what the model tells of itself; and whether it runs on them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from reparam.capture.archives import example_of
from reparam.capture.imports import first_line
from reparam.capture.load import default_input_size
from reparam.errors import InputError, OtherInputError
from reparam.inputs import Inputs

_SPEC = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip
_MOST_ELEMENTS = 2**33


@dataclass(frozen=True)
class InputSpec:
    """One input as the command line names it.

    Attributes:
        shape: its sizes.
        name: parameter of `forward` it goes to; None for the next positional one.
        dtype: None for the model's own floating-point dtype.
    """

    shape: tuple[int, ...]
    name: str | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """`1x3x224x224`, `1x77:int64`, `mask=1x77:bool`.

        Raises:
            InputError: the text is not of that form.
        """
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise InputError(f"--input {text} is in no known form; write 1x3x224x224, 1x77:int64 or name=1x77:int64")
        shape = tuple(int(side) for side in match["shape"].split("x"))
        elements = 1
        for side in shape:
            elements *= side
        if not 0 < elements <= _MOST_ELEMENTS:
            problem = "has no element" if not elements else f"has {elements:,} elements"
            raise InputError(f"--input {text} {problem}; give the sizes of one example")
        if match["dtype"] is not None and match["dtype"] not in _DTYPES:
            raise InputError(f"--input {text}: no dtype is called {match['dtype']}; choose among {', '.join(_DTYPES)}")
        return cls(shape, match["name"], _DTYPES.get(match["dtype"] or ""))

    def __str__(self) -> str:
        text = "x".join(str(side) for side in self.shape)
        text = f"{self.name}={text}" if self.name else text
        return f"{text}:{str(self.dtype).removeprefix('torch.')}" if self.dtype else text


def example_inputs(
    model: nn.Module, specs: Sequence[str] = (), *, seed: int = 0
) -> tuple[Inputs, tuple[InputSpec, ...]]:
    """Draws inputs for `model`: floats from N(0, 1) in the model's dtype, integers that every embedding in it accepts.

    Args:
        specs: as on the command line; none takes the inputs that the model was exported with, or draws them in the size
            that it tells of itself.

    Returns:
        The inputs, and the specification they were drawn from.

    Raises:
        InputError: a specification is malformed, or none is given and the model does not tell.
    """
    parsed = tuple(InputSpec.parse(spec) for spec in specs)
    names = [spec.name for spec in parsed if spec.name]
    if len(set(names)) != len(names):
        raise InputError("--input gives one name twice; give each input its own")
    if not parsed:
        exported_with = example_of(model)
        if exported_with is not None:
            return _adapted(exported_with, model)
        shape = default_input_size(model)
        if shape is None:
            raise InputError(
                f"the input size of {_name_of(model)} is not known; give it with --input, as in {_hint(model)}"
            )
        parsed = (InputSpec(shape),)
    generator = torch.Generator().manual_seed(seed)
    place = next(model.parameters(), None)
    device = place.device if place is not None else torch.device("cpu")
    tensors = [(spec.name, _draw(spec, model, generator).to(device)) for spec in parsed]
    args = tuple(tensor for name, tensor in tensors if name is None)
    return Inputs(args, {name: tensor for name, tensor in tensors if name is not None}), parsed


def _hint(model: nn.Module) -> str:
    """A specification of the kind that the model takes, as far as its first layer tells."""
    weighted = (module for module in model.modules() if next(module.parameters(recurse=False), None) is not None)
    return "1x77:int64" if isinstance(next(weighted, None), (nn.Embedding, nn.EmbeddingBag)) else "1x3x224x224"


def _name_of(model: nn.Module) -> str:
    return str(model.original_name) if isinstance(model, torch.jit.ScriptModule) else type(model).__name__


def _adapted(example: Inputs, model: nn.Module) -> tuple[Inputs, tuple[InputSpec, ...]]:
    """Inputs from an archive, in the dtype that the model has by now."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    inputs = example if dtype is None else example.to(dtype)
    return inputs, tuple(InputSpec(tuple(tensor.shape), dtype=tensor.dtype) for tensor in inputs.tensors())


def _draw(spec: InputSpec, model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    dtype = spec.dtype or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype.is_floating_point:
        return torch.randn(spec.shape, generator=generator, device="cpu").to(dtype)
    embeddings = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    most = 2 if dtype is torch.bool or not embeddings else min(*embeddings, 100)
    return torch.randint(0, most, spec.shape, generator=generator, device="cpu").to(dtype)


def check_runs(model: nn.Module, inputs: Inputs, specs: Sequence[InputSpec], *, given: bool = True) -> None:
    """Runs `model` once on `inputs`.

    Args:
        given: whether the user gave the inputs' sizes, or they were taken from the model.

    Raises:
        InputError: it fails; the sentence names the shape and the innermost module that was running.
    """
    _require_callable(model, inputs)
    running: list[str] = []
    handles = []
    for name, module in () if isinstance(model, torch.jit.ScriptModule) else model.named_modules():
        label = f"{name} ({type(module).__name__})" if name else type(module).__name__
        handles.append(module.register_forward_pre_hook(partial(_enter, running, label)))
        handles.append(module.register_forward_hook(partial(_leave, running)))
    try:
        inputs.call(model)
    except OtherInputError as error:
        raise InputError(
            f"{_name_of(model)} does not take the input {' and '.join(map(str, specs))}: {error}"
        ) from None
    except Exception as error:  # the user's code
        where = f" in {running[-1]}" if running else ""
        shapes = " and ".join(str(spec) for spec in specs)
        origin = "" if given else ", which is only a guess from its first layer"
        raise InputError(
            f"the model fails on the input {shapes}{origin}{where}: {type(error).__name__}: {first_line(error)}; "
            "give the shape it expects with --input"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _require_callable(model: nn.Module, inputs: Inputs) -> None:
    """Whether there is a forward that takes so many inputs, of these names.

    Raises:
        InputError: there is not; the sentence says what it takes.
    """
    if isinstance(model, torch.jit.ScriptModule):
        return
    name = type(model).__name__
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        raise InputError(f"{name} has no forward; pass the module that calls what is in it")
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise InputError(
            f"{name}.forward takes {signature} and not the inputs given ({error}); name them with --input NAME=SIZE, "
            "or leave some out"
        ) from None


def _enter(running: list[str], label: str, *_: object) -> None:
    running.append(label)


def _leave(running: list[str], *_: object) -> None:
    running.pop()
