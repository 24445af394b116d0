"""Sizes written as expressions in dimension names (``sequence + 3``, ``2*length``), evaluated without ``eval``.

The expressions are sympy's spelling of torch's symbolic sizes. One with syntax not known here has no value
and is left to onnxruntime to check.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_CALLS: dict[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
}
_LONGEST = 1000


def evaluate(expression: str, sizes: Mapping[str, int]) -> int | None:
    """The value of ``expression`` where its names have these sizes; None where a name or the syntax is unknown."""
    try:
        return _value(_parsed(expression), sizes)
    except (SyntaxError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def solve(expression: str, size: int, sizes: Mapping[str, int]) -> tuple[str, int] | None:
    """The one name in ``expression`` that has no size yet, and the size that makes the expression equal ``size``.

    None where the expression is not linear in exactly one unknown name, or no whole size fits.
    """
    try:
        found = {node.id for node in ast.walk(_parsed(expression)) if isinstance(node, ast.Name)}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    unknown = found - set(sizes) - set(_CALLS)
    if len(unknown) != 1:
        return None
    name = unknown.pop()
    at = [evaluate(expression, {**sizes, name: probe}) for probe in (0, 1, 2, 1000)]
    if at[0] is None or at[1] is None:
        return None
    offset, slope = at[0], at[1] - at[0]
    linear = at[2] == offset + 2 * slope and at[3] == offset + 1000 * slope
    if not linear or slope == 0 or (size - offset) % slope:
        return None
    return name, (size - offset) // slope


def _parsed(expression: str) -> ast.expr:
    if len(expression) > _LONGEST:
        raise ValueError("expression too long")
    return ast.parse(expression.strip(), mode="eval").body


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, sizes)
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _CALLS[name](*(_value(arg, sizes) for arg in args))
    raise ValueError(f"{type(node).__name__} is not part of a size expression")
