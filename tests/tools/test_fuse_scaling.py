"""Growth of fusing with depth and width: the verdict can turn red, and a stopped run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fuse_scaling
from benchmarks.fuse_scaling import Row, build, growth, load, main, markdown, memory, parse, pending, save, too_steep

CONDITIONS = {"revision": "abc", "hardware": "abacus", "threads": 1, "torch": "2"}
FACTS: dict[str, Any] = {"command": "python x.py", "conditions": CONDITIONS}


def row(depth: int, ours: float, theirs: float = 1.0, kind: str = "chain", width: int = 16) -> Row:
    samples = {"ours": [ours], "theirs": [theirs]}
    ratio = ours / theirs
    return Row(kind, depth, width, 2**20, 9, ours, theirs, ratio, ratio, ratio, 2**21, None, samples)


LINEAR = [row(50, 0.5), row(200, 2.2), row(50, 0.5, width=64)]


def test_growth() -> None:
    assert growth(LINEAR, "ours") == {"chain, width 16": pytest.approx(1.1)}
    assert too_steep(LINEAR) == []
    assert too_steep([row(50, 0.5), row(200, 4.0)]) == ["chain, width 16: 2.00"]
    assert too_steep([row(50, 0.5), row(200, 4.0, kind="branches")]) == [], "two networks of one kind are compared"


def test_page() -> None:
    page = markdown(LINEAR, FACTS)
    assert "`python x.py`: abacus, 1 thread(s), torch 2, reparam at abc." in page
    row_of_16 = "| chain | 200 | 16 | 1.0 | 1000 | 2200 | 2.20 (2.20-2.20) | 5.00 | 11.00 | - | 2.0 | 9 |"
    assert row_of_16 in page
    assert "- chain, width 16: ours 1.10, theirs 0.25" in page
    assert "Ours grows with the depth." in page
    assert "Ours grows faster than the depth: chain, width 16: 2.00." in markdown([row(50, 0.5), row(200, 4.0)], FACTS)
    assert "Only one depth was measured so far." in markdown(LINEAR[1:], FACTS)


@pytest.mark.slow
def test_a_run_saves_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuse_scaling, "conditions", lambda args: CONDITIONS)
    monkeypatch.setattr(fuse_scaling, "memory_in_child", lambda way, key: 7)
    monkeypatch.setattr(fuse_scaling, "GROWTH_LIMIT", float("inf"))  # no verdict of this test hangs on time
    arguments = [
        "--kinds",
        "chain",
        "--depths",
        "2,3",
        "--widths",
        "4",
        "--seconds",
        "0",
        "--runs",
        "1",
        "--out",
        str(tmp_path),
    ]
    threads = torch.get_num_threads()
    try:
        assert main([*arguments, "--budget", "-1"]) == 0
        assert load(tmp_path / "fuse_scaling.json", CONDITIONS) == {}
        assert main(arguments) == 0
        rows = load(tmp_path / "fuse_scaling.json", CONDITIONS)
        assert set(rows) == {("chain", 2, 4), ("chain", 3, 4)}
        assert all(row.runs >= 1 and row.ours > 0 and row.ours_extra == 7 for row in rows.values())
        assert list(pending(parse(arguments), rows)) == []
        monkeypatch.setattr(fuse_scaling, "conditions", lambda args: {**CONDITIONS, "revision": "def"})
        assert main(arguments) == 2
    finally:
        torch.set_num_threads(threads)
    assert "was measured with revision abc, now def: move it away, or pass --again all" in capsys.readouterr().out


def test_saved_rows_come_back(tmp_path: Path) -> None:
    rows = {one.key: one for one in LINEAR}
    save(tmp_path, rows, FACTS)
    assert load(tmp_path / "fuse_scaling.json", CONDITIONS) == rows


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, which tells the peak of memory")
def test_memory_of_a_call() -> None:
    model, x = build("branches", 3, 8)
    assert x.shape == (1, 8, 8, 8)
    assert memory("ours", ("branches", 3, 8)) >= 0
    assert sum(p.numel() for p in model.parameters()) > 3 * 8 * 8 * 10
