"""Who asks for the class of an object: Python, or compiled code that Python has called.

`isinstance(x, torch.Tensor)` in a model has to be true of a proxy, which is told by its `__class__`. Bindings of C++
(extensions of users, `torch.autograd.Function.apply`, `torch.vmap`) ask in the same way, and then read the memory of a
tensor that is none. So the answer depends on what the frame is just doing: a call of `isinstance`, or another call.
"""

from __future__ import annotations

import dis
import linecache
from functools import lru_cache
from types import CodeType, FrameType

_ASKING = frozenset({"isinstance", "issubclass", "__class__", "__instancecheck__"})


def asks_in_python(frame: FrameType) -> bool:
    """Whether the code of this frame asks itself, and not compiled code that it calls."""
    return _asks(frame.f_code, frame.f_lasti)


@lru_cache(maxsize=4096)
def _asks(code: CodeType, instruction: int) -> bool:
    """The same, for the instruction that is being executed."""
    here = next((found for found in dis.get_instructions(code) if found.offset == instruction), None)
    if here is None:
        return False
    if not here.opname.startswith(("CALL", "PRECALL")):
        return here.opname == "MATCH_CLASS" or here.argval == "__class__"  # a match statement; an attribute
    names = {*code.co_names, *code.co_freevars, *code.co_varnames}
    if not names & _ASKING:
        return False
    text = _text_of(code, instruction)
    return text is None or any(text.startswith(f"{name}(") for name in _ASKING) or "__instancecheck__" in text


def _text_of(code: CodeType, instruction: int) -> str | None:
    """The source of the expression that an instruction evaluates, as far as it stands on its first line."""
    positions = getattr(code, "co_positions", None)
    if positions is None:
        return None  # before Python 3.11
    line, _, start, _ = list(positions())[instruction // 2]
    source = linecache.getline(code.co_filename, line) if line else ""
    if not source.strip() or start is None:
        return None
    return source.encode()[start:].decode(errors="replace").replace(" ", "")
