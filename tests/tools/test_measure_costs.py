"""The measurement's arithmetic, and that the committed constants are the measured ones; nothing looks at a clock."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from reparam.passes.machines import CUDA, EAGER_CPU, MACHINES, Machine
from tools.cost_table import NAMES, Ranked, as_python, load, markdown, save, score
from tools.measure_costs import ROOT, Priced, all_priced_layers, all_priced_pairs, fit, ratio, refitted, repriced

FACTS, RESULTS = load(ROOT / "tools" / "results")
PASTED = [result for result in RESULTS if result.threads == 1]


@pytest.fixture(scope="module")
def layers() -> list[Priced]:
    return list(all_priced_layers().values())


TRUE = [EAGER_CPU, Machine(1e-6, 0.0, 0.0, 4e10, 1e10, 5e9, 2e8, 3e9, 2e10, 3e10, block=4, pads_apart=False)]


@pytest.mark.slow
@pytest.mark.parametrize("machine", TRUE, ids=["eager", "no layer price"])
def test_the_fit_finds_the_constants_that_made_the_times(machine: Machine, layers: list[Priced]) -> None:
    start = replace(CUDA, pads_apart=machine.pads_apart)
    found = fit(layers, [layer.seconds(machine) for layer in layers], start)
    for name, value in asdict(machine).items():
        assert getattr(found, name) == pytest.approx(value, rel=0.03, abs=1e-9), name


@pytest.mark.slow
def test_constants_that_are_held_stay(layers: list[Priced]) -> None:
    """The times are those of another pooling and of a launch that is held: only the pooling is found."""
    true = replace(EAGER_CPU, windows=5e8, taps=9e9)
    times = [layer.seconds(true) for layer in layers]
    assert fit(layers, times, EAGER_CPU, ["windows", "taps"]) == true
    off = fit(layers, times, replace(EAGER_CPU, launch=1e-6), ["windows", "taps"])
    assert off.launch == 1e-6
    assert off != replace(true, launch=1e-6)


def test_the_constants_are_those_that_were_measured() -> None:
    """Who edits a constant by hand, or measures again and forgets to paste, is told."""
    assert {result.runtime for result in PASTED} == {"eager", "onnxruntime"}
    for result in PASTED:
        assert MACHINES[NAMES[result.runtime]] == result.machine, f"paste:\n{as_python(result)}"


@pytest.mark.slow
def test_fitting_again_to_the_measured_layers_changes_nothing() -> None:
    """The fitted constants follow from the times in the file; a result that lacks a constant is left alone."""
    names = FACTS["constants"].split(",")
    off = [replace(result, machine=replace(result.machine, **dict.fromkeys(names, 1.0))) for result in PASTED]
    assert [result.machine for result in refitted(off, names)] == [result.machine for result in PASTED]
    lacking = replace(PASTED[0], machine=replace(PASTED[0].machine, taps=math.nan))
    assert refitted([lacking], names) == [lacking]


@pytest.mark.slow
def test_the_table_is_that_of_the_constants() -> None:
    sides = all_priced_pairs()
    for result in RESULTS:
        machine = MACHINES[NAMES[result.runtime]]
        for one in result.ranked:
            again = ratio(sides[one.pair], machine)
            assert one.committed == pytest.approx(again, rel=1e-9), "run tools/measure_costs.py --reprice"


def test_most_pairs_are_ranked_as_the_clock_does() -> None:
    for result in PASTED:
        good, decided = (int(number) for number in score(result, "committed").split(" of "))
        assert decided > 40
        assert good / decided > 0.9, result.runtime


@pytest.mark.slow
def test_a_worse_machine_ranks_worse() -> None:
    """The score can fall: on a machine where only launches cost, the pairs that trade work for launches are wrong."""
    sides = all_priced_pairs()
    launches = Machine(1.0, 0.0, 0.0, *(1e30,) * 7)
    for result in PASTED:
        worse = replace(
            result, ranked=tuple(replace(one, committed=ratio(sides[one.pair], launches)) for one in result.ranked)
        )
        good, decided = (int(number) for number in score(worse, "committed").split(" of "))
        assert good / decided < 0.8


@pytest.mark.slow
def test_repricing_drops_what_the_probes_no_longer_have() -> None:
    """Layers and pairs that were renamed or removed since cannot be priced; the others keep what the clock said."""
    (result,) = [one for one in PASTED if one.runtime == "eager"]
    gone = replace(
        result,
        layers={**result.layers, "depthwise 99x99 of 1x1x1x1": (1.0, 1.0)},
        ranked=(*result.ranked, replace(result.ranked[0], pair="a | b")),
        errors={"fitted": 1.0, "committed": 99.0},
    )
    nothing = replace(gone, layers={"depthwise 99x99 of 1x1x1x1": (1.0, 1.0)})
    (again,) = repriced([gone, nothing])
    assert (again.layers, again.ranked) == (result.layers, result.ranked)
    assert again.errors == {"fitted": 1.0, "committed": pytest.approx(result.errors["committed"])}


def test_results_older_than_a_constant_are_read(tmp_path: Path) -> None:
    (first, *_) = RESULTS
    save(tmp_path, FACTS, [first])
    file = tmp_path / "costs.json"
    rows = json.loads(file.read_text())
    del rows["results"][0]["machine"]["taps"]
    file.write_text(json.dumps(rows))
    facts, (again,) = load(tmp_path)
    assert (facts, again.ranked, again.machine.launch) == (FACTS, first.ranked, first.machine.launch)
    assert math.isnan(again.machine.taps)
    assert "| - |" in markdown([again], facts)


def ranked(**values: Any) -> Ranked:
    plain = {"pair": "a | b", "first": 2.0, "second": 1.0, "ratio": 2.0, "low": 1.9, "high": 2.1}
    return Ranked(**{**plain, "fitted": 1.5, "committed": 1.5, **values})


@pytest.mark.parametrize(
    ("one", "decided", "agrees"),
    [
        (ranked(), True, True),
        (ranked(committed=0.9), True, False),
        (ranked(committed=1.0), True, False),
        (ranked(ratio=0.5, low=0.4, high=0.6, committed=0.9), True, True),
        (ranked(low=0.99), False, True),
        (ranked(ratio=1.02, low=1.01, high=1.03), False, True),
    ],
)
def test_what_counts_as_agreeing(one: Ranked, decided: bool, agrees: bool) -> None:
    assert (one.decided, one.agrees(one.committed)) == (decided, agrees)


def test_the_file_says_where_it_was_measured() -> None:
    assert FACTS["hardware"]
    assert json.dumps(FACTS).count("/home") == 0
