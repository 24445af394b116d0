"""Values of a loop's body computed outside of it: for all steps at once, or once where they are the same in each."""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.fx as fx

from seqc import _torch
from seqc.batch import Value, over_time
from seqc.loop import Loop
from seqc.ops.recurrence import is_recurrence
from seqc.program import flat_args
from seqc.verify import same_shape

aten = torch.ops.aten


class Outside:
    """Knows which value of a loop's body is which value outside, and writes further ones there.

    Values are written where ``loop.emit`` stands, in front of the loop or behind it. ``trip`` is how many are computed at
    once of what differs from step to step, by default those of all steps.
    """

    def __init__(self, loop: Loop, trip: Any = None) -> None:
        self.loop = loop
        self.trip = loop.trip if trip is None else trip
        self.known: dict[fx.Node, Value] = {inner: Value(outer, True) for outer, inner in loop.xs}
        self.known |= {inner: Value(outer, False) for outer, inner in loop.invariants}
        self.sizes: dict[fx.Node, fx.Node | int] = {}

    def value(self, node: fx.Node) -> Value | None:
        """``node``, written outside with all it is computed from; None where that reads the state or has no rule."""
        pending = [node]
        while pending:
            current = pending[-1]
            waiting = [a for a in tensor_args(current) if a not in self.known]
            if current in self.known or not waiting:
                pending.pop()
                if current not in self.known:
                    value = self.write(current) if current.op == "call_function" and self.movable(current) else None
                    if value is None:
                        return None
                    self.known[current] = value
            else:
                pending += waiting
        return self.known[node]

    def movable(self, node: fx.Node) -> bool:
        """Whether every operand is known outside, sizes included, and the operation always gives the same result."""
        if not is_pure(node) or is_recurrence(node):
            return False
        operands = [a for a in flat_args(node) if isinstance(a, fx.Node)]
        return all(self.size(a) is not None if is_size(a) else a in self.known for a in operands)

    def write(self, node: fx.Node) -> Value | None:
        """Write ``node`` outside, for all steps at once where its operands differ from step to step."""
        varies = any(self.known[a].batched for a in tensor_args(node))

        def outside(operand: fx.Node) -> Any:
            if is_size(operand):
                return self.size(operand)
            return self.known[operand] if varies else self.known[operand].node

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), outside)
        with self.loop.emit.of(node):
            if not varies:
                return Value(self.loop.emit(node.target, *args, **kwargs), False)
            written = over_time(self.loop.emit, node, args, kwargs, self.trip)
        return None if written is None else Value(written, True)

    def size(self, node: fx.Node) -> fx.Node | int | None:
        """The value of the body's size ``node`` outside the loop; None where it cannot be known there."""
        value = node.meta["val"]
        if isinstance(value, int):
            return value
        if not isinstance(value, torch.SymInt):
            return None
        if node not in self.sizes:
            found = self.size_of(_torch.size_expr(value))
            if found is None:
                return None
            self.sizes[node] = found
        return self.sizes[node]

    def size_of(self, expr: Any) -> fx.Node | int | None:
        """A size given as an expression, outside the loop; None where a symbol of it is no input's size."""
        emit, graph, place = self.loop.emit, self.loop.gm.graph, self.loop.node
        if expr.is_Integer:
            return int(expr)
        for earlier in graph.nodes:
            if earlier is place:
                break
            value = earlier.meta.get("val")
            if isinstance(value, torch.SymInt) and same_shape((value,), (expr,)):
                found: fx.Node = earlier
                return found
        symbols: dict[sympy.Symbol, fx.Proxy] = {}
        with emit.before(place):
            for symbol in expr.free_symbols:
                source = self._symbol(symbol)
                if source is None:
                    return None
                symbols[symbol] = fx.Proxy(emit(aten.sym_size.int, *source))
            result = _torch.emit_expr(expr, symbols)
        assert isinstance(result, fx.Proxy)
        for written in graph.nodes:
            if "val" not in written.meta and written.op == "call_function":
                written.meta["val"] = emit.compute(written.target, *written.args)
        return result.node

    def _symbol(self, symbol: sympy.Symbol) -> tuple[fx.Node, int] | None:
        for node in self.loop.gm.graph.nodes:
            if node.op != "placeholder":
                return None
            for axis, size in enumerate(getattr(node.meta["val"], "shape", ())):
                if _torch.size_expr(size) == symbol:
                    return node, axis
        return None


def is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def is_pure(node: fx.Node) -> bool:
    """Whether the operation neither writes nor draws random numbers."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable


def tensor_args(node: fx.Node) -> list[fx.Node]:
    return [a for a in flat_args(node) if isinstance(a, fx.Node) and not is_size(a)]
