"""Confirms by numbers that nodes written in place of others compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from seqc import _torch
from seqc.ops.recurrence import is_recurrence, parts

_SIZES = (3, 2, 7, 4, 6, 8)
_FEWEST_STEPS = 3

# Of their operand these read only the shape.
_READS_SHAPES = frozenset(
    getattr(torch.ops.aten, name).default
    for name in ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
)


def largest_error(
    pairs: Sequence[tuple[fx.Node, fx.Node]],
    boundary: Sequence[fx.Node],
    weights: Mapping[str, torch.Tensor],
    trip: int | torch.SymInt,
    seed: int = 0,
) -> float:
    """The largest error of ``pairs`` (old node, new node) in float64: |old - new| / (|old| + median of |old|).

    Values of ``boundary``, and of whatever lies before it, are random; sizes are small, but ``trip`` is at least 3. Two
    distributions are tried: normal, and uniform between 0.1 and 0.9; elements of ``weights`` keep their signs. inf where
    a shape differs, where there are no values, or where neither distribution gives finite ones.
    """
    return _largest(pairs, _behind(pairs, set(boundary)), weights, _sizes(_torch.size_expr(trip)), seed)


def largest_error_between(
    pairs: Sequence[tuple[fx.Node, fx.Node]],
    boundary: Sequence[fx.Node],
    weights: Mapping[str, torch.Tensor],
    trip: Any,
    fewest: int,
    seed: int = 0,
) -> float:
    """As :func:`largest_error`, where only what lies between ``boundary`` and ``pairs`` is computed, all else random.

    ``trip``, an expression, is at least ``fewest`` where its symbols allow it.
    """
    computed = {n for pair in pairs for node in pair for n in _above(node, set(boundary))}
    return _largest(pairs, {n for n in computed if n.op == "call_function"}, weights, _sizes(trip, fewest), seed)


def _largest(
    pairs: Sequence[tuple[fx.Node, fx.Node]],
    computed: set[fx.Node],
    weights: Mapping[str, torch.Tensor],
    sizes: dict[Any, int],
    seed: int,
) -> float:
    errors = []
    for spread in ("normal", "unit"):
        evaluation = _Evaluation(computed, weights, dict(sizes), seed, spread)
        found = [_error(evaluation.value(old), evaluation.value(new)) for old, new in pairs]
        if None not in found:
            errors += [error for error in found if error is not None]
    return max(errors, default=float("inf"))


def _error(old: torch.Tensor, new: torch.Tensor) -> float | None:
    """None where neither is finite throughout."""
    if old.shape != new.shape:
        return float("inf")
    if not bool(old.isfinite().all()) and not bool(new.isfinite().all()):
        return None
    if not old.numel():
        return float("inf")
    error = float(((old - new).abs() / (old.abs() + old.abs().median()).clamp_min(1e-300)).max())
    return error if error == error else float("inf")


def _behind(pairs: Sequence[tuple[fx.Node, fx.Node]], cut: set[fx.Node]) -> set[fx.Node]:
    """What lies behind the boundary ``cut``, and what reads no input at all."""
    new = {n for _, node in pairs for n in _above(node, cut)}
    behind: set[fx.Node] = set()
    # A constant of the boundary, such as a state of zeros, is that of other layers too: what reads it lies not behind.
    roots = {n for n in cut if n.op == "placeholder" or any(_is_tensor(a) for a in n.all_input_nodes)}
    for node in pairs[0][0].graph.nodes:
        tensors = [n for n in node.all_input_nodes if _is_tensor(n)]
        constant = node.op == "call_function" and node not in cut and all(n in behind for n in tensors)
        near = any(n in cut and n not in roots and node in new for n in tensors)
        if constant or near or any(n in behind or n in roots for n in tensors):
            behind.add(node)
    return behind


def _sizes(expr: Any, fewest: int = _FEWEST_STEPS) -> dict[Any, int]:
    """Sizes for the symbols of ``expr`` at which there are at least ``fewest`` steps."""
    for size in (5, 9, 17, 33, 65, 129, 257, 513, 1025):
        sizes = {symbol: size + i for i, symbol in enumerate(sorted(expr.free_symbols, key=str))}
        if int(expr.subs(sizes)) >= fewest:
            return sizes
    return {}


class _Evaluation:
    """Values of nodes in float64: those of ``behind`` are computed, all others random."""

    def __init__(
        self,
        behind: set[fx.Node],
        weights: Mapping[str, torch.Tensor],
        sizes: dict[Any, int],
        seed: int,
        spread: str,
    ) -> None:
        self.behind, self.weights, self.spread = behind, weights, spread
        self.values: dict[fx.Node, Any] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes = sizes

    def value(self, node: fx.Node) -> Any:
        pending = [node]
        while pending:
            current = pending[-1]
            computed = current in self.behind and _is_tensor(current)
            waiting = [n for n in current.all_input_nodes if n not in self.values] if computed else []
            if current in self.values or not waiting:
                pending.pop()
                if current not in self.values:
                    self.values[current] = self._compute(current) if computed else self._input(current)
            else:
                pending += waiting
        return self.values[node]

    def _compute(self, node: fx.Node) -> Any:
        if is_recurrence(node):
            loop = parts(node)
            args = (_Float64(loop.body), *fx.node.map_arg(node.args[1:], lambda n: self.values[n]))
            return node.target(*args)  # type: ignore[operator]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        return _doubled(node.target(*_wide(args), **_wide(kwargs)))  # type: ignore[operator]

    def _input(self, node: fx.Node) -> Any:
        value = self._draw(node.meta.get("val"))
        weight = self.weights.get(node.name)
        if weight is None or not weight.dtype.is_floating_point:
            return value
        return torch.where(weight < 0, -value.abs(), value.abs())

    def _draw(self, value: Any) -> Any:
        if isinstance(value, (torch.SymInt, int)):
            return self._size(value)
        if isinstance(value, (tuple, list)):
            return [self._draw(part) for part in value]
        if not isinstance(value, torch.Tensor):
            return value
        shape = [self._size(s) for s in value.shape]
        if value.dtype == torch.bool:
            return torch.rand(shape, generator=self.generator) < 0.5
        if not value.dtype.is_floating_point:
            return torch.zeros(shape, dtype=value.dtype)
        if self.spread == "normal":
            return torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return 0.1 + 0.8 * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def _size(self, size: Any) -> int:
        expr = _torch.size_expr(size)
        for symbol in sorted(expr.free_symbols, key=str):
            self.sizes.setdefault(symbol, _SIZES[len(self.sizes) % len(_SIZES)] + 6 * (len(self.sizes) // len(_SIZES)))
        return int(expr.subs(self.sizes))


def _above(node: fx.Node, boundary: set[fx.Node]) -> set[fx.Node]:
    """``node`` and what its values are computed from, down to ``boundary``."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in found and current not in boundary:
            found.add(current)
            pending += [] if current.target in _READS_SHAPES else current.all_input_nodes
    return found


def _is_tensor(node: fx.Node) -> bool:
    """Whether the node is a tensor, or several values."""
    return isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))


class _Float64(fx.Interpreter):
    """Runs a body with float64 in place of float32."""

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _doubled(super().call_function(target, _wide(args), _wide(kwargs)))


def _wide(arg: Any) -> Any:
    if isinstance(arg, torch.dtype):
        return torch.float64 if arg.is_floating_point else arg
    if isinstance(arg, (tuple, list)):
        return type(arg)(_wide(a) for a in arg)
    if isinstance(arg, dict):
        return {k: _wide(v) for k, v in arg.items()}
    return arg


def _doubled(result: Any) -> Any:
    """``result`` in float64, also where an operation such as zeros is told no dtype."""
    is_single = isinstance(result, torch.Tensor) and result.dtype == torch.float32
    return result.double() if is_single else result
