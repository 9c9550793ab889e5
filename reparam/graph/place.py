"""`Place`: where in the user's model something stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Where in the user's model something happens.

    Attributes:
        module: qualified name of the module (or, for a functional call, of the module whose `forward` made it; the
            graph node's name where there is none).
        source: `file.py:line` of the user's code, or None where it is not known.
    """

    module: str
    source: str | None = None

    def __str__(self) -> str:
        return f"{self.module} ({self.source})" if self.source else self.module

    def under(self, path: str) -> Place:
        """The same place, seen from a model that has this one as the module of that qualified name."""
        return Place(f"{path}.{self.module}".rstrip("."), self.source) if path else self
