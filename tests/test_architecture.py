"""Reads the imports of the package and fails when one points the wrong way; DESIGN.md draws the arrows.

algebra <- graph <- passes <- pipeline <- __init__ <- workflow <- cli; capture, equivalence, export and bench know
nothing of graph and passes; report reads values only; torch.fx, onnx and timm stay where they belong; no published
block is named.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "reparam"

# Every room may import these: they hold plain values and import nothing of ours but each other.
COMMON = (
    "reparam.answers",
    "reparam.buffers",
    "reparam.chance",
    "reparam.checks",
    "reparam.compiled",
    "reparam.copying",
    "reparam.errors",
    "reparam.inputs",
    "reparam.lazy",
    "reparam.quiet",
    "reparam.stages",
    "reparam.widen",
    "reparam.__version__",
)
# The files that hold a value another room is handed.
CAPTURED = "reparam.capture.captured"
PASS_VALUES = ("reparam.passes.base", "reparam.graph.place")
RESULT_VALUES = (*PASS_VALUES, "reparam.equivalence", "reparam.bench")

# What each room may import of ours besides itself and COMMON. "reparam" alone is the package's own __init__.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "answers": (),
    "buffers": (),
    "chance": (),
    "checks": (),
    "compiled": (),
    "copying": (),
    "errors": (),
    "inputs": (),
    "lazy": (),
    "places": (),
    "quiet": (),
    "stages": (),
    "widen": (),
    "algebra": (),
    "graph": ("reparam.algebra", CAPTURED, *PASS_VALUES),
    "passes": ("reparam.algebra", "reparam.graph", CAPTURED),
    "capture": (),
    "data": ("reparam.capture.imports",),
    "equivalence": ("reparam.data",),
    "export": ("reparam.data", "reparam.equivalence"),
    "bench": (),
    "report": (*RESULT_VALUES, "reparam.certificate", "reparam.export.written"),
    "pipeline": tuple(
        f"reparam.{room}"
        for room in ("algebra", "graph", "passes", "capture", "data", "equivalence", "export", "bench", "report")
    ),
}
MAY_IMPORT["picture"] = ("reparam.graph", "reparam.passes.base", "reparam.passes.ledger", "reparam.report")
MAY_IMPORT["piece"] = (*MAY_IMPORT["pipeline"], "reparam.picture")
MAY_IMPORT["partial"] = (*MAY_IMPORT["piece"], "reparam.piece")
MAY_IMPORT["undo"] = ("reparam.equivalence", "reparam.passes")
MAY_IMPORT["pipeline"] = (*MAY_IMPORT["partial"], "reparam.partial", "reparam.undo")
MAY_IMPORT["runtimes"] = ("reparam.bench", "reparam.export")
MAY_IMPORT["latency"] = ("reparam.bench", "reparam.pipeline", "reparam.runtimes")
MAY_IMPORT["__init__"] = (*MAY_IMPORT["pipeline"], "reparam.pipeline", "reparam.latency")
MAY_IMPORT["source"] = ("reparam.capture",)
MAY_IMPORT["bench_files"] = (
    *("reparam", "reparam.bench", "reparam.export", "reparam.latency", "reparam.opened", "reparam.pipeline"),
    *("reparam.runtimes", "reparam.source"),
)
MAY_IMPORT["certificate"] = tuple(
    f"reparam.{room}" for room in ("bench", "capture", "data", "equivalence", "export", "report", "source")
)
MAY_IMPORT["written"] = ("reparam.capture", "reparam.data", "reparam.equivalence")
MAY_IMPORT["workflow"] = (
    *(*MAY_IMPORT["__init__"], "reparam", "reparam.certificate", "reparam.places", "reparam.source", "reparam.written"),
)
MAY_IMPORT["exporting"] = (*MAY_IMPORT["pipeline"], "reparam.pipeline", "reparam.source")
MAY_IMPORT["opened"] = ("reparam.capture", "reparam.equivalence", "reparam.export", "reparam.source")
MAY_IMPORT["compare"] = (*MAY_IMPORT["opened"], "reparam.certificate", "reparam.data", "reparam.opened")
MAY_IMPORT["cli"] = (
    *MAY_IMPORT["workflow"],
    *map("reparam.{}".format, ("bench_files", "compare", "exporting", "source", "workflow")),
)
MAY_IMPORT["__main__"] = ("reparam.cli",)

FX_ROOMS = {"capture", "graph", "passes", "picture", "piece", "partial"}
ONNX = re.compile(r"(onnx\w*|torch\.onnx)(\.|$)")
NEVER_AT_IMPORT = re.compile(r"(timm|torchvision|torchaudio|sklearn|PIL)(\.|$)")
LIGHT_ROOMS = {"cli", "report", "__init__", "errors"}  # `reparam --help` must not wait for torch

PUBLISHED = re.compile(
    r"(?<![a-z])(rep-?vgg|mobile-?one|acnet|acblock|dbb|diversebranch|rep-?lk|fastvit|repvit|rep-?ghost|ghostnet|yolo"
    r"|repconv|resnet|resnext|efficientnet|mobilenet|convnext|densenet|inception|vgg|levit|swin|nextvit|lcnet|tinyvit"
    r"|tiny_vit|shvit|iformer|byobnet|orepa|nf_?net|maxvit|edgenext|shufflenet|unireplk|cbam|timm(?!:))",
    re.IGNORECASE,
)
# The loader has to say the library's name to import it.
LIBRARY_NAME = {"capture": re.compile(r"[\"']timm[\"']|\btimm\.(?:list_models|is_model|create_model)\b|\btimm =")}


FACTORIES = frozenset(
    f"torch.{name}"
    for name in "zeros ones empty full rand randn randint randperm arange linspace eye tensor as_tensor".split()
)


@dataclass(frozen=True)
class Import:
    """One module that a file imports: its dotted name, the line, and when the import happens."""

    target: str
    line: int
    when: str  # "module": as the file is imported; "call": inside a function; "typing": for type checkers only


def module_name(path: Path, package: Path) -> str:
    parts = ["reparam", *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(path: Path, package: Path) -> str:
    first = path.relative_to(package).parts[0]
    return first.removesuffix(".py")


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _walk(node: ast.AST, when: str = "module") -> Iterator[tuple[ast.AST, str]]:
    """Every node below `node` with the time at which it runs."""
    for child in ast.iter_child_nodes(node):
        inner = when
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and when == "module":
            inner = "call"
        yield child, inner
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for statement in child.body:
                yield statement, "typing"
                yield from _walk(statement, "typing")
            for statement in child.orelse:
                yield statement, inner
                yield from _walk(statement, inner)
        else:
            yield from _walk(child, inner)


def _from_targets(node: ast.ImportFrom, module: str, is_package: bool, package: Path) -> Iterator[str]:
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        kept = parts[: len(parts) - node.level + is_package]
        base = ".".join([*kept, base] if base else kept)
    for alias in node.names:
        full = f"{base}.{alias.name}"
        inside = package.joinpath(*full.split(".")[1:])
        is_ours = full.startswith("reparam.") and (inside.with_suffix(".py").exists() or inside.is_dir())
        yield full if is_ours or full in ("torch.fx", "torch.onnx", "reparam.__version__") else base


def _dynamic_target(node: ast.AST) -> str | None:
    """The name in `import_module("name")` or `__import__("name")`."""
    if isinstance(node, ast.Call) and node.args:
        called = ast.unparse(node.func).rpartition(".")[2]
        first = node.args[0]
        if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
            return str(first.value)
    return None


def imports_of(path: Path, package: Path) -> list[Import]:
    """All imports of a file: statements, `import_module("...")`, and uses such as `torch.fx.Node`."""
    found = []
    module, is_package = module_name(path, package), path.name == "__init__.py"
    for node, when in _walk(ast.parse(path.read_text())):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = list(_from_targets(node, module, is_package, package))
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.fx", "torch.onnx"):
            targets = [ast.unparse(node)]
        elif (dynamic := _dynamic_target(node)) is not None:
            targets = [dynamic]
        else:
            continue
        found += [Import(target, line, when) for target in targets]
    return found


def _within(target: str, allowed: tuple[str, ...]) -> bool:
    return any(target == name or (name != "reparam" and target.startswith(name + ".")) for name in allowed)


def _import_violation(room: str, item: Import) -> str | None:
    target = item.target
    if target.partition(".")[0] == "reparam":
        own = "reparam" if room == "__init__" else f"reparam.{room}"
        if not _within(target, (own, *COMMON, *MAY_IMPORT[room])):
            return f"{room} must not import {target}"
    if (target == "torch.fx" or target.startswith("torch.fx.")) and room not in FX_ROOMS:
        return f"{room} must not use torch.fx"
    if ONNX.match(target):
        if room != "export":
            return f"{room} must not import {target}: only export knows ONNX"
        if item.when == "module":
            return f"{target} must be imported inside a function"
    if NEVER_AT_IMPORT.match(target) and item.when != "call":
        return f"{target} must be imported inside a function, if at all"
    if target.partition(".")[0] == "torch" and room in LIGHT_ROOMS and item.when == "module":
        return f"{room} must not import torch at module level"
    return None


def devices_left_open(path: Path) -> list[tuple[int, str]]:
    """Line and name of calls that make a tensor on torch's default device, which is the user's and may be any."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    open_ones = (call for call in calls if "device" not in {keyword.arg for keyword in call.keywords})
    named = ((call.lineno, ast.unparse(call.func)) for call in open_ones if isinstance(call.func, ast.Attribute))
    return [(line, name) for line, name in named if name in FACTORIES]


def violations(package: Path) -> list[str]:
    """One `file:line: sentence` for everything in `package` that breaks the design."""
    found = []
    for path in sorted(package.rglob("*.py")):
        room, where = room_of(path, package), path.relative_to(package).as_posix()
        if room not in MAY_IMPORT:
            found.append(f"{where}:1: {room} is not a room of DESIGN.md: say in MAY_IMPORT what it may import")
            continue
        for item in imports_of(path, package):
            if sentence := _import_violation(room, item):
                found.append(f"{where}:{item.line}: {sentence}")
        for line, name in devices_left_open(path):
            found.append(f"{where}:{line}: {name} must name its device")
        for number, text in enumerate(path.read_text().splitlines(), 1):
            if room in LIBRARY_NAME:
                text = LIBRARY_NAME[room].sub("", text)
            if match := PUBLISHED.search(text):
                found.append(f"{where}:{number}: {match.group()!r} is a published name")
    return found


def test_no_import_points_backwards() -> None:
    assert len(list(PACKAGE.rglob("*.py"))) > 30, "the package was not found"
    assert violations(PACKAGE) == []


PLANTED = [
    ("algebra/a.py", "import reparam.graph.lift", "algebra must not import reparam.graph.lift"),
    ("algebra/a.py", "from ..passes import base", "algebra must not import reparam.passes.base"),
    ("algebra/a.py", "from .. import errors, pipeline", "algebra must not import reparam.pipeline"),
    ("algebra/a.py", "from reparam import fuse", "algebra must not import reparam"),
    ("algebra/a.py", "import torch.fx", "algebra must not use torch.fx"),
    ("graph/lift.py", "from reparam.passes.collapse import Collapse", "graph must not import reparam.passes.collapse"),
    ("graph/lift.py", "def f():\n    from reparam import passes", "graph must not import reparam.passes"),
    ("passes/base.py", "from reparam.equivalence import verify", "passes must not import reparam.equivalence"),
    ("capture/c.py", "from reparam.graph import lift", "capture must not import reparam.graph.lift"),
    ("equivalence/v.py", "from torch import fx", "equivalence must not use torch.fx"),
    ("equivalence/v.py", "import torch\nx: torch.fx.Node", "equivalence must not use torch.fx"),
    ("equivalence/v.py", "from reparam.passes.base import Rewrite", "equivalence must not import reparam.passes.base"),
    ("bench/b.py", "def f():\n    import onnxruntime", "bench must not import onnxruntime"),
    ("bench/b.py", "import torch\ntorch.onnx.export", "bench must not import torch.onnx"),
    ("export/e.py", "import onnx", "onnx must be imported inside a function"),
    ("export/e.py", "from onnx import helper", "onnx must be imported inside a function"),
    ("report/r.py", "from reparam.passes.collapse import Collapse", "report must not import reparam.passes.collapse"),
    ("report/r.py", "import torch", "report must not import torch at module level"),
    ("report/r.py", "from reparam.pipeline import fuse", "report must not import reparam.pipeline"),
    ("cli/c.py", "import torch", "cli must not import torch at module level"),
    ("graph/lift.py", "from reparam.report.values import Report", "graph must not import reparam.report"),
    ("graph/lift.py", "from reparam.capture.trace import capture", "graph must not import reparam.capture.trace"),
    ("pipeline.py", "from torch import fx", "pipeline must not use torch.fx"),
    ("pipeline.py", "from reparam import fuse", "pipeline must not import reparam"),
    ("pipeline.py", "import reparam.cli", "pipeline must not import reparam.cli"),
    ("pipeline.py", "from importlib import import_module\nimport_module('onnx')", "pipeline must not import onnx"),
    ("__init__.py", "from .cli import main", "__init__ must not import reparam.cli"),
    ("capture/c.py", "import torchvision", "torchvision must be imported inside a function"),
    ("capture/c.py", "from timm import create_model", "timm must be imported inside a function"),
    ("passes/base.py", "# as in RepVGG", "'RepVGG' is a published name"),
    ("passes/base.py", "def f(m): return 'mobileone' in m", "'mobileone' is a published name"),
    ("graph/lift.py", "SEEN = 'timm.layers'", "'timm' is a published name"),
    ("algebra/a.py", "import torch\nX = torch.zeros(3, dtype=torch.int8)", "torch.zeros must name its device"),
    ("extra.py", "import os", "extra is not a room"),
]

ALLOWED = [
    ("algebra/a.py", "import torch\nfrom reparam.errors import InputError\nX = torch.zeros(3, device='cpu')"),
    (
        "graph/lift.py",
        "from torch import fx\nfrom reparam.algebra import affine\nfrom reparam.passes.base import Refusal",
    ),
    ("passes/base.py", "from reparam.graph import lift\nimport torch.fx"),
    ("capture/c.py", "FORM = 'timm:NAME'\ndef f():\n    import torchvision"),
    ("equivalence/v.py", "from . import w\nfrom reparam.inputs import Inputs"),
    ("export/e.py", "def f():\n    import onnxruntime\n    import torch\n    torch.onnx.export"),
    ("report/r.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ("report/r.py", "from reparam.passes.base import Rewrite"),
    ("pipeline.py", "import reparam.passes, reparam.equivalence\nfrom reparam import __version__"),
    ("__init__.py", "from .pipeline import fuse"),
    ("cli/c.py", "def f():\n    import torch\n    import reparam"),
]


EMPTY = [
    *(
        "__init__",
        "pipeline",
        "cli/__init__",
        "errors",
        "algebra/__init__",
        "capture/trace",
        "graph/lift",
        "passes/base",
    ),
    *("report/values", "equivalence/w"),
]


def planted(root: Path, where: str, source: str) -> Path:
    """A package of empty files with `source` in one of them."""
    package = root / "reparam"
    for name in EMPTY:
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    path = package / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source + "\n")
    return package


@pytest.mark.parametrize(("where", "source", "sentence"), PLANTED)
def test_planted_violation_is_found(tmp_path: Path, where: str, source: str, sentence: str) -> None:
    found = violations(planted(tmp_path, where, source))
    assert len(found) >= 1
    assert all(entry.startswith(where) for entry in found)
    assert any(sentence in entry for entry in found)


@pytest.mark.parametrize(("where", "source"), ALLOWED)
def test_what_the_design_allows_passes(tmp_path: Path, where: str, source: str) -> None:
    assert violations(planted(tmp_path, where, source)) == []


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys\nsys.argv = ['reparam', '--help']\nfrom reparam.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.exit(sorted({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "Usage" in finished.stdout
    assert finished.stderr.strip() == "[]"


def test_public_names_stay_what_they_are_whatever_is_imported() -> None:
    """`reparam.verify` is the function, also after something imported the package of that name."""
    program = (
        "import reparam, pkgutil, importlib, types\n"
        "for found in pkgutil.walk_packages(reparam.__path__, 'reparam.'):\n"
        "    importlib.import_module(found.name)\n"
        "print(*(name for name in reparam.__all__ if isinstance(getattr(reparam, name), types.ModuleType)))\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == [], "a submodule hides the public name"
