"""Measures the constants of `reparam/passes/machines.py` on this machine, and how well they rank alternatives.

    python tools/measure_costs.py [--runtimes eager,onnxruntime,cuda] [--threads 1,0] [--seconds 40]
        [--constants launch,layer,...] [--refit | --reprice]

Constants: each layer of `tools/cost_probes.py` is run once and four times in a row; a third of the difference is its
time inside a network. The constants are the non-negative least squares of the relative errors over all layers; they are
printed as Python, ready to paste. Ranking: the alternatives of each pair run in turn, in random order, and the clock
decides where the 95% bootstrap interval of their ratio excludes 1 and the medians differ by 3% or more. The model
ranks a pair as the clock does if it prices the faster one lower. It is asked twice: with the constants just measured,
and with those in `machines.py`; `--reprice` asks it again after these were edited, and measures nothing.

`--constants` fits only those named and holds the others at what `machines.py` says, so that choices that do not depend
on them stay; `--refit` fits again to the layers of the last run, and measures nothing.

With 1 thread the clock is the processor time of the thread that calls, which other processes disturb little; else it is
the wall clock.

Results go to `tools/results/costs.json` and `.md`, where they replace those of the same runtime and number of threads.
`--threads 0` is torch's default number; runtimes that this machine does not have are left out.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from reparam.bench import statistics  # noqa: E402
from reparam.bench.machine import Clock, WallClock, clock_for, hardware_name, system_load  # noqa: E402
from reparam.bench.measure import Runner, measure  # noqa: E402
from reparam.capture.trace import capture  # noqa: E402
from reparam.graph.constants import Constants  # noqa: E402
from reparam.graph.lift import is_view  # noqa: E402
from reparam.graph.lifted import LiftedGraph  # noqa: E402
from reparam.graph.normal import normalise  # noqa: E402
from reparam.graph.table import TABLE  # noqa: E402
from reparam.passes.cost import CostModel  # noqa: E402
from reparam.passes.machines import MACHINES, Machine  # noqa: E402
from reparam.passes.region import Region  # noqa: E402
from reparam.passes.search import merging_pays  # noqa: E402
from tools.cost_probes import Pair, Probe, pairs, probes  # noqa: E402
from tools.cost_table import NAMES, Ranked, Result, as_python, load, save, score  # noqa: E402

SECONDS = ("launch", "layer", "grouped")
RATES = ("macs", "depthwise", "wide", "windows", "taps", "bandwidth", "layer_bandwidth")
CONSTANTS = (*SECONDS, *RATES)
BLOCKS = (1, 4, 8, 16)
LAYERS = 4
REPEATED = 3
# Shorter calls are repeated until they take this long, so that the clock's own time does not count.
CALL_SECONDS = 2e-4

Call = Callable[[], Any]


class ThreadClock(WallClock):
    """Times a call by the processor time of this thread: what other processes take away does not count."""

    def time(self, call: Call) -> float:
        """Processor seconds of this thread between call and return."""
        start = time.thread_time()
        call()
        return time.thread_time() - start


def clock(runtime: str, threads: int) -> Clock:
    """Processor time where the calling thread does all the work, else the clock that bench uses."""
    if runtime != "cuda" and threads == 1:
        return ThreadClock()
    return clock_for(torch.device("cuda" if runtime == "cuda" else "cpu"))


def repeated(make: Callable[[], nn.Module], count: int, relu: bool) -> nn.Module:
    """`count` layers in a row; ReLUs between keep a runtime from merging them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [make(), nn.ReLU()] if relu else [make()]
    return nn.Sequential(*layers).eval()


def caller(runtime: str, module: nn.Module, shape: tuple[int, ...], threads: int, folder: Path) -> Call:
    """A call that runs the module once in the runtime."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if runtime != "onnxruntime":
        device = "cuda" if runtime == "cuda" else "cpu"
        module, x = module.to(device), x.to(device)
        return lambda: module(x)
    import onnxruntime

    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    logging.disable(logging.WARNING)
    torch.onnx.export(module, (x,), str(path), dynamo=False, input_names=["x"], output_names=["y"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    # Or the threads of all the other sessions would still wait for work, busily, while this one is measured.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), sess_options=options, providers=["CPUExecutionProvider"])
    feeds = {"x": x.numpy()}
    return lambda: session.run(["y"], feeds)


def samples(calls: dict[str, Call], ticks: Clock, seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, paired and interleaved; entry `i` of every label belongs to one round."""
    counts: dict[str, int] = {}

    def loop(call: Call, count: int) -> Call:
        def run() -> None:
            for _ in range(count):
                call()

        return run

    runners = []
    with torch.inference_mode():
        for label, call in calls.items():
            for _ in range(3):
                call()
            once = min(ticks.time(call) for _ in range(3))
            counts[label] = max(1, min(200, round(CALL_SECONDS / once)))
            ready = loop(call, counts[label])
            runners.append(Runner(label, lambda ready=ready: ready, ticks, label))  # type: ignore[misc]
        measured = measure(runners, min_runs=7, max_seconds=seconds, seed=0)
    if measured.partial:
        raise KeyboardInterrupt
    return {label: [one / counts[label] for one in measured.samples[label]] for label in calls}


class Priced:
    """A module as the cost model sees it."""

    def __init__(self, module: nn.Module, shape: tuple[int, ...]) -> None:
        captured = capture(module, torch.randn(shape))
        normalise(captured.graph, captured.root)
        self._graph, self._root = captured.graph, captured.root
        lifted = LiftedGraph(captured.graph, captured.root, TABLE, Constants(captured.graph, captured.root))
        self._affine = Region(captured.graph, captured.root, lifted, merging_pays(CostModel())).affine

    def seconds(self, machine: Machine) -> float:
        """Price of all its operations."""
        model, total = CostModel(machine), 0.0
        for node in self._graph.nodes:
            found = self._affine.get(node)
            view = found is not None and is_view(found.lift)
            maps = (found.maps, found.axis) if found is not None else ()
            total += (model.of_view() if view else model.of_node(node, self._root, *maps)).seconds
        return total


def unit(name: str, block: int) -> Machine:
    """A machine on which everything is free but what one constant prices, and that costs a second each."""
    return Machine(**{**{other: free(other) for other in CONSTANTS}, name: 1.0}, block=block)


def fit(
    layers: Sequence[Priced], measured: Sequence[float], start: Machine, names: Sequence[str] = CONSTANTS
) -> Machine:
    """The machine whose prices of the layers are nearest to their measured seconds, in relative terms.

    Args:
        start: says whether padding is apart, and all constants that are not in `names`; the block among them unless all
            of `CONSTANTS` are fitted.
    """
    best: tuple[float, Machine] | None = None
    for block in BLOCKS if set(names) == set(CONSTANTS) else (start.block,):
        held = replace(start, **{name: free(name) for name in names}, block=block)
        table = np.array([[layer.seconds(unit(name, block)) for name in names] for layer in layers])
        rest = 1 - np.array([layer.seconds(held) for layer in layers]) / np.array(measured)
        prices = dict(zip(names, non_negative(table / np.array(measured)[:, None], rest), strict=True))
        values = {
            name: price if name in SECONDS else 1 / price if price else math.inf for name, price in prices.items()
        }
        machine = replace(held, **{name: rounded(value) for name, value in values.items()})
        error = float(np.mean(misses(machine, layers, measured)))
        if best is None or error < best[0]:
            best = error, machine
    assert best is not None
    return best[1]


def free(name: str) -> float:
    """The value at which a constant prices nothing."""
    return 0.0 if name in SECONDS else math.inf


def non_negative(table: Any, target: Any) -> Any:
    """Least squares of `table @ x = target` with `x >= 0`: the most negative is set to zero until none is left."""
    scale = np.abs(table).max(axis=0)
    kept = [column for column in range(table.shape[1]) if scale[column] > 0]
    full = np.zeros(table.shape[1])
    while kept:
        solution = np.linalg.lstsq(table[:, kept] / scale[kept], target, rcond=None)[0]
        if solution.min() >= 0:
            full[kept] = solution / scale[kept]
            break
        kept.pop(int(solution.argmin()))
    return full


def rounded(value: float) -> float:
    """Two digits are more than a machine repeats."""
    return float(f"{value:.1e}")


def misses(machine: Machine, layers: Iterable[Priced], measured: Iterable[float]) -> list[float]:
    """How far each layer's price is from its measured seconds, in logarithms."""
    return [abs(math.log(layer.seconds(machine) / took)) for layer, took in zip(layers, measured, strict=True)]


def spread(machine: Machine, layers: Iterable[Priced], measured: Iterable[float]) -> float:
    """Median factor by which a price misses its measured seconds."""
    return math.exp(statistics.median(misses(machine, layers, measured)))


def measured_layers(found: Sequence[Probe], runtime: str, threads: int, seconds: float, folder: Path) -> list[float]:
    """Seconds of each layer inside a network."""
    calls: dict[str, Call] = {}
    for index, probe in enumerate(found):
        for count in (1, LAYERS):
            module = repeated(probe.make, count, relu=False)
            calls[f"{index}/{count}"] = caller(runtime, module, probe.shape, threads, folder)
    took = samples(calls, clock(runtime, threads), seconds)
    ones, many = ([took[f"{index}/{count}"] for index in range(len(found))] for count in (1, LAYERS))
    return [
        statistics.median([(b - a) / (LAYERS - 1) for a, b in zip(one, more, strict=True)])
        for one, more in zip(ones, many, strict=True)
    ]


def rank(
    found: Sequence[Pair], runtime: str, threads: int, seconds: float, fitted: Machine, folder: Path
) -> list[Ranked]:
    """Every pair by the clock and by both sets of constants."""
    committed, ranked = MACHINES[NAMES[runtime]], []
    calls: dict[str, Call] = {}
    prices = priced_pairs(found)
    for index, pair in enumerate(found):
        for side, make in (("a", pair.first), ("b", pair.second)):
            module = repeated(make, REPEATED, relu=True)
            calls[f"{index}{side}"] = caller(runtime, module, pair.shape, threads, folder)
    took = samples(calls, clock(runtime, threads), seconds)
    for index, pair in enumerate(found):
        a, b = f"{index}a", f"{index}b"
        interval = statistics.ratio_interval(took[a], took[b], seed=0)
        by_price = [ratio(prices[pair.name], machine) for machine in (fitted, committed)]
        ranked.append(Ranked(pair.name, statistics.median(took[a]), statistics.median(took[b]), *interval, *by_price))
    return ranked


def run(runtime: str, threads: int, args: argparse.Namespace) -> Result:
    """Constants and ranking of one runtime."""
    torch.set_num_threads(threads)
    load_before = system_load()
    found = list(probes())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        took = measured_layers(found, runtime, threads, args.seconds, folder)
        layers = [Priced(repeated(probe.make, 1, relu=False), probe.shape) for probe in found]
        # A layer that is lost in the noise of its neighbours says nothing.
        sound = [index for index, seconds in enumerate(took) if seconds > 1e-7]
        kept, times = [layers[i] for i in sound], [took[i] for i in sound]
        machine = fit(kept, times, MACHINES[NAMES[runtime]], args.constants.split(","))
        errors = {"fitted": spread(machine, kept, times)}
        errors["committed"] = spread(MACHINES[NAMES[runtime]], kept, times)
        ranked = rank(list(pairs()), runtime, threads, args.seconds, machine, folder)
    by_layer = {layer_name(found[i]): (took[i], layers[i].seconds(machine)) for i in sound}
    return Result(runtime, threads, load_before, machine, errors, by_layer, tuple(ranked))


@cache
def all_priced_pairs() -> dict[str, tuple[Priced, Priced]]:
    """Every pair, priced."""
    return priced_pairs(pairs())


@cache
def all_priced_layers() -> dict[str, Priced]:
    """Every probe's layer by its name, priced."""
    return {layer_name(probe): Priced(repeated(probe.make, 1, relu=False), probe.shape) for probe in probes()}


def priced_pairs(found: Iterable[Pair]) -> dict[str, tuple[Priced, Priced]]:
    """Both sides of each pair, by its name."""
    return {
        pair.name: (
            Priced(repeated(pair.first, REPEATED, relu=True), pair.shape),
            Priced(repeated(pair.second, REPEATED, relu=True), pair.shape),
        )
        for pair in found
    }


def repriced(results: Iterable[Result]) -> list[Result]:
    """The results with the ratios and errors of the constants that are in `machines.py` now.

    Layers and pairs that `cost_probes.py` no longer has cannot be priced: they are dropped, and with the last of either
    the result.
    """
    sides, layers = all_priced_pairs(), all_priced_layers()
    new = []
    for result in results:
        machine = MACHINES[NAMES[result.runtime]]
        ranked = tuple(
            replace(one, committed=ratio(sides[one.pair], machine)) for one in result.ranked if one.pair in sides
        )
        kept = {name: row for name, row in result.layers.items() if name in layers}
        if not (ranked and kept):
            continue
        error = spread(machine, [layers[name] for name in kept], [seconds for seconds, _ in kept.values()])
        new.append(replace(result, layers=kept, ranked=ranked, errors={**result.errors, "committed": error}))
    return new


def refitted(results: Iterable[Result], names: Sequence[str]) -> list[Result]:
    """The results with the constants in `names` fitted again; those that lack a constant or a layer stay."""
    sides, layers = all_priced_pairs(), all_priced_layers()
    new = []
    for result in results:
        if any(math.isnan(getattr(result.machine, name)) for name in CONSTANTS) or not set(result.layers) <= set(
            layers
        ):
            new.append(result)
            continue
        kept, took = [layers[name] for name in result.layers], [seconds for seconds, _ in result.layers.values()]
        machine = fit(kept, took, MACHINES[NAMES[result.runtime]], names)
        new.append(
            replace(
                result,
                machine=machine,
                errors={**result.errors, "fitted": spread(machine, kept, took)},
                layers={name: (seconds, layers[name].seconds(machine)) for name, (seconds, _) in result.layers.items()},
                ranked=tuple(replace(one, fitted=ratio(sides[one.pair], machine)) for one in result.ranked),
            )
        )
    return new


def ratio(sides: tuple[Priced, Priced], machine: Machine) -> float:
    """Price of the first over that of the second."""
    return sides[0].seconds(machine) / sides[1].seconds(machine)


def layer_name(probe: Probe) -> str:
    """The layer and its input's size."""
    return f"{probe.name} of {'x'.join(map(str, probe.shape))}"


def available(names: Iterable[str]) -> list[str]:
    """The runtimes of `names` that this machine has."""
    from importlib.util import find_spec

    there = {
        "eager": True,
        "onnxruntime": find_spec("onnxruntime") is not None,
        "cuda": torch.cuda.is_available(),
    }
    return [name for name in names if there[name]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", default="eager,onnxruntime,cuda", help="of these, those that are there")
    parser.add_argument("--threads", default="1,0", help="numbers of threads; 0 is torch's default")
    parser.add_argument("--seconds", type=float, default=40.0, help="for the layers, and again for the pairs")
    parser.add_argument("--constants", default=",".join(CONSTANTS), help="fit these; the others stay as committed")
    parser.add_argument("--refit", action="store_true", help="measure nothing; fit again to the last run's layers")
    parser.add_argument("--reprice", action="store_true", help="measure nothing; price the last run's pairs again")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results")
    return parser.parse_args()


def main() -> int:
    args = parse()
    warnings.simplefilter("ignore")
    if args.reprice or args.refit:
        facts, results = load(args.out)
        if args.refit:
            facts["constants"] = args.constants
            results = refitted(results, args.constants.split(","))
        results = repriced(results)
        save(args.out, facts, results)
        for result in results:
            if args.refit and result.threads == 1:
                print(as_python(result))
            print(f"{result.runtime}, {result.threads} thread(s): {score(result, 'committed')}")
        return 0
    default = torch.get_num_threads()
    runtimes = available(args.runtimes.split(","))
    facts = {
        "command": "python tools/measure_costs.py",
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "hardware": hardware_name(torch.device("cuda" if runtimes == ["cuda"] else "cpu")),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "onnxruntime": __import__("onnxruntime").__version__ if "onnxruntime" in runtimes else "-",
        "constants": args.constants,
        "date": time.strftime("%Y-%m-%d"),
    }
    earlier = load(args.out)[1] if (args.out / "costs.json").exists() else []
    results = []
    for runtime in runtimes:
        counts = [int(text) or default for text in args.threads.split(",")] if runtime != "cuda" else [default]
        for threads in dict.fromkeys(counts):
            results.append(run(runtime, threads, args))
            result = results[-1]
            print(f"# {runtime}, {threads} thread(s): layers within x{result.errors['fitted']:.2f} (median), ", end="")
            print(f"pairs ranked as the clock does: {score(result, 'fitted')}; committed: {score(result, 'committed')}")
            print(as_python(result), flush=True)
    measured = {(result.runtime, result.threads) for result in results}
    kept = repriced(result for result in earlier if (result.runtime, result.threads) not in measured)
    order = list(NAMES)
    results = sorted([*results, *kept], key=lambda result: (order.index(result.runtime), result.threads))
    save(args.out, facts, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
