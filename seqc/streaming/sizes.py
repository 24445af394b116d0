"""The sizes of a Program in their simplest form, and what bounds the number of steps in them."""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.fx as fx

from seqc import _torch
from seqc.outside import is_size
from seqc.program import Program
from seqc.sizes import is_even, simpler


def simplify(program: Program, time: sympy.Symbol, longest: int | None) -> None:
    """Give the values of ``program`` the simpler sizes, where there are at most ``longest`` steps."""
    env = program.fake_mode.shape_env
    traced = {d.symbol: d.traced for d in program.dims}
    known: dict[Any, Any] = {}

    def size(value: Any) -> Any:
        expr = _torch.size_expr(value)
        if is_even(expr, time):
            return value
        if expr not in known:
            bare = expr if longest is None else _torch.without_bounds(expr, time, longest)
            known[expr] = simpler(bare, time)
        found = known[expr]
        return value if found == expr else _torch.symint(env, found, int(found.subs(traced)))

    def of(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(of, value))
        if not isinstance(value, torch.Tensor):
            return value
        sizes = [size(s) for s in value.shape]
        if all(a is b for a, b in zip(sizes, value.shape, strict=True)):
            return value
        with program.fake_mode:
            return torch.empty(sizes, dtype=value.dtype, device=value.device)

    for node in program.graph.nodes:
        value = node.meta.get("val")
        node.meta["val"] = size(value) if is_size(node) and isinstance(value, torch.SymInt) else of(value)


def bound(program: Program, time: sympy.Symbol) -> tuple[int, fx.Node] | None:
    """The least number that the steps, as many as were traced, are bounded by in a size, and where; None where none is.

    A part ``table[:n]`` of n steps has min(n, entries) of them: a stream of more steps than entries does not go on.
    """
    traced = next(d.traced for d in program.dims if d.symbol == time)
    found: dict[int, fx.Node] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, torch.Tensor) else ():
            for most in _torch.bounds(_torch.size_expr(size), time):
                if most >= traced:
                    found.setdefault(most, node)
    return min(found.items(), key=lambda item: item[0], default=None)
