"""Ways to run a module. One row per backend; a variant that is no module is run as it is.

The rows here need torch alone. What runs an exported file (onnxruntime, OpenVINO) is added by whoever may import both
this room and the exporters: `benchmark(..., more=...)`.
"""

from __future__ import annotations

import importlib.util
import shutil
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from reparam.errors import InputError
from reparam.inputs import Inputs
from reparam.quiet import quiet

Variant: TypeAlias = "nn.Module | Callable[..., Any]"
ALL = "all"
# Compiled variants and cells of a grid may share the code of one `forward`; beyond this many, compiling raises.
MOST_COMPILATIONS = 256


@dataclass(frozen=True)
class Job:
    """What a backend is given.

    Attributes:
        module: the variant on its device, in its dtype and in eval mode.
        inputs: example inputs, likewise.
        device: where it runs.
        threads: threads within an operator; None leaves them.
        precision: what float32 layers compute with on the GPU: "ieee", "tf32" or None, which leaves it.
    """

    module: nn.Module
    inputs: Inputs
    device: torch.device
    threads: int | None = None
    precision: str | None = None


def always(device: torch.device) -> str:
    """There is nothing that could be missing."""
    return ""


@dataclass(frozen=True)
class Backend:
    """One way to run a module.

    Attributes:
        build: makes the callable, which has the module's signature.
        missing: why it cannot be used on a device, as a sentence with what to do; empty if it can.
        torch: whether it calls torch, so that CUDA graphs can record it and torch's allocator sees its memory.
            Others return when their result is on the host, so that the wall clock is right.
        folds: what it does by itself that fusing does too, as a clause; empty if it runs what it is given.
    """

    build: Callable[[Job], Callable[..., Any]]
    missing: Callable[[torch.device], str] = always
    torch: bool = True
    folds: str = ""


def eager(job: Job) -> Callable[..., Any]:
    """The module itself, operator by operator."""
    return job.module


def compiled(job: Job) -> Callable[..., Any]:
    """`torch.compile` at its default settings; what cannot be compiled raises, where torch would fall back silently."""
    module = job.module

    def run(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    # A code object of its own: compiled code is looked up by it, and variants of one class would share a list.
    own = types.FunctionType(run.__code__.replace(co_name="variant"), run.__globals__, "variant", None, run.__closure__)
    with quiet():  # importing the compiler warns of deprecations of its own
        from torch._dynamo import config

        call = torch.compile(own, dynamic=False)
        limits = config.patch(recompile_limit=MOST_COMPILATIONS, fail_on_recompile_limit_hit=True)
        with limits, torch.inference_mode():  # as it will be called: another mode would compile again
            job.inputs.call(call)
    return call


def no_compiler(device: torch.device) -> str:
    """What `torch.compile` lacks."""
    try:
        with quiet():
            torch._dynamo.eval_frame.check_if_dynamo_supported()
    except Exception as error:
        return f"torch.compile cannot be used: {str(error).splitlines()[0]}"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU; install it with `pip install triton`"
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        return "torch.compile needs a C++ compiler; install g++ or clang"
    return ""


def exported(job: Job) -> Callable[..., Any]:
    """The module of the exported program, as `torch.export.load(path).module()` gives it."""
    with quiet(), torch.no_grad():
        program = torch.export.export(job.module, job.inputs.args, dict(job.inputs.kwargs))
    return program.module()


BACKENDS: Mapping[str, Backend] = {
    "eager": Backend(eager),
    "compile": Backend(
        compiled,
        no_compiler,
        folds="torch.compile merges BatchNorm and other elementwise operations into one kernel with their neighbours",
    ),
    "export": Backend(exported),
}


def chosen(
    backends: Iterable[str], known: Mapping[str, Backend], device: torch.device
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The backends to use, and of those left out why.

    `all` is every backend that can be used on `device`; what cannot is left out with its reason. A backend that is
    named must be there.

    Raises:
        InputError: none, one that is not known, or one that is named and cannot be used.
    """
    names = tuple(dict.fromkeys([backends] if isinstance(backends, str) else backends))
    if not names:
        raise InputError(f"no backend is given; choose from {', '.join((*known, ALL))}")
    for name in names:
        if name not in known and name != ALL:
            raise InputError(f"there is no backend {name!r}; choose from {', '.join((*known, ALL))}")
    reasons = {name: known[name].missing(device) for name in (known if ALL in names else names)}
    for name in names:
        if reasons.get(name):
            raise InputError(f"backend {name!r} is not here: {reasons[name]}")
    here = tuple(name for name, reason in reasons.items() if not reason)
    return here, {name: reason for name, reason in reasons.items() if reason}
