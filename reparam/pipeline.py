"""`fuse`: the one place that knows the order of the stages.

capture -> normal form -> passes -> module -> verification -> report
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import fx, nn

from reparam.capture.captured import Captured
from reparam.capture.trace import capture
from reparam.errors import InputError, NotEquivalentError
from reparam.graph.count import count_operations
from reparam.graph.emit import float64_twin, forget_float64
from reparam.graph.normal import normalise, restore_in_place
from reparam.inputs import ExampleInputs
from reparam.passes import PIPELINE, Pass
from reparam.passes.base import Refusal, Rewrite
from reparam.report import Report
from reparam.verify import Comparison
from reparam.verify import verify as verify_modules

Progress = Callable[[str], None]


@dataclass(frozen=True)
class FuseResult:
    """What `fuse` returns.

    Attributes:
        module: the fused model in eval mode, with the call signature of the original; shares no tensor with it.
        report: what was changed, what was left and why, and whether the two agree.
    """

    module: fx.GraphModule
    report: Report


def fuse(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    verify: bool | str = "standard",
    seed: int = 0,
    passes: Sequence[Pass] = PIPELINE,
    progress: Progress | None = None,
) -> FuseResult:
    """Turns a model into its inference form: the fewest layers that compute the same function.

    The model itself is not changed. Weights are combined in float64 and rounded to the model's dtype once; a float64
    model stays in float64 throughout.

    Args:
        model: any module that `torch.fx` can trace; it is taken in eval mode.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. Their sizes are examples: the
            fused model runs on every size that the original runs on.
        verify: how thoroughly the result is checked against the original: "quick", "standard" (default), "thorough",
            or "off". True is "standard", False is "off".
        seed: of the inputs that verification draws.
        passes: the passes to run, in order.
        progress: called with a few words when a stage starts.

    Returns:
        The fused module and the report.

    Raises:
        InputError: the model or the inputs cannot be used.
        CaptureError: the model's graph cannot be captured.
        NotEquivalentError: the fused model does not agree with the original; no module is returned.
    """
    level = _level(verify)
    stages = _Stages(progress)
    with stages("capturing the graph"):
        captured = capture(model, example_inputs)
    with torch.no_grad(), stages("fusing"):
        before = count_operations(captured.graph, captured.root)
        rewrites, refusals = _run(captured, passes)
        module = _built(captured, model)
        after = count_operations(module.graph, module)
    comparison: Comparison | None = None
    if level != "off":
        with stages("verifying"):
            comparison = _verified(model, module, captured, level, seed)
    forget_float64(module.graph)
    report = Report(
        model=captured.name,
        capture=captured.how,
        before=before,
        after=after,
        rewrites=tuple(rewrites),
        refusals=tuple(refusals),
        comparison=comparison,
        environment=_environment(),
        seconds=stages.seconds,
        notes=captured.notes,
    )
    if comparison is not None and not comparison.passed:
        raise NotEquivalentError(
            f"the fused {captured.name} does not agree with the original: {comparison.summary().rstrip('.')}; "
            "no model was made, please report this with the report attached to this error",
            report,
        )
    return FuseResult(module, report)


def _run(captured: Captured, passes: Sequence[Pass]) -> tuple[list[Rewrite], list[Refusal]]:
    graph, root = captured.graph, captured.root
    normalise(graph, root)
    rewrites, refusals = [], []
    for step in passes:
        made, left = step.run(graph, root)
        rewrites += made
        refusals += left
    restore_in_place(graph, root)
    return rewrites, refusals


def _built(captured: Captured, model: nn.Module) -> fx.GraphModule:
    """The graph as a module of its own: parameters that are still the caller's are copied."""
    captured.graph.lint()
    module = fx.GraphModule(captured.root, captured.graph, class_name=captured.name)
    theirs = {id(p) for p in model.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) in theirs:
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                owner._parameters[name] = copies[id(parameter)]
    return module.eval()


def _verified(model: nn.Module, module: nn.Module, captured: Captured, level: str, seed: int) -> Comparison:
    with torch.no_grad():
        twin = None if any(p.dtype == torch.float64 for p in model.parameters()) else float64_twin(module)
    return verify_modules(model, module, captured.inputs, level=level, seed=seed, candidate_float64=twin)


def _level(requested: bool | str) -> str:
    level = {True: "standard", False: "off"}.get(requested, requested) if isinstance(requested, bool) else requested
    if level not in ("off", "quick", "standard", "thorough"):
        raise InputError(f"verify={requested!r} is not known; use 'off', 'quick', 'standard' or 'thorough'")
    return str(level)


def _environment() -> dict[str, str]:
    from reparam import __version__

    return {
        "reparam": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }


class _Stages:
    """Announces stages and keeps their wall-clock times, in seconds."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._progress is not None:
            self._progress(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
