"""Whether the program in a torch.export archive can be read without running anything that its author chose.

torch's own reader looks operators up by name in all of Python's `torch` module, evaluates symbolic sizes with `sympify`
(which is `eval`) and executes the guards as source code. So everything in the program is checked first, and what is
not known to be harmless ends the reading: operators by an allow-list, expressions and guards by their syntax tree,
names by their characters, and structures by their types.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

_NAME = re.compile(r"[\w.\-:]*")
_IDENTIFIER = re.compile(r"\w*")
_KEY = re.compile(r"[\w.\- ]+")
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)(\.\w+)?")
_MOST_CHARACTERS = 20_000
_LARGEST = 2**63
_MOST_DIGITS_OF_A_POWER = 16

_NAMESPACES = {"aten", "prims"}
_FILES = {"from_file", "save"}  # the operators of torch that open a file
_HIGHER_ORDER = {"cond", "map_impl", "while_loop", "scan", "wrap_with_set_grad_enabled", "wrap_with_autocast"}
_PYTHON = set(
    """
    abs add and_ contains eq floordiv ge getitem gt invert le lshift lt mod mul ne neg not_ or_ pos pow rshift sub
    truediv xor
    """.split()
)
_STRUCTURES = {
    None,
    "builtins.tuple",
    "builtins.list",
    "builtins.dict",
    "collections.OrderedDict",
    "torch.fx.immutable_collections.immutable_dict",  # what torch.export writes for a graph module's answer
    "torch.fx.immutable_collections.immutable_list",
}
_SYMBOLIC = set(
    """
    Symbol Integer Float Rational Add Mul Pow Max Min Mod Abs Eq Ne Lt Le Gt Ge And Or Not Equality Unequality
    StrictLessThan LessThan StrictGreaterThan GreaterThan Piecewise ExprCondPair floor ceiling FloorDiv ModularIndexing
    Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt RoundToInt
    RoundDecimal ToFloat Identity PowByNatural FloatPow LShift RShift true false oo int_oo
    """.split()
)
_POWERS = {"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"}
_SIZES = {"size", "stride", "storage_offset", "shape", "ndim"}
_BUILTIN = {"max", "min", "abs", "int", "float", "bool", "round"}
_MATH = {"ceil", "floor", "trunc", "sqrt", "fabs", "log2", "log", "inf", "isqrt"}
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Div, ast.Mod)
_PLAIN = (
    *(ast.Expression, ast.Load, ast.BoolOp, ast.And, ast.Or, ast.Not, ast.USub, ast.UnaryOp, ast.Compare, ast.BinOp),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Pow, *_ARITHMETIC),
)


class UnsafeError(Exception):
    """Something in a file that is not known to be harmless; the message is a clause without subject."""


def audit_program(program: Mapping[str, Any]) -> None:
    """Checks the JSON of a serialized program (torch's `ExportedProgram` schema).

    Raises:
        UnsafeError: it holds something that is not known to be harmless.
    """
    for guard in program.get("guards_code") or ():
        _check_guard(guard)
    _check({key: value for key, value in program.items() if key != "guards_code"}, "")


def _check(value: Any, key: str) -> None:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not _NAME.fullmatch(name):
                raise UnsafeError(f"has the name {name!r}")
            if name in ("as_custom_obj", "custom_obj", "custom_obj_values") and item:
                raise UnsafeError("holds a compiled object of its own")
            _check(_harmless_metadata(item) if name == "metadata" else item, name)
    elif isinstance(value, list):
        for item in value:
            _check(item, key)
    elif isinstance(value, str):
        _CHECKS.get(key, _check_name)(value)


def _harmless_metadata(metadata: Any) -> Any:
    """What of a node's metadata is looked up by name; the rest is text."""
    if not isinstance(metadata, Mapping):
        return metadata
    functions = str(metadata.get("source_fn_stack") or "")
    return {"source_fn_stack": [part.partition(",")[2] for part in functions.split(";")]}


def _check_name(text: str) -> None:
    if not _NAME.fullmatch(text):
        raise UnsafeError(f"has the name {text[:80]!r}")


def _check_identifier(text: str) -> None:
    if not _IDENTIFIER.fullmatch(text):
        raise UnsafeError(f"has the argument name {text[:80]!r}")


def _check_operator(text: str) -> None:
    found = _OPERATOR.fullmatch(text)
    module, _, name = text.rpartition(".")
    if found:
        namespace, operator = found[1], found[2]
        known = namespace in _NAMESPACES and operator not in _FILES
        harmless = known or (namespace == "higher_order" and operator in _HIGHER_ORDER)
    elif module == "_operator":
        harmless = name in _PYTHON
    elif module == "math":
        harmless = name in _MATH
    else:
        harmless = module == "torch" and re.fullmatch(r"_?sym_\w+", name) is not None
    if not harmless:
        raise UnsafeError(f"asks for {text[:80]!r}")


def _check_structure(text: str) -> None:
    """A tree of containers, as JSON; its keys become names in generated code."""
    if not text:
        return
    try:
        _, tree = json.loads(text)
        _check_tree(tree)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UnsafeError("has arguments of a damaged structure") from None


def _check_tree(tree: Mapping[str, Any]) -> None:
    if tree["type"] not in _STRUCTURES:
        raise UnsafeError(f"takes or returns a {str(tree['type'])[:80]}")
    keys = json.loads(tree["context"]) if tree["context"] else None
    if keys is not None and type(keys) is not list:
        raise UnsafeError("has arguments of a damaged structure")
    for key in keys or ():
        if not (type(key) is int or (isinstance(key, str) and _KEY.fullmatch(key))):
            raise UnsafeError(f"has the argument name {str(key)[:80]!r}")
    for child in tree["children_spec"]:
        _check_tree(child)


def _check_expression(text: str) -> None:
    """An expression of sizes, which is evaluated."""
    for node in _nodes(text, "size"):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in _SYMBOLIC:
                raise UnsafeError(f"has the size {text[:80]!r}")
            if node.func.id in _POWERS:
                _check_power(node.args[-1] if node.args else None, text)
        elif isinstance(node, ast.Constant):
            _check_constant(node, text, re.compile(r"\w+|-?\d+\.\d*(e[+-]?\d+)?"))
        elif isinstance(node, ast.Name):
            if not re.fullmatch(r"\w+", node.id) or node.id.startswith("_"):
                raise UnsafeError(f"has the size {text[:80]!r}")
        elif not isinstance(node, (*_PLAIN, ast.keyword)):
            raise UnsafeError(f"has the size {text[:80]!r}")


def _check_guard(text: str) -> None:
    """A condition on the inputs' sizes, which is executed."""
    for node in _nodes(text, "guard"):
        if isinstance(node, ast.Call):
            method = isinstance(node.func, ast.Attribute) and node.func.attr in _SIZES
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            function = name in _BUILTIN or name in _SYMBOLIC - _POWERS or _is_of_math(node.func)
            if not (method or function) or node.keywords:
                raise UnsafeError(f"has the guard {text[:80]!r}")
        elif isinstance(node, ast.Attribute):
            if node.attr not in _SIZES and not _is_of_math(node):
                raise UnsafeError(f"has the guard {text[:80]!r}")
        elif isinstance(node, ast.Constant):
            _check_constant(node, text, _KEY)
        elif isinstance(node, ast.Name):
            if node.id not in ("L", "inf", "math") and node.id not in _SYMBOLIC | _BUILTIN:
                raise UnsafeError(f"has the guard {text[:80]!r}")
        elif not isinstance(node, (*_PLAIN, ast.Subscript)):
            raise UnsafeError(f"has the guard {text[:80]!r}")


def _is_of_math(node: ast.AST) -> bool:
    """Whether it is a function of Python's `math`, whose values stay small."""
    named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "math"
    return named and node.attr in _MATH  # type: ignore[attr-defined]


def _nodes(text: str, what: str) -> list[ast.AST]:
    """All nodes of an expression, whose powers are small."""
    if len(text) > _MOST_CHARACTERS:
        raise UnsafeError(f"has a {what} of {len(text):,} characters")
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise UnsafeError(f"has the {what} {text[:80]!r}") from None
    for node in nodes:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            _check_power(node.right, text)
    return nodes


def _check_power(exponent: ast.AST | None, text: str) -> None:
    """A number raised to a large power takes all of the memory."""
    while isinstance(exponent, ast.Call) and len(exponent.args) == 1:
        exponent = exponent.args[0]
    if isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    small = isinstance(exponent, ast.Constant) and type(exponent.value) in (int, float)
    if not small or abs(exponent.value) > _MOST_DIGITS_OF_A_POWER:  # type: ignore[union-attr]
        raise UnsafeError(f"has the power {text[:80]!r}")


def _check_constant(node: ast.Constant, text: str, strings: re.Pattern[str]) -> None:
    value = node.value
    if isinstance(value, str):
        harmless = strings.fullmatch(value) is not None
    else:
        harmless = value is None or (isinstance(value, (bool, int, float)) and abs(value) <= _LARGEST)
    if not harmless:
        raise UnsafeError(f"has the constant {text[:80]!r}")


def _anything(text: str) -> None:
    """Data for an operator, never looked up or executed."""


_CHECKS: dict[str, Callable[[str], None]] = {
    "target": _check_operator,
    "as_operator": _check_operator,
    "expr_str": _check_expression,
    "in_spec": _check_structure,
    "out_spec": _check_structure,
    "as_string": _anything,
    "as_strings": _anything,
    "torch_version": _anything,
    "name": _check_name,
    "forward_arg_names": _check_identifier,
}
