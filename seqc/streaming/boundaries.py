"""Computation in chunks that begin at fixed places, gone on with from the beginning of the last chunk.

The steps of the last chunk are kept, and what a loop over the chunks carried before it. Each call computes that chunk anew,
with the new steps behind those kept: what a chunk that is not full yet gives, the model says itself.

Whether a region goes on so is tried, in float64 and on random numbers: two pieces have to give what the whole gives, and
no step may change what earlier ones gave.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx

from seqc import _torch
from seqc.ops.recurrence import Parts, is_recurrence, parts, recurrence
from seqc.streaming.copied import Copy, as_in_the_model
from seqc.streaming.demand import refuse
from seqc.streaming.derivation import END, Derivation
from seqc.streaming.double import Double
from seqc.streaming.layers import item
from seqc.streaming.regions import Region, chunk_of
from seqc.streaming.states import Slot
from seqc.streaming.tried import kind_of, part, random_value, same

aten = torch.ops.aten

_LARGEST_CHUNK = 1024
_HINT = "compute it step by step, or in chunks whose outputs do not change when later steps come"


class FromBoundary:
    """A region that is computed from the beginning of the last chunk on."""

    def __init__(self, d: Derivation, region: Region) -> None:
        self.d, self.region = d, region
        self.chunk = chunk_of(d, region)
        self.kept = {n: d.axes(n)[0] for n in region.given if d.axes(n)}
        self._guard()
        self.loops = {
            n: self._behind(loop)
            for n in region.inside
            if is_recurrence(n)
            for loop in (parts(n),)
            if isinstance(loop.trip, fx.Node) and d.has_time(loop.trip.meta["val"])
        }
        if not d.shared(("from boundary", kind_of(region)), self._goes_on):
            raise refuse(
                region.exits[0],
                f"it computes in chunks of {self.chunk} steps, and does not go on from the end or a chunk of a piece",
                _HINT,
            )
        self.before = {
            (n, i): d.slot("recurrent_state", n, list(map(_torch.size_expr, value.shape)), value.dtype, start)
            for n in self.loops
            for i, start in enumerate(parts(n).carries)
            for value in (start.meta["val"],)
        }
        self.pending = {n: self._pending(n, axis) for n, axis in self.kept.items()}

    def _guard(self) -> None:
        for node in self.kept:
            if [_torch.size_expr(node.meta["val"].shape[a]) for a in self.d.axes(node)] != [self.d.time]:
                raise refuse(node, "it is read in chunks, but has not one element for each step of the sequence")
        if self.chunk > _LARGEST_CHUNK:
            raise refuse(
                self.region.exits[0], f"a computation in chunks of {self.chunk} steps is too large to be tried"
            )

    def _behind(self, loop: Parts) -> int:
        """How many chunks a loop walks behind the beginning of the last one: none, or that one."""
        d = self.d
        if any(n in d.timed or d.axes(n) for n in loop.carries):
            raise refuse(loop.node, "what is carried from chunk to chunk begins with a value of the sequence")
        trip = _torch.size_expr(loop.trip.meta["val"])
        others = {int(trip.subs(d.at(n))) - (n - 1) // self.chunk for n in range(1, 3 * self.chunk + 2)}
        if loop.reverse or others not in ({0}, {1}):
            raise refuse(loop.node, f"a loop that does not walk along all chunks of {self.chunk} steps", _HINT)
        return others.pop()

    def _pending(self, node: fx.Node, axis: int) -> Slot:
        """The steps of the last chunk."""
        d, value = self.d, node.meta["val"]

        def make() -> Slot:
            count = d.pending(self.chunk)
            exprs = [count if a == axis else _torch.size_expr(s) for a, s in enumerate(value.shape)]
            return d.slot("chunk", node, exprs, value.dtype, 0.0, pending=axis)

        found: Slot = d.shared(("pending", node, self.chunk), make)
        return found

    # -- writing ---------------------------------------------------------------------------------------------------------

    def write(self, new: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        d = self.d
        count = d.pending(self.chunk)
        length = count + d.time
        complete = self.chunk * _torch.floor_div(length - 1, self.chunk)
        given = dict(new)
        for node, axis in self.kept.items():
            slot = self.pending[node]
            given[node] = d.emit(aten.cat.default, [slot.placeholder, new[node]], axis)
            if slot.following is None:
                slot.following = d.emit(aten.slice.Tensor, given[node], axis, d.size(complete), END)
        first = {key: slot.placeholder for key, slot in self.before.items()}
        tracked = [n for n, behind in self.loops.items() if behind]
        copied = Copy(d, self.region, length, first, tracked=tracked).write(self.region.inside, given)
        for (node, i), slot in self.before.items():
            slot.following = self._carried(node, copied[node], i)
        return {n: self._newest(n, copied[n], count) for n in self.region.exits}

    def _carried(self, node: fx.Node, results: Any, index: int) -> fx.Node:
        """What ``node`` carried before the last chunk."""
        if not self.loops[node]:
            return item(self.d, results, index)  # type: ignore[no-any-return]
        behind = len(parts(node).carries) + len(parts(node).ys)
        return self.d.emit(aten.select.int, item(self.d, results, behind + index), 0, -1)

    def _newest(self, node: fx.Node, copied: fx.Node, count: sympy.Symbol) -> fx.Node:
        over = self.d.axes(node)
        if not over:
            return copied
        part = self.d.emit(aten.slice.Tensor, copied, over[0], self.d.size(count), END)
        return as_in_the_model(self.d, node, part)

    # -- trying ----------------------------------------------------------------------------------------------------------

    def _goes_on(self) -> bool:
        c = self.chunk
        lengths = ((1, 1), (1, c), (c, 1), (c, 2), (c + 1, c + 1), (2 * c - 1, 1), (2 * c, c + 3))
        return all(self._goes_on_after(*pieces) for pieces in lengths)

    def _goes_on_after(self, first: int, second: int) -> bool:
        torch.manual_seed(0)
        d, region = self.d, self.region
        start = (first - 1) // self.chunk * self.chunk
        given = {n: random_value(d, n, first + second) for n in region.given}
        try:
            whole = self._values(given, first + second, {})
            before = self._values(part(d, given, 0, first), first, {})
            states = {
                (n, i): value for n in self.loops for i, value in enumerate(_states(before, n, start // self.chunk))
            }
            after = self._values(part(d, given, start, first + second - start), first + second - start, states)
            return all(self._is_same(n, first - start, whole, before, after) for n in region.exits)
        except Exception:  # what does not run on a piece does not go on from one
            return False

    def _values(self, given: Mapping[fx.Node, Any], length: int, states: Mapping[Any, torch.Tensor]) -> Double:
        return Double(self.d.source.weights, self.d.at(length), given, states)

    def _is_same(self, node: fx.Node, again: int, whole: Double, before: Double, after: Double) -> bool:
        rest = after.value(node)
        for axis in self.d.axes(node):
            rest = rest.narrow(axis, again, rest.shape[axis] - again)
        return same(self.d, node, whole.value(node), before.value(node), rest)


def _states(values: Double, node: fx.Node, chunks: int) -> tuple[torch.Tensor, ...]:
    """What a loop carries after so many chunks."""
    loop = parts(node)
    carries, xs, invariants = (list(map(values.value, nodes)) for nodes in (loop.carries, loop.xs, loop.invariants))
    body = values.value(node.all_input_nodes[0])
    return recurrence(body, chunks, carries, [x[:chunks] for x in xs], invariants)[: len(carries)]
