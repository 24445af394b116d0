"""Hoist: what a loop's body computes without reading the carry leaves the loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
import torch.fx as fx

from seqc import _torch
from seqc.batch import Value, is_projection, over_time
from seqc.loop import Loop
from seqc.ops.recurrence import is_recurrence
from seqc.passes.loop_cleanup import clean, delay
from seqc.program import Program, flat_args, source_line
from seqc.rewrite import remove_dead_code
from seqc.verify import same_shape

aten = torch.ops.aten

# A free size (a sequence read as a whole inside the body) counts as this much when memory is estimated.
_FREE_SIZE = 1024

Sources = frozenset[tuple[fx.Node, int]]
"""Values that cross a loop's boundary, by outer node, with the bytes of each step."""


@dataclass(frozen=True)
class Hoist:
    """Moves work out of ``seqc::recurrence`` bodies, innermost loops first.

    (a) What reads invariants only is computed once, before the loop.
    (b) What reads xs and invariants only is computed for all steps at once, before the loop: the projection of each
        step's input becomes one GEMM over [trip * batch, ...].
    (c) What does not feed the next carry is computed for all steps at once, after the loop.
    A carry that is passed on unchanged becomes an invariant, one that only delays a per-step value becomes an x, and
    inputs, carries and results that nobody reads, or that are there twice, are removed.

    Memory rule: projections by a matrix that is the same in each step, and lookups in such a table, always leave. Any
    other operation leaves where the bytes that must then be kept for each step are at most ``max_growth`` times the
    bytes that cross the loop's boundary in its place. So exp(dt[..., None] * A), which blows [B, D] up to [B, D, N],
    stays in the body: on ONNX Runtime hoisting it costs 2.3 times the whole loop (notes/lowerings.md), and 16 times the
    memory.

    ``tolerance``: results are not bitwise equal, because a GEMM over [trip * batch] rows may sum in another order than
    one over [batch] rows; each sum stays within the usual error of a float32 dot product, about 1e-6 of its scale.
    Everything else is the same operation on the same numbers.
    """

    max_growth: float = 4.0

    name: ClassVar[str] = "hoist"
    tolerance: ClassVar[float] = 1e-5

    def __call__(self, program: Program) -> int:
        mode = program.fake_mode
        changes = 0
        for gm in reversed(list(program.graph_modules())):
            for node in [n for n in gm.graph.nodes if is_recurrence(n)]:
                changes += self._loop(gm, node, mode, program.reasons)
        if changes:
            remove_dead_code(program)
        return changes

    def _loop(self, gm: fx.GraphModule, node: fx.Node, mode: Any, reasons: list[str]) -> int:
        loop = Loop(gm, node, mode)
        total = clean(loop)
        sources: dict[fx.Node, Sources] = {}
        while True:
            mover = _Mover(loop, self.max_growth, sources)
            moved = mover.before() + delay(loop)
            if not moved:
                break
            total += moved + clean(loop)
        reasons += mover.kept
        moved = _Mover(loop, self.max_growth, sources).behind()
        if moved:
            total += moved + clean(loop)
        loop.commit()
        return total


class _Mover:
    """One round of moving operations out of a loop; knows which body value is which value outside."""

    def __init__(self, loop: Loop, max_growth: float, sources: dict[fx.Node, Sources]) -> None:
        """``sources``: for each x that an earlier round made, what crossed the boundary in its place at first."""
        self.loop = loop
        self.sources = sources
        self.max_growth = max_growth
        self.outside: dict[fx.Node, Value] = {inner: Value(outer, True) for outer, inner in loop.xs}
        self.outside |= {inner: Value(outer, False) for outer, inner in loop.invariants}
        self.sizes: dict[fx.Node, fx.Node | int] = {}
        self.kept: list[str] = []
        """Why operations that do not read the carry stay in the loop."""
        loop.sync()

    def before(self) -> int:
        """(a) and (b)."""
        loop = self.loop
        moved: list[fx.Node] = []
        roots = {inner: self.sources.get(outer, _source(outer, inner)) for outer, inner in loop.xs}
        ys = set(loop.ys)
        with loop.emit.before(loop.node):
            for node in loop.operations():
                if _is_size(node) or not self._movable(node):
                    continue
                args = [a for a in _tensor_args(node) if self.outside[a].batched]
                sources: Sources = frozenset().union(*(roots[a] for a in args))
                projects = self._projects(node)
                crossing = sum(size for _, size in sources)
                small = _bytes([node]) <= self.max_growth * crossing
                if args and not (projects or small or node in ys):
                    growth = _bytes([node]) / max(crossing, 1)
                    self._keep(node, f"for all steps at once it takes {growth:.0f} times the memory of what it reads")
                    continue
                value = self._write(node)
                if value is None:
                    self._keep(node, "there is no rule to compute it for all steps at once")
                    continue
                self.outside[node] = value
                roots[node] = _source(value.node, node) if projects else sources
                self.sources[value.node] = roots[node]
                moved.append(node)
        return self._replace(moved)

    def _keep(self, node: fx.Node, why: str) -> None:
        self.kept.append(f"{node.target} at {source_line(node) or '?'} stays in the loop: {why}")

    def behind(self) -> int:
        """(c)."""
        banned: set[fx.Node] = set()
        for node in self.loop.operations():
            if isinstance(node.meta["val"], torch.SymInt):
                self._size(node)  # written now, so that undoing an attempt leaves them in place
        while True:
            chosen = self._chosen_behind(banned)
            mark, saved = self.loop.emit.mark(), dict(self.outside)
            failed = self._write_behind(chosen)
            if failed is None:
                break
            self.loop.emit.undo(mark)
            self.outside = saved
            banned.add(failed)
        for i in range(len(self.loop.carries), len(self.loop.results)):
            value, reader = self.loop.results[i]
            if value in chosen and reader is not None:
                reader.replace_all_uses_with(self.outside[value].node)
                self.loop.gm.graph.erase_node(reader)
                self.loop.results[i] = (value, None)
        return len(chosen)

    def _write_behind(self, chosen: list[fx.Node]) -> fx.Node | None:
        """Write ``chosen`` behind the loop; the node for which there is no rule, or None where all are written."""
        inside = set(chosen)
        entering = {a for n in chosen for a in _tensor_args(n) if a not in inside and a not in self.outside}
        pending = {a: self.loop.read(a) for a in entering if isinstance(a.meta["val"], torch.Tensor)}
        self.outside |= {a: Value(reader, True) for a, reader in pending.items()}
        with self.loop.emit.before(self.loop.after):
            for node in chosen:
                value = self._write(node) if self._movable(node) else None
                if value is None:
                    return node
                # Where all operands are the same in each step, (a) has moved the node already.
                self.outside[node] = value
        return None

    def _chosen_behind(self, banned: set[fx.Node]) -> list[fx.Node]:
        """The operations that only results read and that pass the memory rule, in order; closed under users."""
        loop = self.loop
        results = set(loop.ys)
        feeding = _ancestors(loop.next_carries)
        output = loop.body.graph.output_node()
        chosen: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in reversed(loop.operations()):
            if node in feeding or node in banned or _is_size(node) or is_recurrence(node) or not _is_pure(node):
                continue
            if not all(user in chosen or (user is output and node in results) for user in node.users):
                continue
            roots = frozenset([node]) if node in results else frozenset()
            for user in node.users:
                if user in chosen:
                    roots |= frozenset([node]) if self._projects_behind(user) else chosen[user]
            kept = {a for a in _tensor_args(node) if a not in self.outside and a not in results}
            if self._projects_behind(node) or _bytes(kept) <= self.max_growth * _bytes(roots):
                chosen[node] = roots
        return [n for n in loop.operations() if n in chosen]

    def _projects_behind(self, node: fx.Node) -> bool:
        """As :meth:`_projects`; a value of the body that is not known outside differs from step to step."""
        return is_projection(tuple(Value(a, self._varies(a)) for a in node.args if isinstance(a, fx.Node)), node.target)

    def _varies(self, value: fx.Node) -> bool:
        return value not in self.outside or self.outside[value].batched

    def _projects(self, node: fx.Node) -> bool:
        """Whether ``node`` multiplies values of each step by a matrix that is the same in each step."""
        return is_projection(tuple(self.outside.get(a, a) for a in node.args if isinstance(a, fx.Node)), node.target)

    def _movable(self, node: fx.Node) -> bool:
        """Whether every operand is known outside, sizes included, and the operation always gives the same result."""
        if not _is_pure(node) or is_recurrence(node):
            return False
        operands = [a for a in flat_args(node) if isinstance(a, fx.Node)]
        return all(self._size(a) is not None if _is_size(a) else a in self.outside for a in operands)

    def _write(self, node: fx.Node) -> Value | None:
        """Write ``node`` outside, for all steps at once where its operands differ from step to step."""
        varies = any(self.outside[a].batched for a in _tensor_args(node))

        def outside(operand: fx.Node) -> Any:
            if _is_size(operand):
                return self._size(operand)
            return self.outside[operand] if varies else self.outside[operand].node

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), outside)
        with self.loop.emit.of(node):
            if not varies:
                return Value(self.loop.emit(node.target, *args, **kwargs), False)
            written = over_time(self.loop.emit, node, args, kwargs, self.loop.trip)
        return None if written is None else Value(written, True)

    def _replace(self, moved: list[fx.Node]) -> int:
        """Let the rest of the body read the moved values as xs and invariants."""
        gone = set(moved)
        for node in moved:
            value = self.outside[node]
            if not isinstance(node.meta["val"], torch.Tensor) or all(user in gone for user in node.users):
                continue
            feed = self.loop.feed_step if value.batched else self.loop.feed_invariant
            feed(node, value.node)
        return len(moved)

    def _size(self, node: fx.Node) -> fx.Node | int | None:
        """The value of the body's size ``node`` outside the loop; None where it cannot be known there."""
        value = node.meta["val"]
        if isinstance(value, int):
            return value
        if not isinstance(value, torch.SymInt):
            return None
        if node not in self.sizes:
            found = self._make_size(_torch.size_expr(value))
            if found is None:
                return None
            self.sizes[node] = found
        return self.sizes[node]

    def _make_size(self, expr: Any) -> fx.Node | int | None:
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


def _source(outer: fx.Node, inner: fx.Node) -> Sources:
    return frozenset([(outer, _bytes([inner]))])


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _is_pure(node: fx.Node) -> bool:
    """Whether the operation neither writes nor draws random numbers."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return torch.Tag.nondeterministic_seeded not in target.tags and not target._schema.is_mutable


def _tensor_args(node: fx.Node) -> list[fx.Node]:
    return [a for a in flat_args(node) if isinstance(a, fx.Node) and not _is_size(a)]


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def _bytes(nodes: Iterable[fx.Node]) -> int:
    return sum(_tensor_bytes(leaf) for node in nodes for leaf in _leaves(node.meta["val"]))


def _leaves(value: Any) -> list[torch.Tensor]:
    return [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, torch.Tensor)]


def _tensor_bytes(value: torch.Tensor) -> int:
    total = sympy.Integer(value.dtype.itemsize)
    for size in value.shape:
        expr = _torch.size_expr(size)
        total *= expr.subs(dict.fromkeys(expr.free_symbols, _FREE_SIZE))
    return int(total)
