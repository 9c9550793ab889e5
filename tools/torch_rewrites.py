"""What torch itself offers for inference, as comparisons call it."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType


def optimization() -> ModuleType:
    """torch.fx's module of rewrites. Its first import in a process warns of torch's own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("torch.fx.experimental.optimization")
