"""`reparam bench`: one file beside its fused form, grids, results that outlive an interrupt, options that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reparam import bench_files as work
from reparam import runtimes
from reparam.bench import Series
from tests.cli.test_compare import invoke, samples_of
from tests.cli.test_fuse import network

QUICK = ("--input", "2x3x8x8", "--seconds", 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "model.pt"
    torch.save(network(), path)
    return path


def series_of(text: str) -> Series:
    return Series.from_dict(json.loads(text))


def test_one_file_is_fused_and_measured_beside_its_fused_form(model: Path) -> None:
    result = invoke("bench", model, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    assert list(samples_of(result)) == ["original", "fused"]
    (cell,) = series_of(result.stdout).cells
    assert cell.timing is not None
    original, fused = cell.timing.footprints["original"], cell.timing.footprints["fused"]
    assert original.disk_bytes == model.stat().st_size
    assert original.load_seconds is not None
    assert fused.disk_bytes is None
    assert original.weights_bytes is not None
    assert fused.weights_bytes is not None
    assert original.weights_bytes > fused.weights_bytes
    assert min(original.peak_bytes or 0, fused.peak_bytes or 0) > 0
    text = invoke("bench", model, *QUICK).stdout
    assert "against original" in text
    for word in ("weights", "peak memory", "on disk", "time to load", "time to build", "first call"):
        assert word in text
    page = invoke("bench", model, *QUICK, "--format", "markdown").stdout
    assert page.startswith("## Latency: as given")
    assert "| fused |" in page


def test_a_grid_has_a_cell_for_every_combination(model: Path) -> None:
    grid = ("--batch", "1,3", "--size", "8x6", "--dtype", "float32", "--dtype", "bfloat16", "--threads", 1)
    result = invoke("bench", model, *QUICK, *grid, "--json")
    assert result.exit_code == 0, result.output
    found = {str(cell.setting): cell.timing for cell in series_of(result.stdout).cells}
    assert list(found) == [
        f"batch {batch}, 8x6, {dtype}, 1 thread" for batch in (1, 3) for dtype in ("float32", "bfloat16")
    ]
    timing = found["batch 3, 8x6, bfloat16, 1 thread"]
    assert timing is not None
    assert timing.conditions == {"inputs": "3x3x8x6", "dtype": "bfloat16"}
    assert timing.threads == 1
    text = invoke("bench", model, *QUICK, "--batch", "1,3").stdout
    assert [line.split("  ")[0] for line in text.splitlines() if line.startswith("batch")].count("batch 3") == 2


def test_what_a_model_cannot_do_at_one_setting_is_said_and_the_rest_measured(model: Path) -> None:
    result = invoke("bench", model, *QUICK, "--dtype", "float32,tf32", "--json")
    plain, tf32 = series_of(result.stdout).cells
    assert result.exit_code == 0
    assert plain.timing is not None
    assert "TF32 is a format of NVIDIA's GPUs" in tf32.failed
    alone = invoke("bench", model, *QUICK, "--dtype", "tf32")
    assert alone.exit_code == 2
    assert "TF32 is a format of NVIDIA's GPUs" in alone.stderr
    none = invoke("bench", model, *QUICK, "--dtype", "tf32", "--batch", "1,2")
    assert none.exit_code == 2
    assert none.stdout.count("not measured: TF32") == 2


def interrupted_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Makes the `number`-th cell end as Ctrl-C would end it."""
    timed, calls = work.timed, list[int]()

    def stop(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return timed(*args, **options)

    monkeypatch.setattr(work, "timed", stop)


def test_an_interrupted_run_keeps_its_cells_and_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.json"
    command = ("bench", model, *QUICK, "--batch", "1,2,3", "--out", out)
    with monkeypatch.context() as patch:
        interrupted_at(patch, 3)
        stopped = invoke(*command)
    assert stopped.exit_code == 130
    assert "interrupted; what was measured is kept" in stopped.stderr
    assert "against original" in stopped.stdout
    kept = series_of(out.read_text())
    assert kept.partial
    assert [str(cell.setting) for cell in kept.cells] == ["batch 1", "batch 2"]
    resumed = invoke(*command)
    assert resumed.exit_code == 0
    assert "2 of 3 cells were measured by an earlier run" in resumed.stdout
    whole = series_of(out.read_text())
    assert not whole.partial
    assert whole.cells[:2] == kept.cells
    assert str(whole.cells[2].setting) == "batch 3"
    assert list(tmp_path.iterdir()) == [out], "a draft was left"


def test_an_interrupt_before_the_first_result_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_at(monkeypatch, 1)
    result = invoke("bench", model, *QUICK, "--out", tmp_path / "results.json")
    assert result.exit_code == 130
    assert "nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_within_a_cell_keeps_its_rounds_and_measures_it_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reparam.bench import measure

    rounds = list[int]()
    one = measure._round

    def stop(*args: Any) -> Any:
        rounds.append(1)
        if len(rounds) == 6:  # two rounds of warm-up come first
            raise KeyboardInterrupt
        return one(*args)

    out = tmp_path / "results.json"
    with monkeypatch.context() as patch:
        patch.setattr(measure, "_round", stop)
        result = invoke("bench", model, *QUICK, "--out", out)
    assert result.exit_code == 130
    (cell,) = series_of(out.read_text()).cells
    assert cell.timing is not None
    assert (cell.timing.partial, cell.timing.runs) == (True, 3)
    assert invoke("bench", model, *QUICK, "--out", out).exit_code == 0
    (cell,) = series_of(out.read_text()).cells
    assert cell.is_complete


def test_results_of_something_else_are_not_gone_on_from(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    assert invoke("bench", model, *QUICK, "--out", out).exit_code == 0
    before = out.read_text()
    other = invoke("bench", model, *QUICK, "--out", out, "--channels-last")
    assert other.exit_code == 2
    assert "was measured with layout not said, now channels last" in other.stderr
    assert out.read_text() == before
    for content in ("{}", "[1]", "no JSON"):
        out.write_text(content)
        result = invoke("bench", model, *QUICK, "--out", out)
        assert result.exit_code == 2
        assert "is no result of this version of `reparam bench`" in result.stderr
        assert out.read_text() == content


REFUSED = [
    (("--backend", "steam"), "there is no backend 'steam'; choose from eager, compile, export, onnxruntime"),
    (("--backend", "onnxruntime-cuda"), "CUDAExecutionProvider runs on cuda, and the model is on cpu"),
    (("--cuda-graphs",), "CUDA graphs need a CUDA device"),
    (("--device", "abacus"), "device 'abacus' cannot be used"),
    (("--batch", "0"), "'0' is no whole number of at least 1"),
    (("--batch", "1,x"), "'x' is no whole number"),
    (("--size", "8x"), "'8x' is no size; write 224, or 224x192"),
    (("--dtype", "int8"), "'int8' is not known; choose from float32, tf32"),
    (("--threads", "-1"), "'-1' is no whole number"),
    (("--out", "/"), "give --out the name of a file"),
    (("--out", "/nowhere/at/all.json"), "give --out the name of a file"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_is_one_sentence(model: Path, options: tuple[str, ...], sentence: str) -> None:
    result = invoke("bench", model, *QUICK, *options)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_backends_side_by_side(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    named = invoke("bench", model, *QUICK, "--backend", "openvino")
    assert named.exit_code == 2
    assert "backend 'openvino' is not here: OpenVINO is not installed; install it with" in named.stderr
    result = invoke("bench", model, *QUICK, "--backend", "eager", "--backend", "export", "--backend", "onnxruntime")
    assert result.exit_code == 0, result.output
    for label in ("original [eager]", "fused [eager]", "fused [export]", "fused [onnxruntime]"):
        assert label in result.stdout
