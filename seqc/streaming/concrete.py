"""Values of a Program's graph at concrete sizes: what depends on sizes and weights alone can simply be looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.outside import is_size

aten = torch.ops.aten

# Read no more of their first argument than its shape, type and place.
SHAPE_ONLY = frozenset(
    {
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.new_empty.default,
    }
)


def size_at(size: Any, sizes: Mapping[sympy.Symbol, int]) -> int:
    """A size, symbolic or not, where the dimensions have ``sizes``."""
    return int(_torch.size_expr(size).subs(sizes)) if isinstance(size, torch.SymInt) else int(size)


def shape_at(value: torch.Tensor, sizes: Mapping[sympy.Symbol, int]) -> tuple[int, ...]:
    """The shape of a fake tensor where the dimensions have ``sizes``."""
    return tuple(size_at(s, sizes) for s in value.shape)


class Concrete:
    """Evaluates nodes that read no input's values, with the dimensions at ``sizes``."""

    def __init__(self, weights: Mapping[str, torch.Tensor], sizes: Mapping[sympy.Symbol, int]) -> None:
        self.weights, self.sizes = weights, sizes
        self._known: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """The value of ``node``, a tensor, a number, or a tuple of these."""
        pending = [node]
        while pending:
            top = pending[-1]
            waiting = [n for n in self._read(top) if n not in self._known]
            pending += waiting
            if not waiting:
                self._known[pending.pop()] = self._compute(top)
        return self._known[node]

    def _read(self, node: fx.Node) -> list[fx.Node]:
        if node in self._known or node.op != "call_function" or is_size(node):
            return []
        nodes = [n for n in node.all_input_nodes if not is_size(n)]
        return [n for n in nodes if n is not node.args[0]] if node.target in SHAPE_ONLY else nodes

    def _compute(self, node: fx.Node) -> Any:
        if node in self._known:
            return self._known[node]
        if node.op == "placeholder":
            return self.weights[node.name]
        if is_size(node):
            return self._size(node.meta["val"])

        def concrete(arg: Any) -> Any:
            if not isinstance(arg, fx.Node):
                return arg
            if is_size(arg):
                return self._size(arg.meta["val"])
            if node.target in SHAPE_ONLY:
                value = arg.meta["val"]
                return torch.empty(shape_at(value, self.sizes), dtype=value.dtype)
            return self._known[arg]

        args, kwargs = pytree.tree_map(concrete, self.arguments(node), is_leaf=lambda a: a is None)
        with torch.no_grad():
            return self.call(node, args, kwargs)

    def arguments(self, node: fx.Node) -> tuple[Any, Any]:
        """The arguments of ``node`` as they stand in the graph."""
        return node.args, dict(node.kwargs)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The result of ``node``'s operation."""
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _size(self, value: Any) -> Any:
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            number = value.node.expr.subs(self.sizes)
            return float(number) if isinstance(value, torch.SymFloat) else bool(number)
        return size_at(value, self.sizes) if isinstance(value, torch.SymInt) else value
