"""Hoist: what a loop's body computes without reading the carry leaves the loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from seqc.batch import Value, is_projection
from seqc.dependence import ancestors
from seqc.loop import Loop
from seqc.memory import node_bytes
from seqc.ops.recurrence import is_recurrence
from seqc.outside import Outside, is_pure, is_size, tensor_args
from seqc.passes.loop_cleanup import clean, delay
from seqc.program import Program, source_line
from seqc.rewrite import remove_dead_code

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

    max_growth: float = 1.5

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
        self.outside = Outside(loop)
        self.known = self.outside.known
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
                if is_size(node) or not self.outside.movable(node):
                    continue
                args = [a for a in tensor_args(node) if self.known[a].batched]
                sources: Sources = frozenset().union(*(roots[a] for a in args))
                projects = self._projects(node)
                crossing = sum(size for _, size in sources)
                small = node_bytes([node]) <= self.max_growth * crossing
                if args and not (projects or small or node in ys):
                    growth = node_bytes([node]) / max(crossing, 1)
                    self._keep(node, f"for all steps at once it takes {growth:.0f} times the memory of what it reads")
                    continue
                value = self.outside.write(node)
                if value is None:
                    self._keep(node, "there is no rule to compute it for all steps at once")
                    continue
                self.known[node] = value
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
                self.outside.size(node)  # written now, so that undoing an attempt leaves them in place
        while True:
            chosen = self._chosen_behind(banned)
            mark, saved = self.loop.emit.mark(), dict(self.known)
            failed = self._write_behind(chosen)
            if failed is None:
                break
            self.loop.emit.undo(mark)
            self.known = self.outside.known = saved
            banned.add(failed)
        for i in range(len(self.loop.carries), len(self.loop.results)):
            value, reader = self.loop.results[i]
            if value in chosen and reader is not None:
                reader.replace_all_uses_with(self.known[value].node)
                self.loop.gm.graph.erase_node(reader)
                self.loop.results[i] = (value, None)
        return len(chosen)

    def _write_behind(self, chosen: list[fx.Node]) -> fx.Node | None:
        """Write ``chosen`` behind the loop; the node for which there is no rule, or None where all are written."""
        inside = set(chosen)
        entering = dict.fromkeys(a for n in chosen for a in tensor_args(n) if a not in inside and a not in self.known)
        pending = {a: self.loop.read(a) for a in entering if isinstance(a.meta["val"], torch.Tensor)}
        self.known |= {a: Value(reader, True) for a, reader in pending.items()}
        with self.loop.emit.before(self.loop.after):
            for node in chosen:
                value = self.outside.write(node) if self.outside.movable(node) else None
                if value is None:
                    return node
                # Where all operands are the same in each step, (a) has moved the node already.
                self.known[node] = value
        return None

    def _chosen_behind(self, banned: set[fx.Node]) -> list[fx.Node]:
        """The operations that only results read and that pass the memory rule, in order; closed under users."""
        loop = self.loop
        results = set(loop.ys)
        feeding = ancestors(loop.next_carries)
        output = loop.body.graph.output_node()
        chosen: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in reversed(loop.operations()):
            if node in feeding or node in banned or is_size(node) or is_recurrence(node) or not is_pure(node):
                continue
            if not all(user in chosen or (user is output and node in results) for user in node.users):
                continue
            roots = frozenset([node]) if node in results else frozenset()
            for user in node.users:
                if user in chosen:
                    roots |= frozenset([node]) if self._projects_behind(user) else chosen[user]
            kept = {a for a in tensor_args(node) if a not in self.known and a not in results}
            if self._projects_behind(node) or node_bytes(kept) <= self.max_growth * node_bytes(roots):
                chosen[node] = roots
        return [n for n in loop.operations() if n in chosen]

    def _projects_behind(self, node: fx.Node) -> bool:
        """As :meth:`_projects`; a value of the body that is not known outside differs from step to step."""
        return is_projection(tuple(Value(a, self._varies(a)) for a in node.args if isinstance(a, fx.Node)), node.target)

    def _varies(self, value: fx.Node) -> bool:
        return value not in self.known or self.known[value].batched

    def _projects(self, node: fx.Node) -> bool:
        """Whether ``node`` multiplies values of each step by a matrix that is the same in each step."""
        return is_projection(tuple(self.known.get(a, a) for a in node.args if isinstance(a, fx.Node)), node.target)

    def _replace(self, moved: list[fx.Node]) -> int:
        """Let the rest of the body read the moved values as xs and invariants."""
        gone = set(moved)
        for node in moved:
            value = self.known[node]
            if not isinstance(node.meta["val"], torch.Tensor) or all(user in gone for user in node.users):
                continue
            feed = self.loop.feed_step if value.batched else self.loop.feed_invariant
            feed(node, value.node)
        return len(moved)


def _source(outer: fx.Node, inner: fx.Node) -> Sources:
    return frozenset([(outer, node_bytes([inner]))])
