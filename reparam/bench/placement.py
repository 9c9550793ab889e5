"""Where and as what a variant runs: its device, dtype and memory layout, and what torch is told for the while."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from reparam.bench.backends import Variant
from reparam.errors import InputError
from reparam.inputs import Inputs
from reparam.quiet import without_copying_warnings

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Placement:
    """How modules are run; callables are run as they are.

    Attributes:
        device: where (copies, if they have to move); None is where each one's weights are.
        dtype: name of `DTYPES` that weights and inputs are converted to; "tf32" is float32 whose matrix products and
            convolutions a GPU may round to TF32, "float32" forbids that; None leaves all as it is.
        channels_last: whether images and weights of convolutions are stored with the channels last.
        cuda_graphs: whether calls are recorded once as a CUDA graph and replayed.
        threads: torch's threads within an operator; None leaves them.
    """

    device: torch.device | None = None
    dtype: str | None = None
    channels_last: bool = False
    cuda_graphs: bool = False
    threads: int | None = None

    @property
    def precision(self) -> str | None:
        """What float32 layers compute with on a GPU: "ieee", "tf32", or None for what torch is set to."""
        return {"tf32": "tf32", "float32": "ieee"}.get(self.dtype or "")

    def inputs(self, inputs: Inputs, device: torch.device) -> Inputs:
        """The inputs as the variants get them."""
        moved = inputs.map(lambda tensor: tensor.to(device))
        if self.dtype is not None:
            moved = moved.to(DTYPES[self.dtype])
        return moved.map(_channels_last) if self.channels_last else moved

    def module(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module as it is run; a copy if anything changes, because the caller's module stays as it is."""
        dtype = None if self.dtype is None else DTYPES[self.dtype]
        tensors = [*module.parameters(), *module.buffers()]
        fits = all(t.device == device and (dtype in (None, t.dtype) or not t.is_floating_point()) for t in tensors)
        if fits and not self.channels_last:
            return module
        with without_copying_warnings():
            placed = copy.deepcopy(module).to(device).eval()
            placed = placed if dtype is None else placed.to(dtype)
        # Modules of graphs hold constants that are no buffers; those follow where torch's `to` reaches them.
        if self.channels_last:
            placed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return placed


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def placement(
    device: torch.device | str | None,
    dtype: str | None,
    channels_last: bool,
    cuda_graphs: bool,
    threads: int | None,
) -> Placement:
    """The placement, checked.

    Raises:
        InputError: a device that cannot be used, an unknown dtype, or one that the device has not.
    """
    found = _device(device)
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not known; choose from {', '.join(DTYPES)}")
    return Placement(found, dtype, channels_last, cuda_graphs, threads)


def check_on(place: Placement, device: torch.device) -> None:
    """Whether the device can do what is asked.

    Raises:
        InputError: it cannot.
    """
    if place.cuda_graphs and device.type != "cuda":
        raise InputError(f"CUDA graphs need a CUDA device, and the model is on {device}; choose device 'cuda'")
    if place.dtype == "tf32":
        if device.type != "cuda":
            raise InputError(f"TF32 is a format of NVIDIA's GPUs, and the model is on {device}; choose device 'cuda'")
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise InputError(f"{torch.cuda.get_device_name(device)} has no TF32; choose float32")


def _device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    # An index makes devices comparable: `cuda` and `cuda:0` are the same one.
    return torch.empty(1, device=found).device


def device_of(variant: Variant, inputs: Inputs, device: torch.device | None) -> torch.device:
    """Where a variant runs: `device` if given, else where its weights are, else where the inputs are."""
    if device is not None and isinstance(variant, nn.Module):
        return device
    if isinstance(variant, nn.Module):
        for tensor in [*variant.parameters(), *variant.buffers()]:
            return tensor.device
    return next(inputs.tensors()).device


@contextmanager
def in_effect(place: Placement) -> Iterator[None]:
    """Threads and TF32 as `place` says while active, then as they were."""
    with ExitStack() as stack:
        stack.enter_context(_threads(place.threads))
        stack.enter_context(_precision(place.precision))
        yield


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _precision(precision: str | None) -> Iterator[None]:
    if precision is None:
        yield
        return
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has two ways to say this; the older one works in all versions
        before = matmul.allow_tf32, convolution.allow_tf32
        matmul.allow_tf32 = convolution.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            matmul.allow_tf32, convolution.allow_tf32 = before


def precision_in_use() -> str:
    """What float32 layers compute with on a GPU as torch is set now, in words."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if matmul and convolution:
        return "TF32"
    return "TF32 in convolutions only" if convolution else "TF32 in matrix products only" if matmul else "no TF32"


@contextmanager
def in_eval_mode(variants: Iterable[Variant]) -> Iterator[None]:
    """All modules in eval mode while active, then each submodule in the mode it was in."""
    modules = [part for v in variants if isinstance(v, nn.Module) for part in v.modules()]
    modes = [(part, part.training) for part in modules]
    try:
        for part in modules:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
