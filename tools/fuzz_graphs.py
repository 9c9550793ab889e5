"""Fuzzes `reparam.fuse` with random models: every answer must be exact, or a refusal.

    python tools/fuzz_graphs.py --count 10000 --seed 0 [--fixed-sizes] [--record tools/results/fuzz.md]

Models are drawn as Python source (`tests/fuzz`). Each is fused without verification, so that the engine alone is
tested, and compared with the original in float64, on the example's size and, where the original takes them, on another
batch size and another image size. A model that fails is minimised (statements are deleted while the failure persists)
and printed as code that can be pasted. Exit status: 0 if nothing failed, 1 otherwise. A `ReparamError` for a whole
model is a refusal and is counted; any other exception is a failure. `--record` writes down what was run and found.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import reparam  # noqa: E402
from reparam.errors import OtherInputError, ReparamError  # noqa: E402
from tests.fuzz.ops import Statement  # noqa: E402
from tests.fuzz.program import Program, draw  # noqa: E402
from tools.record import engine_revision, write  # noqa: E402

TOLERANCE = 1e-10
"""Largest error that counts as rounding, relative to the largest value in the model. A float32 constant costs 1e-8."""

Fuse = Callable[[nn.Module, torch.Tensor], nn.Module]


@dataclass(frozen=True)
class Outcome:
    """What became of one program.

    Attributes:
        kind: "exact", "refused", "wrong" (another answer), "crash" (an exception that is no refusal), or "invalid" (the
            original itself does not run on its example; says nothing about `fuse`).
        detail: one line for people.
    """

    kind: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        """Whether `fuse` is at fault."""
        return self.kind in ("wrong", "crash")


def engine(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """The function under test."""
    return reparam.fuse(model, example, verify=False).module


def engine_at_fixed_sizes(model: nn.Module, example: torch.Tensor) -> nn.Module:
    """The same with `fixed_sizes`: the result may say no to other image sizes."""
    return reparam.fuse(model, example, verify=False, fixed_sizes=True).module


def check(program: Program, fuse: Fuse = engine) -> Outcome:
    """Builds `program`, fuses it and compares, on the example's size, another batch size and another image size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, example = program.build()
        references = []
        for x in (example, *_other_sizes(example, program.seed)):
            try:
                references.append((x, _run(model, x)))
            except (RuntimeError, ValueError, IndexError, TypeError, NameError) as error:
                if x is example:
                    return Outcome("invalid", _line(error))
        try:
            fused = fuse(copy.deepcopy(model), example.clone())
        except ReparamError as error:
            return Outcome("refused", _line(error))
        except Exception as error:
            return Outcome("crash", f"while fusing: {_line(error)}")
        for x, expected in references:
            try:
                actual = _run(fused, x)
            except OtherInputError as error:
                if fuse is engine_at_fixed_sizes and x.shape[1:] != example.shape[1:]:
                    continue
                return Outcome("crash", f"on {tuple(x.shape)}: {_line(error)}")
            except Exception as error:
                return Outcome("crash", f"while running on {tuple(x.shape)}: {_line(error)}")
            wrong = _difference(expected, actual, program.magnitude)
            if wrong:
                return Outcome("wrong", f"on {tuple(x.shape)}: {wrong}")
    return Outcome("exact")


def _other_sizes(example: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Inputs of another batch size and, where there is an image, of another image size."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, *image = example.shape
    yield torch.randn(batch + 3, channels, *image, generator=generator, dtype=example.dtype)
    if image:
        larger = (size + 1 + axis for axis, size in enumerate(image))
        yield torch.randn(batch, channels, *larger, generator=generator, dtype=example.dtype)


def _run(module: nn.Module, x: torch.Tensor) -> Any:
    with torch.no_grad():
        return copy.deepcopy(module)(x.clone())


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _difference(expected: Any, actual: Any, magnitude: float) -> str:
    """What differs, or nothing."""
    if not isinstance(actual, tuple) or len(actual) != len(expected):
        return f"{type(actual).__name__} returned instead of a tuple of {len(expected)}"
    for index, (a, b) in enumerate(zip(expected, actual, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {index} is {tuple(b.shape)} {b.dtype} instead of {tuple(a.shape)} {a.dtype}"
        error = float((a - b).abs().max())
        if not error <= TOLERANCE * max(magnitude, float(a.abs().max())):
            return f"output {index} differs by {error:.2g} (largest value {float(a.abs().max()):.2g})"
    return ""


def minimise(program: Program, fuse: Fuse = engine) -> Program:
    """A smaller program that fails in the same way: outputs and statements are dropped until none can be."""
    kind = check(program, fuse).kind
    shrunk = True
    while shrunk:
        shrunk = False
        for candidate in _smaller(program):
            if check(candidate, fuse).kind == kind:
                program, shrunk = candidate, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    for name in program.outputs:
        if len(program.outputs) > 1:
            rest = tuple(output for output in program.outputs if output != name)
            yield replace(program, outputs=rest, statements=_needed(program.statements, rest))
    for index in reversed(range(len(program.statements))):
        yield from _without(program, index)


def _without(program: Program, index: int) -> Iterator[Program]:
    """The program without one statement: its target replaced by something it reads, or returned in its place."""
    gone = program.statements[index]
    rest = (*program.statements[:index], *program.statements[index + 1 :])
    if not gone.target:
        yield replace(program, statements=rest)
        return
    for stand_in in dict.fromkeys((*gone.reads, "x")):
        names = {gone.target: stand_in}
        renamed = tuple(replace(s, reads=tuple(names.get(name, name) for name in s.reads)) for s in rest)
        outputs = tuple(dict.fromkeys(names.get(name, name) for name in program.outputs))
        yield replace(program, statements=renamed, outputs=outputs)
    yield replace(program, statements=program.statements[:index], outputs=gone.reads)


def _needed(statements: tuple[Statement, ...], outputs: tuple[str, ...]) -> tuple[Statement, ...]:
    """The statements on which `outputs` depend; in-place ones stay if what they write into does."""
    wanted, kept = set(outputs), list[Statement]()
    for statement in reversed(statements):
        if statement.target in wanted or (not statement.target and statement.reads[0] in wanted):
            wanted.update(statement.reads)
            kept.append(statement)
    return tuple(reversed(kept))


def campaign(count: int, seed: int, fuse: Fuse = engine, stop_after: int = 1) -> tuple[Counter[str], list[Program]]:
    """Checks programs `seed` to `seed + count - 1`; (outcomes by kind, the first failing programs)."""
    outcomes: Counter[str] = Counter()
    failing: list[Program] = []
    for index in range(seed, seed + count):
        program = draw(index)
        outcome = check(program, fuse)
        outcomes[outcome.kind] += 1
        if outcome.failed:
            failing.append(program)
            if len(failing) >= stop_after:
                break
    return outcomes, failing


def _print_failure(program: Program, seed: int, fuse: Fuse) -> None:
    small = minimise(program, fuse)
    outcome = check(small, fuse)
    print(f"\n# seed {seed}: {outcome.kind}: {outcome.detail}\n# --- paste from here ---")
    print(small.reproduction(), flush=True)


def _record(options: argparse.Namespace, outcomes: Counter[str], seconds: float) -> str:
    """The outcome as Markdown."""
    rows = "\n".join(f"| {kind} | {outcomes[kind]} |" for kind in ("exact", "refused", "wrong", "crash", "invalid"))
    command = f"python tools/fuzz_graphs.py --count {options.count} --seed {options.seed}"
    command += " --fixed-sizes" if options.fixed_sizes else ""
    return f"""# Random models, fused

`{command}`, reparam at {engine_revision()}, torch {torch.__version__},
1 thread, {seconds:.0f} s.

Each model is fused without verification and compared with the original in float64 at up to three sizes of input. Wrong:
an error above {TOLERANCE:.0e} of the largest value in the model. Refused: the whole model, with a sentence. Invalid:
the drawn model itself does not run.

| outcome | models |
|---|--:|
{rows}
"""


def main() -> int:
    """Runs a campaign from the command line."""
    parser = argparse.ArgumentParser(description="Fuzz reparam.fuse with random models.")
    parser.add_argument("--count", type=int, default=1000, help="models to try (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first model; the others follow (default 0)")
    parser.add_argument("--stop-after", type=int, default=5, help="failures to print before stopping (default 5)")
    parser.add_argument("--fixed-sizes", action="store_true", help="fuse with fixed_sizes=True")
    parser.add_argument("--record", type=Path, help="Markdown file for the outcome")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fuse = engine_at_fixed_sizes if options.fixed_sizes else engine
    start = time.perf_counter()
    outcomes, failing = campaign(options.count, options.seed, fuse, options.stop_after)
    for program in failing:
        _print_failure(program, program.seed, fuse)
    seconds = time.perf_counter() - start
    total = sum(outcomes.values())
    summary = ", ".join(f"{count} {kind}" for kind, count in sorted(outcomes.items()))
    print(f"{total} models from seed {options.seed} in {seconds:.0f} s: {summary}")
    if options.record is not None:
        write(options.record, _record(options, outcomes, seconds))
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
