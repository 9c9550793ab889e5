"""Archives whose author wants code to run, files to be written or memory to be filled: one sentence, nothing else."""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from reparam.capture.load import load
from reparam.errors import InputError
from tests.capture.test_archives import Plain, image, scripted
from tests.capture.test_load_hostile import touch
from tests.support import sampled

Program = dict[str, Any]
Entries = dict[str, bytes]


class Reshaped(nn.Module):
    """Has a constant, sizes that are computed, and guards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.table = torch.ones(3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x)
        b, c, h, w = y.shape
        return y.reshape(b, c, h * w // 2, 2) if h * w % 2 == 0 else y, self.table * 2


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> Entries:
    """The files in an ordinary archive."""
    path = tmp_path_factory.mktemp("archive") / "m.pt2"
    sizes = dict.fromkeys((0, 2, 3), Dim.AUTO)
    program = torch.export.export(Reshaped().eval(), (image(2, 3, 8, 8),), dynamic_shapes=(sizes,))
    torch.export.save(program, path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Entries:
    """The files in an ordinary TorchScript archive."""
    path = scripted(tmp_path_factory.mktemp("script"), Plain().eval())
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(path: Path, entries: Entries) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def with_program(entries: Entries, change: Callable[[Program], None]) -> Entries:
    program = json.loads(entries["m/models/model.json"])
    change(program)
    return {**entries, "m/models/model.json": json.dumps(program).encode()}


def with_config(entries: Entries, kind: str, change: Callable[[Program], None]) -> Entries:
    name = f"m/data/{kind}/model_{kind}_config.json"
    config = json.loads(entries[name])
    for entry in config["config"].values():
        change(entry)
    return {**entries, name: json.dumps(config).encode()}


def nodes(program: Program) -> list[Program]:
    found: list[Program] = program["graph_module"]["graph"]["nodes"]
    return found


def pickled(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(touch(marker), buffer)
    return buffer.getvalue()


def set_target(target: str) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        nodes(program)[0]["target"] = target

    return change


def set_size(text: str) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        found = 0
        for value in program["graph_module"]["graph"]["sym_int_values"].values():
            if "as_expr" in value:
                value["as_expr"]["expr_str"] = text
                found += 1
        assert found

    return change


def set_guard(text: str) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        assert program["guards_code"]
        program["guards_code"] = [text]

    return change


def set_spec(tree: Any) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        program["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, tree])

    return change


def rename_input(name: str) -> Callable[[Program], None]:
    def change(program: Program) -> None:
        text = json.dumps(program).replace('"name": "x"', f'"name": {json.dumps(name)}')
        program.clear()
        program.update(json.loads(text))

    return change


RUN = "__import__('os').system('touch MARKER')"

PROGRAMS: dict[str, Callable[[Program], None]] = {
    "target os": set_target("torch.os.system"),
    "target in torch": set_target("torch.hub.load"),
    "target utils": set_target("torch.utils.cpp_extension.load_inline"),
    "target file": set_target("torch.ops.aten.from_file.default"),
    "target save": set_target("torch.ops.aten.save.default"),
    "target library": set_target("torch.ops.load_library"),
    "target builtin": set_target("builtins.eval"),
    "target operator": set_target("_operator.attrgetter"),
    "target namespace": set_target("torch.ops.debugprims.load_tensor.default"),
    "target math": set_target("math.__loader__"),
    "size call": set_size(RUN),
    "size lambda": set_size(f"(lambda: {RUN})()"),
    "size attribute": set_size("().__class__.__bases__[0].__subclasses__()"),
    "size string": set_size(f"Symbol({RUN!r})"),
    "size power": set_size("9**9**9"),
    "size call of power": set_size("Pow(10, Pow(10, 10))"),
    "size shift": set_size("LShift(1, 10**12)"),
    "size huge": set_size("1" * 30_000),
    "size keyword": set_size(f"Symbol('s0', integer={RUN})"),
    "size comprehension": set_size(f"[{RUN} for _ in (1,)]"),
    "size format": set_size(f"f'{{{RUN}}}'"),
    "size walrus": set_size(f"(a := {RUN})"),
    "guard call": set_guard(RUN),
    "guard statement": set_guard(f"True\n    {RUN}"),
    "guard attribute": set_guard("L['x'].__class__.__init__.__globals__"),
    "guard subscript": set_guard(f"L[{RUN}] == 1"),
    "guard string": set_guard("L['x\\'].size()[0], " + RUN + " #'] == 1"),
    "guard lambda": set_guard(f"(lambda: {RUN})()"),
    "guard math": set_guard("math.factorial(10**8) > 1"),
    "spec class": set_spec({"type": "subprocess.Popen", "context": "null", "children_spec": []}),
    "spec named tuple": set_spec({"type": "collections.namedtuple", "context": '["os.system"]', "children_spec": []}),
    "spec key": set_spec({"type": "builtins.dict", "context": json.dumps([f"'] + {RUN} + ['"]), "children_spec": []}),
    "spec damaged": set_spec([[[[]]]]),
    "input name": rename_input(f"x={RUN}"),
    "input line": rename_input("x):\n    print('run')\ndef g(y"),
    "custom object": lambda program: program["graph_module"]["signature"]["input_specs"].append(
        {"custom_obj": {"arg": {"name": "a", "class_fqn": "x.Y"}, "custom_obj_name": "o"}}
    ),
    "custom argument": lambda program: nodes(program)[0]["inputs"][0].update(
        arg={"as_custom_obj": {"name": "a", "class_fqn": "x.Y"}}
    ),
    "higher order": lambda program: nodes(program)[0].update(target="torch.ops.higher_order.inductor_compiled_code"),
}


def refused(path: Path, folder: Path, marker: Path) -> str:
    """The one sentence that loading ends in, while no file appears."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert sorted(folder.rglob("*")) == before
    assert not marker.exists()
    return str(caught.value)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_ask_for_more(tmp_path: Path, entries: Entries, name: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "system", lambda command: pytest.fail(f"ran {command}"))
    marker = tmp_path / "MARKER"
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "m.pt2", with_program(entries, PROGRAMS[name]))
    assert "pass --allow-pickle" in refused(path, tmp_path, marker)


def hostile_entries(entries: Entries, marker: Path) -> dict[str, Entries]:
    bad = pickled(marker)
    large = {"as_int": 2**40}

    def huge(entry: Program) -> None:
        entry["tensor_meta"]["sizes"] = [large]
        entry["tensor_meta"]["strides"] = [{"as_int": 0}]

    return {
        "example": {**entries, "m/data/sample_inputs/model.pt": bad},
        "weight": with_config(
            {**entries, "m/data/weights/weight_0": bad}, "weights", lambda e: e.update(use_pickle=True)
        ),
        "constant": with_config(
            {**entries, "m/data/constants/tensor_0": bad}, "constants", lambda e: e.update(use_pickle=True)
        ),
        "opaque": with_config(
            {**entries, "m/data/constants/opaque_obj_0": bad},
            "constants",
            lambda e: e.update(path_name="opaque_obj_0", use_pickle=False),
        ),
        "custom": with_config(
            {**entries, "m/data/constants/custom_obj_0": bad}, "constants", lambda e: e.update(path_name="custom_obj_0")
        ),
        "climbs": with_config(entries, "constants", lambda e: e.update(path_name="../sample_inputs/model.pt")),
        "old weights": {**entries, "m/data/weights/model.pt": bad},
        "old constants": {**entries, "m/data/constants/model.pt": bad},
        "library": {**entries, "m/data/aotinductor/model/a.so": b"\x7fELF"},
        "unknown entry": {**entries, "m/data/code.py": b"import os"},
        "old program": {**entries, "m/serialized_exported_program.json": b"{}"},
        "zero bytes": with_config(entries, "constants", huge),
    }


KINDS = [
    "example", "weight", "constant", "opaque", "custom", "climbs", "old weights", "old constants", "library",
    "unknown entry", "old program", "zero bytes",
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_entries_that_are_more_than_tensors(tmp_path: Path, entries: Entries, name: str) -> None:
    marker = tmp_path / "MARKER"
    path = written(tmp_path / "m.pt2", hostile_entries(entries, marker)[name])
    assert "pass --allow-pickle" in refused(path, tmp_path, marker)


def test_a_pickle_in_an_archive_would_run(tmp_path: Path, entries: Entries) -> None:
    """The archives above are live: with the checks left out, torch runs what is in them."""
    marker = tmp_path / "MARKER"
    path = written(tmp_path / "m.pt2", hostile_entries(entries, marker)["example"])
    with pytest.raises(InputError):
        load(path, allow_pickle=True)  # the example is no tuple; but by then it was read
    assert marker.exists()


@pytest.mark.parametrize(
    "drop", ["m/models/model.json", "m/data/weights/model_weights_config.json", "m/data/weights/weight_0"]
)
def test_archives_with_parts_missing(tmp_path: Path, entries: Entries, drop: str) -> None:
    path = written(tmp_path / "m.pt2", {name: content for name, content in entries.items() if name != drop})
    refused(path, tmp_path, tmp_path / "MARKER")


def test_two_programs(tmp_path: Path, entries: Entries) -> None:
    path = written(tmp_path / "m.pt2", {**entries, "m/models/other.json": entries["m/models/model.json"]})
    assert "2 programs" in refused(path, tmp_path, tmp_path / "MARKER")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff\xfe"])
def test_damaged_programs(tmp_path: Path, entries: Entries, content: bytes) -> None:
    refused(written(tmp_path / "m.pt2", {**entries, "m/models/model.json": content}), tmp_path, tmp_path / "MARKER")


SCRIPTS = {
    "save": "    _ = torch.save(x, 'MARKER')\n",
    "save by operator": "    _ = ops.aten.save(x, 'MARKER')\n",
    "save by getattr": "    _ = getattr(torch, 'sa\\x76e')(x, 'MARKER')\n",
    "read": "    _ = torch.from_file('/etc/passwd', False, 10)\n",
    "other operators": "    _ = ops.debugprims.load_tensor('a')\n",
    "own class": "    _ = __torch__.torch.classes.quantized.Conv2dPackedParamsBase\n",
}


def with_code(compiled: Entries, line: str, function: str = "forward") -> Entries:
    name = next(name for name in compiled if name.endswith("test_archives.py"))
    head, _, rest = compiled[name].decode().partition("  def forward")
    signature, _, body = rest.partition(":\n")
    code = f"{head}  def forward{signature}:\n{line}{body}"
    if function != "forward":
        kind = "__torch__.tests.capture.test_archives.Plain"
        code += f"  def {function}(self: {kind}, state: Tensor) -> NoneType:\n    return None\n"
    return {**compiled, name: code.encode()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_code_in_torchscript_that_reaches_out(
    tmp_path: Path, compiled: Entries, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path / "model.ts", with_code(compiled, SCRIPTS[name]))
    assert "pass --allow-pickle" in refused(path, tmp_path, tmp_path / "MARKER")


def test_code_in_torchscript_that_runs_while_loading(tmp_path: Path, compiled: Entries) -> None:
    path = written(tmp_path / "model.ts", with_code(compiled, "", "__setstate__"))
    assert "'__setstate__'" in refused(path, tmp_path, tmp_path / "MARKER")


def test_other_entries_in_torchscript(tmp_path: Path, compiled: Entries) -> None:
    root = next(iter(compiled)).split("/")[0]
    path = written(tmp_path / "model.ts", {**compiled, f"{root}/library.so": b"\x7fELF"})
    assert "library.so" in refused(path, tmp_path, tmp_path / "MARKER")


def test_a_pickle_in_torchscript_runs_nothing(tmp_path: Path, compiled: Entries) -> None:
    import pickle

    marker = tmp_path / "MARKER"
    root = next(iter(compiled)).split("/")[0]
    for name in ("data.pkl", "constants.pkl"):
        content = pickle.dumps(touch(marker), protocol=2)
        refused(written(tmp_path / "model.ts", {**compiled, f"{root}/{name}": content}), tmp_path, marker)


@pytest.mark.parametrize("kind", sampled(["entries", "compiled"], 2))
def test_mutated_archives_end_in_a_model_or_a_sentence(tmp_path: Path, kind: str, request: Any) -> None:
    """Single bytes of the files in an archive changed at random; the archive itself stays whole."""
    given: Entries = request.getfixturevalue(kind)
    draw = random.Random(0)
    names = [name for name, content in given.items() if content]
    sentences = []
    for turn in range(60 if kind == "entries" else 10):  # TorchScript is first tried in a process of its own
        name = draw.choice([name for name in names if name.endswith((".json", ".py", ".pkl", ".pt"))])
        content = bytearray(given[name])
        for _ in range(draw.choice((1, 2, 8))):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path = written(tmp_path / f"{turn}.pt", {**given, name: bytes(content)})
        try:
            assert isinstance(load(path), nn.Module)
        except InputError as error:
            sentences.append(str(error))
        path.unlink()
    assert len(sentences) > 3
    assert not any("\n" in sentence for sentence in sentences)
