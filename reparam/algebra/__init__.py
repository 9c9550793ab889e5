"""The closed algebra of affine, shift-invariant maps between two nonlinearities: pure float64 tensor functions.

`f(x)[o, i] = b[o] + sum_{c, k} W[o, c, k] * X[c, s*i + d*k - p]`, where `X` is `x`, with `u - 1` zeros between
neighbours if it is up-sampled (a transposed convolution), continued beyond its edges by the padding mode.
Nothing here knows a graph, a module or a file.
"""

from reparam.algebra.affine import AffineMap, Geometry, Inexact
from reparam.algebra.compose import plus, regrouped, then
from reparam.algebra.sources import (
    from_average_pool,
    from_batch_norm,
    from_conv,
    from_conv_transpose,
    from_linear,
    from_padding,
    from_scale_shift,
    identity,
)
from reparam.algebra.windows import columns, from_selection, placed, repeated, rows, side_by_side, sliced_bias

__all__ = [
    "AffineMap",
    "Geometry",
    "Inexact",
    "columns",
    "from_average_pool",
    "from_batch_norm",
    "from_conv",
    "from_conv_transpose",
    "from_linear",
    "from_padding",
    "from_scale_shift",
    "from_selection",
    "identity",
    "placed",
    "plus",
    "regrouped",
    "repeated",
    "rows",
    "side_by_side",
    "sliced_bias",
    "then",
]
