"""Where in the user's model an operation stands that the exporter cannot do: module and source line.

torch.export knows both for a module that is written in Python. A fused model is a graph, whose code was generated: its
line names a node, and the node knows where in the user's model it came from.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

GENERATED = "<eval_with_key>"


def place(node: Any, module: nn.Module, prefix: str) -> str:
    """` in layer2.attention (net.py:41)`, as far as known.

    Args:
        node: of the exported program's graph.
        module: what was exported.
        prefix: what our wrappers add to the path of a module.
    """
    stack = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
    path = f"{stack[-1]}.".removeprefix(prefix).removesuffix(".") if stack else ""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [(file, int(line)) for file, line in lines if "/torch/" not in file]
    for file, line in reversed(own):
        if file.startswith(GENERATED) and (found := _generated(module, file, line, prefix)):
            inner, known = found
            path = inner
            source = f" ({known})" if known else ""
            break
    else:
        source = f" ({own[-1][0].rsplit('/', 1)[-1]}:{own[-1][1]})" if own else ""
    return f" in {path or 'the model itself'}{source}"


def _generated(module: nn.Module, file: str, line: int, prefix: str) -> tuple[str, str] | None:
    """Path of the module and source line of the node that a line of generated code computes."""
    for outer, part in module.named_modules():
        code = getattr(getattr(type(part), "forward", None), "__code__", None)
        if code is None or code.co_filename != file or not hasattr(part, "graph"):
            continue
        text = str(part.code).splitlines()
        match = re.match(r"\s*(\w+)\b.*=", text[line - 1]) if 0 < line <= len(text) else None
        for node in part.graph.nodes if match else ():
            if match and node.name == match.group(1):
                known = f"module.{outer}.".removeprefix(prefix).strip(".")
                path = ".".join(filter(None, (known, node.meta.get("module_path"))))
                return path, str(node.meta.get("source") or "")
    return None
