"""Why a variant is not faster: each sentence comes from a fact, and where there is none that is said."""

from __future__ import annotations

from typing import Any

import pytest

from reparam.bench import Footprint, Ratio, Timing
from reparam.bench.reasons import UNKNOWN, Change, explained
from reparam.bench.speeds import Speeds

BEFORE = {"convolutions": 10, "linears": 1, "batch_norms": 10, "nodes": 40, "macs": 1_000_000}
ONLY_NORMS = {**BEFORE, "batch_norms": 0, "nodes": 30}
MERGED = {**BEFORE, "convolutions": 5, "batch_norms": 0, "nodes": 15, "macs": 600_000}
FEW = {**BEFORE, "batch_norms": 9, "nodes": 39}
IDLE = Speeds(launch=1e-7, macs=1e12, bandwidth=1e12)


def timing(value: float, backend: str = "eager", *, weights: int = 1000, **more: Any) -> Timing:
    """Original and fused at 10 ms, but for the ratio, which says what the verdict is."""
    ratio = Ratio("original", value, value - 0.01, value + 0.01, 30)
    return Timing(
        samples={"original": (0.01,) * 30, "fused": (0.01 / value,) * 30},
        warmup={},
        ratios={"fused": ratio},
        hardware="abacus",
        device="cpu",
        threads=1,
        torch_version="2",
        seed=0,
        footprints={label: Footprint(weights_bytes=weights) for label in ("original", "fused")},
        backends={"original": backend, "fused": backend},
        **more,
    )


CASES: list[tuple[str, Timing, dict[str, int], Speeds | None, list[str]]] = [
    ("nothing went", timing(1.0), BEFORE, IDLE, ["nothing was merged that this counts: both run 40 operations"]),
    ("few", timing(1.0), FEW, None, ["few layers were merged: 1 of 40 operations went"]),
    ("no fact", timing(1.0), MERGED, None, ["the counts and the measurements show no reason"]),
    (
        "the backend folds",
        timing(1.0, "compile"),
        ONLY_NORMS,
        None,
        ["what went are no convolutions and no linear layers, and torch.compile merges BatchNorm"],
    ),
    ("layers went", timing(1.0, "compile"), MERGED, None, ["the counts and the measurements show no reason"]),
    (
        "launching is little",
        timing(0.9),
        MERGED,
        IDLE,
        ["launching is a small share: the 25 operations that went cost about 0.0025 ms to launch"],
    ),
    (
        "computing",
        timing(1.0),
        ONLY_NORMS,
        Speeds(launch=1e-3, macs=1.25e8, bandwidth=1e12),
        ["computing takes most of the time: 1,000,000 multiply-adds, as many as before, are 8 ms of work"],
    ),
    (
        "reading",
        timing(1.0, weights=8_000_000),
        MERGED,
        Speeds(launch=1e-3, macs=1e12, bandwidth=1e9),
        ["reading the weights takes most of the time: 8 MB take about 8 ms of 10 ms"],
    ),
    (
        "doubtful",
        timing(1.0, warnings=("only 7 runs", "more")),
        BEFORE,
        IDLE,
        ["nothing was merged", "the measurement itself is doubtful: only 7 runs"],
    ),
]


@pytest.mark.parametrize(("name", "measured", "after", "speeds", "sentences"), CASES, ids=lambda value: str(value)[:20])
def test_reasons(
    name: str, measured: Timing, after: dict[str, int], speeds: Speeds | None, sentences: list[str]
) -> None:
    found = explained(measured, {"fused": Change(BEFORE, after)}, speeds).reasons["fused"]
    assert len(found) == len(sentences), found
    for reason, sentence in zip(found, sentences, strict=True):
        assert reason.startswith(sentence)


def test_what_is_faster_needs_no_reason() -> None:
    assert explained(timing(1.5), {"fused": Change(BEFORE, MERGED)}, IDLE).reasons == {}


def test_files_have_no_counts() -> None:
    assert explained(timing(1.0), {}, IDLE).reasons == {"fused": (UNKNOWN,)}


def test_multiply_adds_are_those_of_the_timed_inputs() -> None:
    slow = Speeds(launch=1e-3, macs=1.25e9, bandwidth=1e12)
    change = Change(BEFORE, ONLY_NORMS, scale=10)
    (reason,) = explained(timing(1.0), {"fused": change}, slow).reasons["fused"]
    assert reason.startswith("computing takes most of the time: 10,000,000 multiply-adds")
    (reason,) = explained(timing(1.0), {"fused": Change(BEFORE, ONLY_NORMS)}, slow).reasons["fused"]
    assert reason == "the counts and the measurements show no reason"


def test_labels_carry_their_backend() -> None:
    measured = timing(1.0)
    several = Timing(
        **{
            **{name: getattr(measured, name) for name in measured.__dataclass_fields__},
            "samples": {"original [eager]": (0.01,) * 30, "fused [eager]": (0.01,) * 30},
            "ratios": {"fused [eager]": Ratio("original [eager]", 1.0, 0.99, 1.01, 30)},
            "footprints": {"fused [eager]": Footprint()},
            "backends": {"original [eager]": "eager", "fused [eager]": "eager"},
        }
    )
    found = explained(several, {"fused": Change(BEFORE, BEFORE)}, IDLE).reasons
    assert found["fused [eager]"][0].startswith("nothing was merged")
