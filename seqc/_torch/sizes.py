"""Symbolic sizes: their expressions, bounds and hints."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Max, Min
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis


def _layout(x: torch.Tensor) -> tuple[Any, ...]:
    return x.dtype, x.device, x.layout


def alike(a: Any, b: Any) -> bool:
    """Whether two arguments or results are equal, fake tensors by shape and dtype, sizes by expression."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, FakeTensor):
        known = a.constant is None and b.constant is None
        return known and a.fake_mode is b.fake_mode and _layout(a) == _layout(b) and alike((*a.shape,), (*b.shape,))
    if isinstance(a, torch.Tensor):
        return False
    if isinstance(a, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    return bool(a == b)


def bounds(expr: Any, symbol: sympy.Symbol) -> list[int]:
    """The numbers c of all min(symbol, c) in a size."""
    found = [e for e in expr.atoms(Min) if symbol in e.args]
    return [min(int(a) for a in e.args if a.is_Integer) for e in found if any(a.is_Integer for a in e.args)]


def without_bounds(expr: Any, symbol: sympy.Symbol, most: int) -> Any:
    """A size with ``symbol`` in place of each min(symbol, c), where that is at most ``most`` and c is no less."""

    def idle(e: Any) -> bool:
        return isinstance(e, Min) and symbol in e.args and all(a == symbol or bool(a.is_Integer) for a in e.args)

    return expr.replace(idle, lambda e: symbol if all(a == symbol or a >= most for a in e.args) else e)


def size_expr(size: int | torch.SymInt) -> Any:
    """The sympy expression of a size."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def hint(size: int | torch.SymInt) -> int:
    """What a size was when the model was traced."""
    return size if isinstance(size, int) else int(size.node.hint)


def unclamped(size: torch.SymInt) -> int | None:
    """``size`` where no bound in it is clamped, min(n, ...) being n and max(0, e) being e; None if that is no number,
    or is not what the size was when traced."""
    expr = size.node.expr.replace(lambda e: isinstance(e, (Min, Max)), _unclamped)
    return int(expr) if expr.is_Integer and int(expr) == hint(size) else None


def _unclamped(bound: Any) -> Any:
    numbers = [a for a in bound.args if a.is_Integer]
    others = [a for a in bound.args if not a.is_Integer]
    if len(numbers) != 1 or len(others) != 1:
        return bound
    return numbers[0] if isinstance(bound, Min) else others[0]


def emit_expr(expr: Any, symbols: dict[sympy.Symbol, Any]) -> Any:
    """Evaluate a sympy size expression with Python operators on ``symbols`` (numbers, SymInts or fx proxies)."""
    return sympy_interp(PythonReferenceAnalysis, symbols, expr)


def floor_div(expr: Any, by: int) -> Any:
    """``expr // by`` as torch writes it in sizes."""
    return FloorDiv(expr, sympy.Integer(by))


def symint(env: ShapeEnv, expr: Any, hint: int) -> int | torch.SymInt:
    """A SymInt for ``expr`` in ``env``."""
    if expr.is_Integer:
        return int(expr)
    result = env.create_symintnode(expr, hint=hint)
    assert isinstance(result, (int, torch.SymInt))
    return result


def lower_bound(size: int | torch.SymInt, ranges: dict[sympy.Symbol, tuple[int, int | None]]) -> int | None:
    """The least value ``size`` is proved to take while each symbol stays in its range; None where nothing is proved."""
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

    expr = size_expr(size)
    top = sympy.Integer(2**31)
    known = {s: ValueRanges(low, top if high is None else high) for s, (low, high) in ranges.items()}
    if not expr.free_symbols <= set(known):
        return None
    low = bound_sympy(expr, known).lower
    return int(low) if low.is_Integer else None


def largest(size: int | torch.SymInt) -> int | None:
    """The largest value that the declared ranges of dimensions allow a size; None where there is none."""
    if isinstance(size, int):
        return size
    high = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(high) if high.is_Integer else None


def set_largest(symbol: sympy.Symbol, mode: Any, most: int) -> None:
    """Narrow the range of a dimension: it is at most ``most``."""
    from torch.utils._sympy.value_ranges import ValueRanges

    ranges = mode.shape_env.var_to_range
    ranges[symbol] = ValueRanges(ranges[symbol].lower, sympy.Integer(most))


def new_symbol(mode: FakeTensorMode, name: str, hint: int) -> sympy.Symbol:
    """A new dimension of any size from 0 on, which is ``hint`` while shapes are computed."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
    from torch.utils._sympy.value_ranges import ValueRanges

    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    value = mode.from_tensor(torch.empty(hint), source=ConstantSource(name), symbolic_context=context)
    symbol = size_expr(value.shape[0])
    assert isinstance(symbol, sympy.Symbol) and mode.shape_env is not None
    mode.shape_env.var_to_range[symbol] = ValueRanges(sympy.Integer(0), mode.shape_env.var_to_range[symbol].upper)
    return symbol
