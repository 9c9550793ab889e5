"""TorchScript archives: loaded after a look at their code, and turned back into a graph.

The code in such an archive is no Python: torch compiles it for its own interpreter, which knows torch's operators
and nothing else. Two of those open files, and `__setstate__` runs while the file is loaded; archives with either are
refused.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from reparam.capture.agreement import same_answers
from reparam.capture.archives import opened
from reparam.capture.exported import as_plain, graph_module, of_two
from reparam.errors import CaptureError, InputError
from reparam.inputs import Inputs
from reparam.quiet import quiet, reason

_ENTRIES = re.compile(
    r"code/.*\.py(\.debug_pkl)?|(data|constants|traced_inputs)(\.pkl|/[\w.\-]+)|byteorder|version|\.format_version|"
    r"\.data/(version|serialization_id)|extra/.*"
)
_FORBIDDEN = re.compile(r"\b(save|from_file|__setstate__|classes)\b")
_NAMESPACE = re.compile(r"\bops\s*\.\s*(\w+)")
_NAMESPACES = {"aten", "prim", "prims", "quantized", "torchvision"}
_REMEDY = "which reparam does not load unasked; if you trust the source, pass --allow-pickle"


def load_script(path: Path, *, trusted: bool = False) -> torch.jit.ScriptModule:
    """The compiled model in the archive at `path`.

    Args:
        trusted: leave out the look at its code.

    Raises:
        InputError: the file holds what reparam does not load unasked, or cannot be read.
    """
    if not trusted:
        _audit(path)
        _require_survivors(path)
    try:
        with quiet():
            loaded = torch.jit.load(path, map_location="cpu")
    except Exception as error:  # a damaged archive may raise nearly anything
        raise InputError(
            f"{path} cannot be read as TorchScript ({_telling(error)}); save it again with torch {torch.__version__}"
        ) from error
    if not hasattr(loaded, "forward"):
        raise InputError(f"{path} holds a TorchScript module without a forward method; save the model itself")
    return loaded  # type: ignore[no-any-return]


def graph_of_script(model: torch.jit.ScriptModule, inputs: Inputs) -> fx.GraphModule:
    """The compiled model in eval mode as a graph module, by torch's own converter; both answer the example alike.

    The module stands in train mode if `model` does, though nothing in it asks for that.

    Raises:
        CaptureError: it cannot be converted, or the converted model answers otherwise.
    """
    try:
        from torch._export.converter import TS2EPConverter
    except ImportError:
        raise CaptureError(_no_graph(f"torch {torch.__version__} has no converter for TorchScript")) from None
    if inputs.kwargs:
        raise CaptureError(_no_graph("torch converts TorchScript with positional inputs only (give them no names)"))
    why = "what it makes of it answers otherwise"
    twin = _at_inference(model)
    for example in (of_two(inputs), inputs):
        try:
            with quiet(), torch.no_grad():
                module = graph_module(TS2EPConverter(copy.deepcopy(twin), example.clone().args).convert())
                _return_as(module, inputs.call(copy.deepcopy(twin)))
                _make_parameters(module, twin)
                converted = as_plain(module)
                if same_answers(twin, converted, inputs) and same_answers(twin, converted, example):
                    converted.training = getattr(model, "training", False)  # so that it is told
                    return converted
        except Exception as error:
            why = reason(error)
    raise CaptureError(_no_graph(f"torch's converter for TorchScript fails on it ({why})"))


def _at_inference(model: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    try:
        twin = copy.deepcopy(model)
    except RuntimeError as error:
        raise CaptureError(_no_graph(f"it cannot be copied ({reason(error)})")) from error
    if hasattr(twin, "training"):  # else it was frozen, in eval mode
        twin.eval()
    return twin


def _return_as(module: fx.GraphModule, answer: Any) -> None:
    """The converter makes lists of tuples; the containers are those of the compiled model again."""
    codegen: Any = module.graph._codegen
    wanted = pytree.tree_structure(answer)
    if codegen.pytree_info.out_spec.num_leaves == wanted.num_leaves:
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=wanted)
        module.recompile()


def _make_parameters(module: fx.GraphModule, model: torch.jit.ScriptModule) -> None:
    """The converter makes buffers of parameters; they are parameters again."""
    parts = dict(module.named_modules())
    for name, parameter in model.named_parameters():
        path, _, key = name.rpartition(".")
        part = parts.get(path)
        if part is not None and key in part._buffers:
            value = part._buffers.pop(key)
            assert value is not None
            part.register_parameter(key, nn.Parameter(value.detach(), parameter.requires_grad))


def _no_graph(why: str) -> str:
    return f"{why}; fuse the PyTorch model that was compiled, or an archive of torch.export.save"


def _audit(path: Path) -> None:
    reader, names = opened(path)
    for name in names:
        if not _ENTRIES.fullmatch(name):
            raise InputError(f"{path} has the entry {name[:80]!r}, {_REMEDY}")
        if name.endswith(".py"):
            _audit_code(_text(reader, name, path), path)
        elif name.endswith(".pkl") and b"torch.classes" in reader.get_record(name):
            raise InputError(f"{path} holds a compiled object of its own, {_REMEDY}")


def _audit_code(code: str, path: Path) -> None:
    found = _FORBIDDEN.search(code)
    if found:
        raise InputError(f"{path} has {found[0]!r} in its code, {_REMEDY}")
    unknown = set(_NAMESPACE.findall(code)) - _NAMESPACES
    if unknown:
        raise InputError(f"{path} asks for the operators of {min(unknown)!r}, {_REMEDY}")
    if "getattr" in code and "\\" in code:
        raise InputError(f"{path} has an attribute with an escaped name in its code, {_REMEDY}")


_PROBE = "import sys, warnings; warnings.simplefilter('ignore'); import torch; torch.jit.load(sys.argv[1])"


def _require_survivors(path: Path) -> None:
    """Loads the archive in a process of its own: torch's reader ends the process for some damaged ones."""
    facts = path.stat()
    if not _survives(path, facts.st_mtime_ns, facts.st_size, facts.st_ino):
        raise InputError(f"{path} is a damaged TorchScript archive (torch crashes on it); copy or download it again")


@lru_cache(maxsize=64)
def _survives(path: Path, *_facts: int) -> bool:
    """Whether torch does not crash on the file; the facts are those that another file would not share."""
    try:
        ended = subprocess.run([sys.executable, "-c", _PROBE, str(path)], capture_output=True, timeout=600, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return True
    return ended.returncode >= 0


def _text(reader: Any, name: str, path: Path) -> str:
    try:
        return str(reader.get_record(name).decode("ascii"))
    except (UnicodeDecodeError, RuntimeError):
        raise InputError(f"{path} has damaged code ({name[:80]}); copy or download it again") from None


def _telling(error: BaseException) -> str:
    return f"{type(error).__name__}: {reason(error)}"
