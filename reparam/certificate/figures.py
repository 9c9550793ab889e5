"""Which figures of a comparison are not what they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_IGNORED = {"cost", "summary", "vary_shapes", "failures", "notes", "parting", "passed"}


def moved_figures(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Place, value before and value now of every figure that differs; None for one that is missing.

    Args:
        before, now: comparisons as JSON; of the first nothing is believed but that it is an object.
    """
    old, new = dict(_leaves(before, "")), dict(_leaves(now, ""))
    return [(name, old.get(name), new.get(name)) for name in {**new, **old} if old.get(name) != new.get(name)]


def share(before: Any, now: Any) -> float:
    """By what share of itself a figure moved; infinite where that cannot be told."""
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in (before, now)):
        return float("inf")
    return abs(now - before) / max(abs(before), abs(now)) if before != now else 0.0


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Figures with the path to each; cases and outputs by their names."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _IGNORED:
                yield from _leaves(item, f"{path}, {key}" if path else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for item in value:
            name = str(item.get("name", ""))
            yield from _leaves({k: v for k, v in item.items() if k != "name"}, f"{path}, {name}" if path else name)
    else:
        yield path, value
