"""Whether the readers of a tensor can do with a part of a larger one: with a slice of its channels.

A slice lies in memory with gaps. Operations that go through it element by element, and products of matrices, read it
as it is. A reshape of it stays a view where it splits and merges the axes on either side of the gap, the channel axis
`a` and those behind it, or those in front of it:

    sizes (n_0 .. n_(a-1) | n_a ..)  ->  (m_0 .. m_(j-1) | m_j ..)      with  m_j * m_(j+1) * .. = n_a * n_(a+1) * ..

Sizes are compared as products that hold for every input. Everything else is taken to need the tensor whole: it would
copy it first (a convolution), fail (a view across the gap), show the difference (`stride()`), or hold the storage of
all parts (a tensor that the model returns).
"""

from __future__ import annotations

from torch import fx, nn

from reparam.graph.nodes import info, kind, module_of, pinned
from reparam.graph.sizes import Sizes, product

_ELEMENTWISE = """
relu relu6 leaky_relu leakyrelu elu celu selu silu mish gelu sigmoid logsigmoid tanh hardswish hardsigmoid hardtanh
softplus softsign tanhshrink abs exp log sqrt rsqrt square neg negative clamp clip erf sin cos pow threshold
add sub subtract mul multiply div divide truediv true_divide addcmul maximum minimum where lerp sum mean amax amin
cat concat concatenate
"""
_PRODUCTS = "matmul bmm baddbmm scaled_dot_product_attention"
_TELL_SIZES = "size dim ndimension numel"
_ATTRIBUTES = ("shape", "ndim", "dtype", "device")
_VIEWS_OF_ANYTHING = """
transpose permute swapaxes swapdims movedim unsqueeze expand narrow select indexing chunk split unbind
"""
_RESHAPES = frozenset(("view", "reshape", "flatten", "unflatten"))
_READ_PARTS = frozenset(f"{_ELEMENTWISE} {_PRODUCTS} {_TELL_SIZES}".split())
_VIEWS = _RESHAPES.union(_VIEWS_OF_ANYTHING.split())


def needs_whole(node: fx.Node, axis: int, root: nn.Module, sizes: Sizes) -> fx.Node | None:
    """The first reader of `node`, or of a view of it, that a slice along `axis` would not do for; None if it does."""
    pending = [(node, user, True) for user in node.users]
    while pending:
        value, user, untouched = pending.pop(0)
        name = kind(user, root).lower()
        if _tells_sizes(user):
            continue
        if user.op == "output" or pinned(user) is not None or not _is_torchs(user, root):
            return user
        if name in _RESHAPES:
            # A view of a tensor that was turned before may work for the whole and fail for the part.
            works = _stays_a_view(value, user, axis, sizes) if untouched else name != "view"
            if not works:
                return user
        if name in _VIEWS:
            pending += [(user, other, False) for other in user.users]
        elif name not in _READ_PARTS:
            return user
    return None


def _stays_a_view(value: fx.Node, reshaped: fx.Node, axis: int, sizes: Sizes) -> bool:
    before, after = sizes.dims(value), sizes.dims(reshaped)
    if info(reshaped) is None or info(value) is None or len(before) == 0:
        return False
    inner = product(before[axis:])
    return any(product(after[cut:]) == inner for cut in range(len(after)))


def _tells_sizes(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is getattr and node.args[1] in _ATTRIBUTES


def _is_torchs(node: fx.Node, root: nn.Module) -> bool:
    """Whether the operation is torch's own: somebody else's of the same name may do anything."""
    module = module_of(node, root)
    if module is not None:
        return type(module).__module__.startswith("torch.") and not (module._forward_hooks or module._forward_pre_hooks)
    home = str(getattr(node.target, "__module__", None) or "torch")
    return node.op == "call_method" or home.partition(".")[0] in ("torch", "_operator")
