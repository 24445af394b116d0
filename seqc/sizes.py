"""Sizes that are at least 1; sizes that are, for every number of steps, a simpler one: ``min(n, 4 * ceil(n / 4))`` is ``n``."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import sympy
import torch

from seqc import _torch

if TYPE_CHECKING:
    from seqc.program import Dim

# Lengths that are looked at besides all up to three times the largest number in a size.
_FAR = (4099, 8190, 65536, 1000003)
_LARGEST = 4096


def is_even(size: Any, time: sympy.Symbol) -> bool:
    """Whether a size is a polynomial of the number of steps: with no rounding in it, and no bound."""
    expr = _torch.size_expr(size) if isinstance(size, (int, torch.SymInt)) else size
    return time not in expr.free_symbols or bool(expr.is_polynomial(time))


def simpler(expr: Any, time: sympy.Symbol) -> Any:
    """``expr`` with each rounding or bound that is an even function of the number of steps written as that."""

    def matches(e: Any) -> bool:
        return bool(e.free_symbols == {time}) and not e.is_polynomial(time)

    return expr.replace(matches, lambda e: _even(e, time))


@functools.lru_cache(maxsize=4096)
def _even(expr: Any, time: sympy.Symbol) -> Any:
    """a * n + b where ``expr`` is that at all lengths that are looked at, else ``expr``."""
    numbers = [abs(int(a)) for a in expr.atoms(sympy.Integer)]
    if max(numbers, default=1) > _LARGEST:
        return expr
    first, second = (int(_torch.emit_expr(expr, {time: n})) for n in (1, 2))
    slope, base = second - first, 2 * first - second
    lengths = (*range(1, 3 * max(numbers, default=1) + 9), *_FAR)
    even = all(int(_torch.emit_expr(expr, {time: n})) == slope * n + base for n in lengths)
    return slope * time + base if even else expr


def at_least_one(dims: Iterable[Dim], size: int | torch.SymInt) -> bool:
    """Whether ``size`` is proved to be at least 1 for all sizes in the ranges of ``dims``."""
    low = _torch.lower_bound(size, {d.symbol: (d.min, d.max) for d in dims})
    return low is not None and low >= 1
