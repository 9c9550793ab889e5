"""Names of a file's inputs and outputs: of `forward`'s parameters and the keys of its result, or chosen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from reparam.errors import ExportError
from reparam.export.program import argument_names, path_names
from reparam.inputs import Inputs
from reparam.quiet import quiet


def input_names(module: nn.Module, inputs: Inputs) -> list[str]:
    """The names of the tensors among the arguments, in the order of `forward`'s parameters."""
    return [name for name, leaf in path_names(argument_names(module, inputs)) if isinstance(leaf, torch.Tensor)]


def output_names(module: nn.Module, inputs: Inputs) -> list[str]:
    """Keys of a dict, `output` for one tensor, `output_0`, `output_1`, ... for a sequence."""
    with quiet():
        result = inputs.call(module)
    top = "" if isinstance(result, Mapping) else "output"
    return [name for name, leaf in path_names(result, top) if isinstance(leaf, torch.Tensor)]


def chosen_names(
    chosen: Sequence[str] | None, found: Sequence[str], kind: str, taken: Sequence[str] = ()
) -> tuple[str, ...]:
    """The names to use: what the user chose, checked, or what was found, made different from each other and `taken`.

    Raises:
        ExportError: the chosen names are too few or too many, not different, or in use.
    """
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
    if not all(chosen):
        raise ExportError(f"{kind}_names has an empty name; each {kind} needs one")
    return tuple(chosen)
