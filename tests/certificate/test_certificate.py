"""The certificate that `reparam fuse` writes, and `reparam verify --certificate`, which does it all again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import safetensors.torch
import torch

from reparam.certificate import WEIGHTS_KEY, file_digest, read_certificate, weights_digest
from reparam.cli import main
from reparam.errors import InputError
from reparam.export import OnnxSession
from tests.cli.test_fuse import network


def invoke(*arguments: Any) -> click.testing.Result:
    return click.testing.CliRunner(env={"COLUMNS": "200"}).invoke(main, list(map(str, arguments)))


def fused(folder: Path, *options: Any) -> Path:
    """A fused network in a folder, with its certificate."""
    torch.save(network(), folder / "net.pt")
    result = invoke("fuse", folder / "net.pt", "--input", "1x3x8x8", "--no-bench", "--verify", "quick", *options)
    assert result.exit_code == 0, result.output
    return folder / "net.fused.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certified")
    np.save(folder / "own.npy", np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32))
    return fused(folder, "--data", folder / "own.npy").parent


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of everything; the data still comes from the first folder."""
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


def repeated(folder: Path, *options: Any) -> tuple[int, dict[str, Any]]:
    result = invoke("verify", "--certificate", folder / "net.fused.json", *options, "--json")
    assert "Traceback" not in result.output
    return result.exit_code, json.loads(result.stdout)


def sentences(found: dict[str, Any], kind: str) -> list[str]:
    return [finding["sentence"] for finding in found["findings"] if finding["kind"] == kind]


def edited(folder: Path, change: Any) -> None:
    path = folder / "net.fused.json"
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


def test_a_certificate_says_all_that_it_should(original: Path) -> None:
    plain = json.loads((original / "net.fused.json").read_text())
    assert plain["verdict"]["equivalent"] is True
    assert len(plain["verdict"]["sentences"]) == 3
    assert plain["original"]["sha256"] == file_digest(original / "net.pt")
    assert plain["original"]["weights_sha256"] == weights_digest(network().state_dict())
    assert plain["files"]["onnx"]["sha256"] == file_digest(original / "net.fused.onnx")
    assert plain["files"]["archive"]["sha256"] == file_digest(original / "net.fused.pt2")
    assert set(plain["versions"]) == {"python", "reparam", "torch", "numpy", "onnx", "onnxruntime"}
    assert plain["options"]["seed"] == 0
    assert plain["options"]["inputs"] == ["1x3x8x8"]
    assert plain["inputs"]["data"] == ["own.npy row 0", "own.npy row 1"]
    assert [rewrite["pass_name"] for rewrite in plain["rewrites"]]
    assert "refusals" in plain
    assert plain["undone"] == []
    for kind in ("fused", "archive", "onnx"):
        assert plain["comparisons"][kind]["passed"] is True
        assert len(plain["comparisons"][kind]["cases"]) == 3


def test_both_files_carry_the_hash_of_the_weights(original: Path) -> None:
    from reparam.capture.archives import archive_metadata
    from reparam.capture.load import load

    wanted = read_certificate(str(original / "net.fused.json")).fused_weights
    assert OnnxSession(original / "net.fused.onnx").metadata[WEIGHTS_KEY] == wanted
    assert archive_metadata(original / "net.fused.pt2")[WEIGHTS_KEY] == wanted
    assert weights_digest(load(original / "net.fused.pt2").state_dict()) == wanted


def test_the_hash_of_weights_does_not_depend_on_the_container(tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save(state, tmp_path / "a.pt")
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    turned = {name: state[name] for name in reversed(list(state))}
    turned["0.weight"] = turned["0.weight"].to(memory_format=torch.channels_last)
    for other in (torch.load(tmp_path / "a.pt"), safetensors.torch.load_file(tmp_path / "a.safetensors"), turned):
        assert weights_digest(other) == weights_digest(state)
    assert weights_digest({**state, "_extra_state": {"calls": 3}}) == weights_digest(state)
    swapped = {**state, "1.weight": state["1.bias"], "1.bias": state["1.weight"]}
    one_bit = {**state, "1.bias": torch.nextafter(state["1.bias"], state["1.bias"] + 1)}
    half = {**state, "1.bias": state["1.bias"].half()}
    assert len({weights_digest(other) for other in (state, swapped, one_bit, half)}) == 4


def test_it_holds_and_every_figure_is_repeated_bit_for_bit(folder: Path) -> None:
    status, found = repeated(folder)
    assert status == 0, found
    assert found["holds"]
    assert sentences(found, "changed") == sentences(found, "differs") == []
    same = sentences(found, "holds")
    assert sum("to the last bit" in sentence for sentence in same) == 2
    assert sum("as certified" in sentence for sentence in same) == 9
    assert set(found["comparisons"]) == {"archive", "onnx"}


@pytest.mark.slow
def test_two_runs_write_the_same_certificate(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        plain = json.loads(fused(tmp_path / name, "--no-archive").read_text())
        plain["files"]["onnx"]["sha256"] = plain["original"]["sha256"] = plain["original"]["model"] = ""
        made.append(json.dumps(plain))
    assert made[0] == made[1]


def other_network() -> torch.nn.Module:
    model = network()
    with torch.no_grad():
        model[6].bias[2] += 1e-3
    return model


def replace_original(folder: Path) -> None:
    torch.save(other_network(), folder / "net.pt")


def replace_fused(folder: Path) -> None:
    other = folder / "other"
    other.mkdir()
    torch.save(other_network(), other / "net.pt")
    invoke("fuse", other / "net.pt", "--input", "1x3x8x8", "--no-bench", "--verify", "quick", "--out", f"{other}/")
    for name in ("net.fused.onnx", "net.fused.pt2"):
        shutil.copy(other / name, folder / name)


def touch_onnx(folder: Path) -> None:
    """Another metadata entry: the same model in another file."""
    import onnx

    model = onnx.load(folder / "net.fused.onnx")
    model.metadata_props.add(key="note", value="looked at")
    onnx.save(model, folder / "net.fused.onnx")


def strip_onnx(folder: Path) -> None:
    import onnx

    model = onnx.load(folder / "net.fused.onnx")
    kept = [prop for prop in model.metadata_props if prop.key != WEIGHTS_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, folder / "net.fused.onnx")


def touch_figure(folder: Path) -> None:
    def change(plain: dict[str, Any]) -> None:
        plain["comparisons"]["onnx"]["cases"][0]["outputs"][0]["rms"] *= 0.5

    edited(folder, change)


def touch_example(folder: Path) -> None:
    edited(folder, lambda plain: plain["options"].update(seed=1))


def cut_files(folder: Path) -> None:
    for name in ("net.fused.onnx", "net.fused.pt2"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:-100])


CHANGES = [
    (replace_original, ["the original", "the weights of the original", "NOT equivalent"]),
    (
        replace_fused,
        ["the ONNX file", "the weights named in the metadata", "the weights in the torch.export", "NOT equiv"],
    ),
    (touch_onnx, ["the ONNX file"]),
    (cut_files, ["the ONNX file cannot be read any more: ", "the torch.export archive cannot be read any more: "]),
    (strip_onnx, ["its metadata has no reparam.weights_sha256"]),
    (touch_figure, ["1 figures of the ONNX file moved (cases, example, outputs, output, rms: "]),
    (touch_example, ["the example input"]),
]


@pytest.mark.parametrize(("change", "wanted"), CHANGES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_has_changed_is_told_in_a_sentence(folder: Path, change: Any, wanted: list[str]) -> None:
    change(folder)
    status, found = repeated(folder)
    assert (status, found["holds"]) == (1, False)
    changed = " | ".join(sentences(found, "changed"))
    for sentence in wanted:
        assert sentence in changed
    assert "does NOT hold any more" in found["summary"]
    for form, sign in (("text", "CHANGED"), ("markdown", "- ❌ ")):
        text = invoke("verify", "--certificate", folder / "net.fused.json", "--format", form)
        assert text.exit_code == 1
        assert sign in text.stdout


def test_other_versions_and_moved_figures_are_told_and_hold(folder: Path) -> None:
    edited(folder, lambda plain: plain["versions"].update(torch="1.0"))
    touch_figure(folder)
    status, found = repeated(folder)
    assert status == 0
    told = sentences(found, "differs")
    assert any("torch is" in sentence and "was 1.0" in sentence for sentence in told)
    assert any("1 figures of the ONNX file moved" in sentence for sentence in told)


def test_other_data_is_told(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", np.ones((2, 3, 8, 8), np.float32))
    status, found = repeated(folder, "--data", tmp_path / "own.npy")
    assert status == 1
    assert any(sentence.startswith("the data: SHA-256 is") for sentence in sentences(found, "changed"))


def test_files_may_have_been_moved(folder: Path, tmp_path: Path) -> None:
    for name in ("net.pt", "net.fused.pt2", "net.fused.onnx"):
        (folder / name).rename(tmp_path / f"moved.{name}")
    result = invoke("verify", "--certificate", folder / "net.fused.json")
    assert result.exit_code == 2
    assert "net.pt does not exist or is no file; say where it is now" in result.stderr
    places = (tmp_path / "moved.net.pt", "--archive", tmp_path / "moved.net.fused.pt2")
    status, found = repeated(folder, *places, "--onnx", tmp_path / "moved.net.fused.onnx")
    assert status == 0, found


def put(*path: str, value: Any) -> Any:
    """Changes one entry of a certificate."""

    def change(plain: dict[str, Any]) -> None:
        for key in path[:-1]:
            plain = plain[key]
        plain[path[-1]] = value

    return change


HOSTILE = [
    (put("format", value="other"), "does not say that it is a reparam certificate"),
    (put("version", value=99), "is of version 99"),
    (put("files", value={}), "certifies no file"),
    (put("files", value=[]), "files is missing or no object"),
    (put("files", "onnx", "file", value="../../etc/passwd"), "files.onnx.file is no name of a file without folder"),
    (put("files", "onnx", "file", value="/dev/zero"), "without folder"),
    (put("files", "onnx", "file", value="a\x1b[31m"), "without folder"),
    (put("files", "onnx", "sha256", value="0"), "sha256 is no SHA-256"),
    (put("original", "weights_sha256", value=None), "weights_sha256 is no SHA-256"),
    (put("options", "seed", value="__import__('os')"), "options.seed is missing or of another type"),
    (put("options", "seed", value=True), "options.seed is missing or of another type"),
    (put("options", "verify", value="none"), "options.verify is 'none'"),
    (put("options", "inputs", value=["99999x99999x99999"]), "asks for"),
    (put("options", "inputs", value=[7]), "something else than text"),
    (put("options", "inference_form", value={"x": "os:system"}), "neither identity nor a number"),
    (put("versions", value={"torch": []}), "versions holds something else than text"),
    (put("comparisons", "onnx", "passed", value=False), "comparisons.onnx does not say that the file passed"),
    (put("comparisons", "onnx", "cases", value=[1]), "is no list of objects"),
    (
        put("options", "arch", value="os:system"),
        "was made with --arch os:system, which decides what code or data is loaded",
    ),
    (put("options", "allow_classes", value=["os.*"]), "was made with --allow-class os.*"),
    (put("options", "allow_pickle", value=True), "was made with --allow-pickle"),
    (put("options", "data", value="os:getcwd"), "was made with --data os:getcwd"),
    (put("options", "arch", value="a\x1b[2Jb"), "was made with --arch a"),
]


@pytest.mark.parametrize(("change", "sentence"), HOSTILE, ids=[sentence for _, sentence in HOSTILE])
def test_a_bad_certificate_is_one_sentence_and_runs_nothing(folder: Path, change: Any, sentence: str) -> None:
    edited(folder, change)
    result = invoke("verify", "--certificate", folder / "net.fused.json")
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "internal error" not in result.stderr
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"PK\x03\x04"])
def test_what_is_no_certificate_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(InputError, match="is no certificate that can be used") as error:
        read_certificate(str(tmp_path / "c.json"))
    assert "\n" not in str(error.value)


def test_usage(folder: Path, tmp_path: Path) -> None:
    certificate = ("--certificate", folder / "net.fused.json")
    for arguments, sentence in (
        ((*certificate, "--level", "quick"), "--level is what the certificate says"),
        ((*certificate, "--input", "1x3x8x8"), "--input is what the certificate says"),
        ((*certificate, "a.pt", "b.pt"), "with --certificate give ORIGINAL alone"),
        (("--certificate", tmp_path / "no.json"), "no.json does not exist"),
        (("a.pt",), "give two files"),
        (("a.pt", "b.pt", "--onnx", "c.onnx"), "--onnx goes with --certificate"),
    ):
        result = invoke("verify", *arguments)
        assert result.exit_code == 2, arguments
        assert sentence in result.stderr


def test_a_builder_has_to_be_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    torch.save(network(6).state_dict(), tmp_path / "net.pt")
    arch = ("--arch", "tests.cli.test_fuse:network", "--arch-args", "channels=6")
    result = invoke(
        "fuse", tmp_path / "net.pt", *arch, "--input", "1x3x8x8", "--no-bench", "--no-onnx", "--verify", "quick"
    )
    assert result.exit_code == 0, result.output
    result = invoke("verify", "--certificate", tmp_path / "net.fused.json")
    assert result.exit_code == 2
    assert "was made with --arch tests.cli.test_fuse:network --arch-args channels=6" in result.stderr
    status, found = repeated(tmp_path, *arch)
    assert status == 0, found


def test_no_certificate_without_files_or_verification(tmp_path: Path) -> None:
    for options in (("--no-onnx", "--no-archive"), ("--verify", "off", "--no-onnx"), ("--no-certificate", "--no-onnx")):
        torch.save(network(), tmp_path / "net.pt")
        result = invoke("fuse", tmp_path / "net.pt", "--input", "1x3x8x8", "--no-bench", *options)
        assert result.exit_code == 0, result.output
        assert not (tmp_path / "net.fused.json").exists()
