"""The values a pass answers with: a `Rewrite` for what it did, a `Refusal` for what it left, a `Choice` for why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from reparam.graph.place import Place


@dataclass(frozen=True)
class Cost:
    """What running some operations once costs, for the example inputs' sizes.

    Attributes:
        macs: multiply-adds.
        bytes: bytes read and written, weights included.
        launches: operations launched.
        seconds: the cost model's price of the three; an estimate that only serves to rank alternatives.
        parameters: numbers in the weights and scales of these operations, biases apart.
    """

    macs: int = 0
    bytes: int = 0
    launches: int = 0
    seconds: float = 0.0
    parameters: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.macs + other.macs,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.seconds + other.seconds,
            self.parameters + other.parameters,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.macs - other.macs,
            self.bytes - other.bytes,
            self.launches - other.launches,
            self.seconds - other.seconds,
            self.parameters - other.parameters,
        )


@dataclass(frozen=True)
class Rewrite:
    """One change that was made.

    Attributes:
        pass_name: the pass that made it.
        place: where the replacement stands.
        replaced: the operations that went, as the user would name them (`conv1: Conv2d`).
        replacement: what stands there now (`Conv2d(64, 64, 3x3)`; empty if nothing does).
        identity: the identity that was applied, as a formula or a sentence.
        before, after: cost of the replaced and of the replacing operations.
    """

    pass_name: str
    place: Place
    replaced: tuple[str, ...]
    replacement: str
    identity: str
    before: Cost = Cost()
    after: Cost = Cost()

    @property
    def where(self) -> str:
        """Qualified module name and source line, for people."""
        return str(self.place)

    @property
    def reason(self) -> str:
        """The identity applied: why the rewrite is exact."""
        return self.identity

    def to_dict(self) -> dict[str, Any]:
        """The rewrite as plain JSON types."""
        return {**asdict(self), "where": self.where, "reason": self.reason}


@dataclass(frozen=True)
class Refusal:
    """Something that looks foldable and was left.

    Attributes:
        pass_name: the pass that left it.
        place: where it stands.
        subject: the operation that stays, in the field's words (`BatchNorm2d`, `mul by a constant`).
        reason: one sentence: why it stays.
        remedy: one sentence: what would lift the refusal; empty if nothing would.
    """

    pass_name: str
    place: Place
    subject: str
    reason: str
    remedy: str = ""

    @property
    def where(self) -> str:
        """Qualified module name and source line, for people."""
        return str(self.place)

    def to_dict(self) -> dict[str, Any]:
        """The refusal as plain JSON types."""
        return {**asdict(self), "where": self.where}


@dataclass(frozen=True)
class Undone:
    """A rewrite that was made, found at fault by verification, and undone.

    Attributes:
        rewrite: the rewrite.
        failure: what was wrong with it: with the tensors where it stands, or with what the model returned.
        worst: index of the element that was wrong most: of the tensor where the rewrite stands, if `local_error` is
            given, else of an output.
        location: whether that lies at a border of the dims behind batch and channel.
        shape: of the tensor that `worst` is an index of.
        local_error: largest difference of that tensor over its largest value, where the rewrite stands; None if the
            fault shows on other inputs than the example only.
        error_with, error_without: float64 error of the whole model in which the rewrite was found, and of the one that
            was made without it (and without what was found with it); in the model's own dtype, where it does not run
            in float64; None where it did not run, or what was wrong is no matter of size (an output is not finite).
        number: how many rewrites of that place, which did the same to several calls, went together.
        parting: the first tensor of the original that the model with it did not compute; empty if that is not known.
    """

    rewrite: Rewrite
    failure: str
    worst: tuple[int, ...] = ()
    location: str = ""
    shape: tuple[int, ...] = ()
    local_error: float | None = None
    error_with: float | None = None
    error_without: float | None = None
    number: int = 1
    parting: str = ""

    @property
    def where(self) -> str:
        """Qualified module name and source line, for people."""
        return self.rewrite.where

    def to_dict(self) -> dict[str, Any]:
        """The value as plain JSON types."""
        return {**asdict(self), "rewrite": self.rewrite.to_dict(), "where": self.where}


@dataclass(frozen=True)
class Candidate:
    """One way to compute a region.

    Attributes:
        description: what it is (`as it is: Conv2d + BatchNorm2d`, `one layer: Conv2d(64, 64, 3x3)`).
        cost: its price for the example inputs' sizes; None if it cannot be computed this way.
        excluded: why it was ruled out whatever it costs; empty if it was not.
    """

    description: str
    cost: Cost | None
    excluded: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The candidate as plain JSON types. Its seconds are called what they are, an estimate."""
        cost = None if self.cost is None else asdict(self.cost)
        if cost is not None:
            cost["estimated_seconds"] = cost.pop("seconds")
        return {"description": self.description, "cost": cost, "excluded": self.excluded}


@dataclass(frozen=True)
class Choice:
    """What the search compared at one place, and what it took.

    Attributes:
        place: the operation whose value all candidates compute; for a tensor with several readers, that tensor.
        candidates: the original first.
        chosen: index of the one that was taken.
        why: one clause: why it was.
        objective, machine: what there should be least of, and whose prices those of the candidates are.
        part: whether it is about a part of a region that another choice cut.
    """

    place: Place
    candidates: tuple[Candidate, ...]
    chosen: int
    why: str
    objective: str
    machine: str
    part: bool = False

    @property
    def where(self) -> str:
        """Qualified module name and source line, for people."""
        return str(self.place)

    def to_dict(self) -> dict[str, Any]:
        """The choice as plain JSON types."""
        candidates = [candidate.to_dict() for candidate in self.candidates]
        return {**asdict(self), "candidates": candidates, "where": self.where}


__all__ = ["Candidate", "Choice", "Cost", "Place", "Refusal", "Rewrite"]
