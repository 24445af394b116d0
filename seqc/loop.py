"""A recurrence taken apart for editing: which values enter and leave, and the edits that keep both sides in step."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from seqc.dependence import ancestors
from seqc.emit import Emitter
from seqc.ops.recurrence import parts, recurrence_shapes
from seqc.rewrite import replace_node, result_index

aten = torch.ops.aten


class Loop:
    """An editable view of one recurrence node. Call :meth:`commit` after the last edit.

    ``carries``, ``xs`` and ``invariants`` pair the outer value with the body's placeholder; ``results`` pairs the
    body's value with the outer getitem node that reads it (None where nothing does): one per carry, then the ys.
    """

    def __init__(self, gm: fx.GraphModule, node: fx.Node, mode: Any) -> None:
        p = parts(node)
        self.gm, self.node, self.body, self.trip, self.reverse = gm, node, p.body, p.trip, p.reverse
        self.carries = list(zip(p.carries, p.body_carries, strict=True))
        self.xs = list(zip(p.xs, p.body_xs, strict=True))
        self.invariants = list(zip(p.invariants, p.body_invariants, strict=True))
        self.emit = Emitter(gm, mode)
        self.results: list[tuple[fx.Node, fx.Node | None]] = [(v, None) for v in (*p.next_carries, *p.ys)]
        for user in sorted(node.users, key=result_index, reverse=True):
            self._adopt(user)
        self.after = self._behind()

    def _adopt(self, getitem: fx.Node) -> None:
        """Make ``getitem`` the one reader of its result, right behind the loop."""
        i = result_index(getitem)
        value, reader = self.results[i]
        if reader is None:
            self.node.append(getitem)
            self.results[i] = (value, getitem)
        else:
            replace_node(getitem, reader)

    def _behind(self) -> fx.Node:
        readers = {reader for _, reader in self.results if reader is not None}
        place = self.node.next
        while place in readers:
            place = place.next
        return place

    @property
    def next_carries(self) -> list[fx.Node]:
        return [value for value, _ in self.results[: len(self.carries)]]

    @property
    def ys(self) -> list[fx.Node]:
        return [value for value, _ in self.results[len(self.carries) :]]

    @property
    def is_read_by_nobody(self) -> bool:
        return all(reader is None for _, reader in self.results)

    def operations(self) -> list[fx.Node]:
        return [n for n in self.body.graph.nodes if n.op == "call_function"]

    def carries_behind(self, node: fx.Node) -> frozenset[fx.Node]:
        """The carries, as the body knows them, that ``node`` of the body is computed from in the same step."""
        carries = {inner for _, inner in self.carries}
        return frozenset(ancestors([node]) & carries)

    def sync(self) -> None:
        """Let the body's output node say what ``results`` says, so that users of a value are known."""
        self.body.graph.output_node().args = (tuple(value for value, _ in self.results),)

    def reload(self) -> None:
        """Read back the body's results after nodes of the body were replaced."""
        values = self.body.graph.output_node().args[0]
        assert isinstance(values, tuple)
        readers = [reader for _, reader in self.results]
        self.results = list(zip(values, readers, strict=True))  # type: ignore[arg-type]

    def feed_step(self, inner: fx.Node, outer: fx.Node) -> fx.Node:
        """Replace ``inner`` of the body by one step of ``outer`` [trip, ...]."""
        return self._feed(inner, outer, self.xs)

    def feed_invariant(self, inner: fx.Node, outer: fx.Node) -> fx.Node:
        """Replace ``inner`` of the body by ``outer``, the same in each step."""
        return self._feed(inner, outer, self.invariants)

    def _feed(self, inner: fx.Node, outer: fx.Node, pairs: list[tuple[fx.Node, fx.Node]]) -> fx.Node:
        others = [(o, p) for o, p in pairs if p is not inner]
        placeholder = self._input(outer, others, inner.name, inner.meta["val"])
        pairs[:] = [*others, *((o, p) for o, p in pairs if p is inner)]
        inner.replace_all_uses_with(placeholder)
        self.reload()
        return placeholder

    def step_of(self, outer: fx.Node) -> fx.Node:
        """The body's placeholder for one step of ``outer`` [trip, ...]; a new x where it is none yet."""
        value = outer.meta["val"]
        return self._input(outer, self.xs, outer.name, self.emit.compute(lambda: value.new_empty(value.shape[1:])))

    def invariant_of(self, outer: fx.Node) -> fx.Node:
        """The body's placeholder for ``outer``, the same in each step."""
        return self._input(outer, self.invariants, outer.name, outer.meta["val"])

    def _input(self, outer: fx.Node, pairs: list[tuple[fx.Node, fx.Node]], name: str, value: Any) -> fx.Node:
        for known, placeholder in pairs:
            if known is outer:
                return placeholder
        first = next(iter(self.body.graph.nodes))
        with self.body.graph.inserting_before(first):
            placeholder = self.body.graph.placeholder(f"{name}_in")
        placeholder.meta["val"] = value
        pairs.append((outer, placeholder))
        return placeholder

    def read(self, value: fx.Node) -> fx.Node:
        """The outer node [trip, ...] that holds ``value`` of all steps: a y, added where it is none yet."""
        for i in range(len(self.carries), len(self.results)):
            found, reader = self.results[i]
            if found is value:
                if reader is None:
                    reader = self._reader(value)
                    self.results[i] = (value, reader)
                return reader
        reader = self._reader(value)
        self.results.append((value, reader))
        self.sync()
        return reader

    def _reader(self, value: fx.Node) -> fx.Node:
        with self.gm.graph.inserting_after(self.node):
            reader = self.gm.graph.call_function(operator.getitem, (self.node, -1))  # numbered by commit
        trip = self.trip.meta["val"] if isinstance(self.trip, fx.Node) else self.trip
        inner = value.meta["val"]
        reader.meta["val"] = self.emit.compute(lambda: inner.new_empty((trip, *inner.shape)))
        return reader

    def drop_input(self, pairs: list[tuple[fx.Node, fx.Node]], inner: fx.Node) -> None:
        """Remove an input that the body does not read."""
        pairs[:] = [(outer, p) for outer, p in pairs if p is not inner]
        self.body.graph.erase_node(inner)

    def drop_result(self, index: int) -> None:
        """Remove a result that nothing reads."""
        del self.results[index]
        self.sync()

    def drop_carry(self, index: int) -> fx.Node:
        """Remove carry ``index`` and its final value, which nothing reads; its placeholder stays for the caller."""
        _, inner = self.carries.pop(index)
        self.drop_result(index)
        return inner

    def erase_unused(self) -> int:
        """Remove operations of the body whose value nothing reads."""
        self.sync()
        count = 0
        for node in reversed(list(self.body.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                self.body.graph.erase_node(node)
                count += node.op == "call_function"
        return count

    def commit(self) -> None:
        """Write the edited recurrence back. With no result left the node is removed."""
        self.sync()
        if self.is_read_by_nobody:
            self.gm.graph.erase_node(self.node)
            return
        pairs = (*self.carries, *self.xs, *self.invariants)
        first = next(n for n in self.body.graph.nodes)
        for _, placeholder in pairs:
            first.prepend(placeholder) if placeholder is not first else None
            first = placeholder.next
        for i, (_, reader) in reversed(list(enumerate(self.results))):
            if reader is not None:
                reader.args = (self.node, i)
                self.node.append(reader)
        self.body.delete_all_unused_submodules()
        self.body.recompile()
        outer = [tuple(o for o, _ in group) for group in (self.carries, self.xs, self.invariants)]
        self.node.args = (self.node.args[0], self.trip, *outer, self.reverse)
        self.node.kwargs = {}
        self.node.meta["val"] = self.emit.compute(self._shapes)
        self.gm.recompile()

    def _shapes(self) -> Any:
        vals = [[o.meta["val"] for o, _ in group] for group in (self.carries, self.xs, self.invariants)]
        trip = self.trip.meta["val"] if isinstance(self.trip, fx.Node) else self.trip
        return recurrence_shapes(self.body, trip, vals[0], vals[1], vals[2], self.reverse)
