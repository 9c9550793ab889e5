"""Where a model and its example inputs come from: a file, who builds it, and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from reparam.capture.examples import InputSpec, check_runs, example_inputs
from reparam.capture.load import load
from reparam.errors import InputError
from reparam.inputs import Inputs

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
_ENDINGS = (
    *(".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".tar", ".pkl", ".model"),
    *(".pt2", ".ts", ".jit", ".torchscript"),
)


def without_ending(name: str) -> str:
    """The name of a model file without the endings that say its format: `net.pth.tar` is `net`."""
    for ending in _ENDINGS:
        name = name.removesuffix(ending) or name
    return name


@dataclass(frozen=True)
class Source:
    """A model file, and what is needed to run the model in it.

    Attributes:
        path: the model file.
        arch, arch_args, key, allow_classes, allow_pickle: as for `reparam.load`.
        inputs: sizes of the example inputs (`1x3x224x224`, `ids=1x77:int64`); empty asks the model.
        dtype: convert the model to this dtype first; None keeps its own.
        seed: of the drawn inputs, of verification and of the order of measurements.
    """

    path: str
    arch: str | None = None
    arch_args: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    allow_classes: tuple[str, ...] = ()
    allow_pickle: bool = False
    inputs: tuple[str, ...] = ()
    dtype: str | None = None
    seed: int = 0

    def model(self) -> nn.Module:
        """Loads the model.

        Raises:
            InputError: the file cannot be loaded, or the dtype is not known.
        """
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f"--dtype {self.dtype} is not known; choose among {', '.join(DTYPES)}")
        model = load(
            self.path,
            self.arch,
            arch_args=self.arch_args,
            key=self.key,
            allow_classes=self.allow_classes,
            allow_pickle=self.allow_pickle,
        )
        return model if self.dtype is None else model.to(DTYPES[self.dtype])

    def load(self) -> tuple[nn.Module, Inputs, tuple[InputSpec, ...]]:
        """The model, example inputs on which it was seen to run, and their specification.

        Raises:
            InputError: the model cannot be loaded, or does not run.
        """
        model = self.model()
        inputs, specs = example_inputs(model, self.inputs, seed=self.seed)
        check_runs(model, inputs, specs, given=bool(self.inputs))
        return model, inputs, specs
