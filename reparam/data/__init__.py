"""The user's own data as input cases: a folder of images, `.npy`, `.npz`, a function that yields batches, or batches.

`read` is the one entry; one file for each kind, and `fitting.py` for what they share. Nothing is ever unpickled.
"""

from __future__ import annotations

from reparam.data.batch import Batch, digest
from reparam.data.read import LIMIT, Data, read

__all__ = ["LIMIT", "Batch", "Data", "digest", "read"]
