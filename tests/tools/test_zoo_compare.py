"""The zoo side by side: claims can turn red, a stopped run goes on, two engines never share a table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import zoo_compare
from benchmarks.zoo_compare import FIRST, keys, load, models, parse, pending, save
from benchmarks.zoo_compare_claims import FAILS, HOLDS, OPEN, at_least, claims, faster, no_slower
from benchmarks.zoo_compare_rows import Cell, Row, document, microseconds
from benchmarks.zoo_compare_table import markdown
from benchmarks.zoo_latency import Candidate
from benchmarks.zoo_variants import AUTHORS, FX, ONNXSIM, ORIGINAL, OURS, convert, onnx_files, sessions
from reparam.bench import Ratio
from tools import record
from tools.timm_zoo import randomise_batch_norms

CONDITIONS: dict[str, Any] = {
    "revision": "abc", "device": "cpu", "hardware": "abacus", "threads": 1, "machine": "default", "torch": "2",
    "timm": "1", "onnxruntime": "3",
}  # fmt: skip
FACTS: dict[str, Any] = {"command": "python x.py", "conditions": CONDITIONS}
BUILT = {"convolutions": 9, "batch_norms": 8, "linears": 1}
MERGED = {"before": BUILT, "after": {"convolutions": 4, "batch_norms": 0, "linears": 1}}
PLAIN = {"before": BUILT, "after": {"convolutions": 9, "batch_norms": 0, "linears": 1}}


def cell(runtime: str = "eager", doubts: tuple[str, ...] = (), **times: float) -> Cell:
    """A cell in which every variant takes the same time in each of thirty rounds."""
    names = {"original": ORIGINAL, "authors": AUTHORS, "fx": FX, "onnxsim": ONNXSIM, "ours": OURS}
    return Cell(runtime, "float32", 1, {names[key]: (value,) * 30 for key, value in times.items()}, doubts)


def row(model: str, *cells: Cell, counts: dict[str, Any] = MERGED, authors: bool = True) -> Row:
    errors = {ORIGINAL: 0.0, OURS: 1e-6, **({AUTHORS: 1e-6} if authors else {})}
    return Row("family", model, 10, 224, errors=errors, cells=cells, **counts)


def ratio(value: float, low: float, high: float, runs: int = 30) -> Ratio:
    return Ratio(ORIGINAL, value, low, high, runs)


JUDGED = [
    (at_least(2.5), ratio(2.6, 2.4, 2.8), HOLDS),
    (at_least(2.5), ratio(2.4, 2.3, 2.6), OPEN),
    (at_least(2.5), ratio(2.4, 2.3, 2.45), FAILS),
    (faster, ratio(1.2, 1.1, 1.3), HOLDS),
    (faster, ratio(1.2, 0.9, 1.3), OPEN),
    (faster, ratio(0.8, 0.7, 0.9), FAILS),
    (no_slower, ratio(0.97, 0.9, 1.01), HOLDS),
    (no_slower, ratio(0.8, 0.7, 0.9), FAILS),
    (no_slower, ratio(0.8, 0.7, 0.9, runs=3), OPEN),
]


@pytest.mark.parametrize(("judge", "measured", "verdict"), JUDGED)
def test_judges(judge: Any, measured: Ratio, verdict: str) -> None:
    assert judge(measured) == verdict


GOOD = [
    row("mobileone_s0", cell(original=9, authors=3, ours=3), cell("onnxruntime", original=9, authors=3, ours=3)),
    row("repvgg_a0", cell(original=9, authors=3, ours=3), cell("onnxruntime", original=9, authors=3, ours=8)),
    row("plain", cell(original=9, ours=3), cell("onnxruntime", original=9, ours=9), counts=PLAIN, authors=False),
]


def verdicts(rows: list[Row]) -> dict[str, str]:
    return {claim.text: claim.verdict for claim in claims(rows, "cpu")}


def test_claims_are_decided_by_the_data() -> None:
    found = verdicts(GOOD)
    assert found["onnxruntime: mobileone_s0, original / reparam at least 2.5"] == HOLDS
    assert found["onnxruntime: repvgg_a0, original / reparam at least 1.1"] == HOLDS
    assert found["eager: models with an author's conversion, reparam within 3% of it or faster"] == HOLDS
    assert found["onnxruntime: models with an author's conversion, reparam within 3% of it or faster"] == FAILS
    assert found["onnxruntime: plain Conv+BN networks, reparam no slower than the original"] == HOLDS
    assert found["eager: models with BatchNorm, reparam faster than the original"] == HOLDS
    slow = verdicts([row("plain", cell(original=9, ours=10), counts=PLAIN, authors=False)])
    assert slow["eager: plain Conv+BN networks, reparam no slower than the original"] == FAILS
    assert slow["eager: models with BatchNorm, reparam faster than the original"] == FAILS
    assert slow["onnxruntime: repvgg_a0, original / reparam at least 1.1"] == ""
    within = row("net", cell(original=9, authors=97.5, ours=100), cell("onnxruntime", original=9, authors=96, ours=100))
    assert list(verdicts([within]).values())[2:4] == [HOLDS, FAILS]
    # On a GPU the bounds of onnxruntime's CPU are no claim.
    assert not any("at least" in claim.text for claim in claims(GOOD, "cuda"))


def test_page() -> None:
    rows = [
        *GOOD,
        row("odd", cell("eager", ("busy",), original=9, fx=6, ours=4.5), authors=False),
        replace(row("broken"), failed="CaptureError: no"),
        replace(row("part"), cells=(Cell("onnxruntime", "float32", 1, failed="OOM"),), missing={AUTHORS: "none here"}),
    ]
    page = markdown(rows, FACTS)
    assert "on abacus" in page
    assert "`python x.py`: abacus, 1 thread(s), torch 2, timm 1, onnxruntime 3, reparam at abc. 6 models" in page
    assert "- **does not hold**: onnxruntime: models with an author's conversion" in page
    assert "does not hold for repvgg_a0 0.38 (0.38-0.38)" in page
    assert "- **holds**: onnxruntime: mobileone_s0, original / reparam at least 2.5 (1 of 1: 3.00 (3.00-3.00))" in page
    assert "| odd | 9 / 4 | 8 / 0 | 0.009 | 0.0045 | - | 1.50 (1.50-1.50)* | 2.00 (2.00-2.00)* | - | 30 |" in page
    assert "- broken: CaptureError: no" in page
    assert "- part (onnxruntime, float32, batch 1): OOM" in page
    assert "- part: none here" in page
    wrong = replace(GOOD[0], errors={AUTHORS: 0.5})
    assert "3.00 (3.00-3.00) wrong" in markdown([wrong], FACTS)
    chaotic = replace(GOOD[0], errors={AUTHORS: 0.5, OURS: 0.1})
    assert "wrong" not in markdown([chaotic], FACTS).partition("## eager")[2]


def test_saved_rows_come_back(tmp_path: Path) -> None:
    rows = {one.model: one for one in GOOD}
    save(tmp_path / "zoo_compare", rows, FACTS)
    assert load(tmp_path / "zoo_compare.json", CONDITIONS) == rows
    assert load(tmp_path / "none.json", CONDITIONS) == {}
    assert len((tmp_path / "zoo_compare.json").read_text().splitlines()) < 30, "a row is a line"
    assert json.loads(document([], FACTS))["rows"] == []


@pytest.mark.parametrize("key", list(CONDITIONS))
def test_two_engines_do_not_share_a_table(key: str, tmp_path: Path) -> None:
    save(tmp_path / "zoo_compare", {"a": GOOD[0]}, FACTS)
    with pytest.raises(ValueError, match=f"was measured with {key} {CONDITIONS[key]}, now other: move it away"):
        load(tmp_path / "zoo_compare.json", {**CONDITIONS, key: "other"})


def test_what_is_measured_and_in_which_order() -> None:
    found = [candidate.model for candidate in models("cpu")]
    assert tuple(found[:2]) == FIRST
    assert len(set(found)) == len(found) > 150
    assert [candidate.model for candidate in models("cuda")][:2] == list(FIRST)
    done = {"mobileone_s0": GOOD[0], "repvgg_a0": replace(row("repvgg_a0"), failed="no")}
    args = parse(["--models", "^(mobileone_s0|repvgg_a0|resnet18)$", "--runtimes", "compile,eager,onnxruntime"])
    due = [(candidate.model, keys) for candidate, keys in pending(args, done)]
    eager, onnx, compiled = (("eager", "float32", 1), ("onnxruntime", "float32", 1), ("compile", "float32", 1))
    assert due == [("resnet18", [eager, onnx]), ("mobileone_s0", [compiled]), ("resnet18", [compiled])]
    args.again = "failed"
    assert ("repvgg_a0", [eager, onnx]) in [(candidate.model, keys) for candidate, keys in pending(args, done)]


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = parse(["--device", "cuda"])
    assert len(keys(args)) == 3 * 4 * 2
    assert ("cuda-graphs", "tf32", 64) in keys(args)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wrong in (["--device", "cuda"], ["--runtimes", "cuda-graphs"]):
        with pytest.raises(SystemExit):
            parse(wrong)


class Net(nn.Module):
    """A network with one BatchNorm, in timm's manner."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.pretrained_cfg = {"input_size": (3, 16, 16)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stem(x)  # type: ignore[no-any-return]


@pytest.mark.slow
def test_variants_and_files(tmp_path: Path) -> None:
    model, x = randomise_batch_norms(Net()).eval(), torch.randn(1, 3, 16, 16)
    made = convert(model, x, torch.device("cpu"))
    assert list(made.variants) == [ORIGINAL, FX, OURS]
    assert made.missing == {AUTHORS: "timm has no conversion for this model"}
    assert (made.before["batch_norms"], made.after["batch_norms"]) == (1, 0)
    assert max(made.errors.values()) < 1e-4
    files, missing = onnx_files(made, x, tmp_path)
    assert list(files) == [ORIGINAL, FX, ONNXSIM, OURS]
    assert list(missing) == [AUTHORS]
    with torch.no_grad():
        expected = model(x)
    for session in sessions(files, 1).values():
        (answer,) = torch.utils._pytree.tree_leaves(session(x))
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_samples_are_microseconds_with_four_digits() -> None:
    assert microseconds([0.00123456, 1.0]) == (1235.0, 1e6)


def test_a_run_measures_saves_stops_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[str] = []

    def create(name: str) -> nn.Module:
        built.append(name)
        if name == "broken":
            raise RuntimeError("no such model")
        return Net().eval()

    names = ["small", "broken"]
    monkeypatch.setattr(zoo_compare.timm_zoo, "create", create)
    monkeypatch.setattr(zoo_compare, "models", lambda device: [Candidate("f", name, 1) for name in names])
    monkeypatch.setattr(zoo_compare, "conditions", lambda args: CONDITIONS)
    monkeypatch.setattr(zoo_compare, "claims", lambda rows, device: [])  # no verdict of this test hangs on time
    monkeypatch.setattr(zoo_compare.signal, "signal", lambda *_: None)
    arguments = ["--seconds", "0", "--out", str(tmp_path), "--runtimes", "eager"]
    threads = torch.get_num_threads()
    try:
        assert zoo_compare.main([*arguments, "--budget", "-1"]) == 0
        assert built == []
        assert zoo_compare.main(arguments) == 1, "a model that fails must be noticed"
        assert zoo_compare.main(arguments) == 1
        assert built == names, "measured twice"
        monkeypatch.setattr(zoo_compare, "conditions", lambda args: {**CONDITIONS, "revision": "def"})
        assert zoo_compare.main(arguments) == 2
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "the budget is over" in said
    assert "measured with revision abc, now def" in said
    rows = load(tmp_path / "zoo_compare.json", CONDITIONS)
    assert rows["broken"].failed == "RuntimeError: no such model"
    assert set(rows["small"].cells[0].samples) == {ORIGINAL, FX, OURS}
    assert (tmp_path / "zoo_compare.md").exists()


def test_revision_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(record.subprocess, "run", missing)
    assert record.engine_revision().startswith("unknown-changed-")


def test_shards_are_disjoint_and_are_put_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = [candidate.model for candidate, _ in pending(parse([]), {})]
    parts = [[candidate.model for candidate, _ in pending(parse(["--shard", f"{n}/3"]), {})] for n in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(whole)
    assert parts[0][:2] == [whole[0], whole[3]]
    for name, held in (("a", GOOD[:1]), ("b", GOOD[1:])):
        save(tmp_path / name / "zoo_compare", {one.model: one for one in held}, FACTS)
    folders = [str(tmp_path / name) for name in "ab"]
    assert zoo_compare.main(["--merge", *folders, "--out", str(tmp_path)]) == 0
    assert set(load(tmp_path / "zoo_compare.json", CONDITIONS)) == {one.model for one in GOOD}
    assert "--shard 1/2" in (tmp_path / "zoo_compare.md").read_text()
    other = {**FACTS, "conditions": {**CONDITIONS, "revision": "def"}}
    save(tmp_path / "b" / "zoo_compare", {GOOD[1].model: GOOD[1]}, other)
    assert zoo_compare.main(["--merge", *folders, "--out", str(tmp_path)]) == 2
    assert "revision" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(["--shard", "4/3"])
