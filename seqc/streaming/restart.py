"""Computation in chunks of the sequence, gone on with from the end of an earlier piece.

What computes in chunks starts each sequence from first states: the carried values of a loop over the chunks, or constants
put in front of what is computed of each chunk. Where the whole, given a second piece of the sequence and, as first states,
what these had become at the end of the first piece, gives what it gives on both pieces at once, it is a step form of itself,
for pieces of any length: a last chunk that is not full is filled up as the model does. Whether it does is tried
(:mod:`seqc.streaming.tried`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.dependence import ancestors
from seqc.ops.recurrence import is_recurrence, parts
from seqc.outside import is_size
from seqc.streaming.demand import Demand, Plan, refuse
from seqc.streaming.derivation import END, Derivation, target_of
from seqc.streaming.double import body_of_one, of_one
from seqc.streaming.layers import item, loop_from
from seqc.streaming.regions import Region, chunk_of, regions
from seqc.streaming.tried import Carried, carried, is_computed, is_same_in_ones, kind_of

aten = torch.ops.aten


def restarts(d: Derivation) -> dict[fx.Node, Restart]:
    """By each node that leaves a region which computes in chunks: the region. Raises NotCausal."""
    return {node: restart for region in regions(d) for restart in (Restart(d, region),) for node in region.exits}


class Restart:
    """A region as a step form of itself."""

    def __init__(self, d: Derivation, region: Region) -> None:
        self.d, self.region = d, region
        self.carried: tuple[Carried, ...] | None = None
        self._written: dict[fx.Node, Any] | None = None
        self._chunk = 1

    def plan(self, node: fx.Node, demand: Demand) -> Plan:
        """For an exit: the newest steps of what the region reads. Raises NotCausal."""
        d = self.d
        if not any(demand.modes) and not demand.at_end:
            raise refuse(node, "it is known at the end of the sequence only, but is needed at each step of it")
        if self.carried is None:
            self.carried = carried(d, self.region)
            values = [c.start.meta["val"] for c in self.carried]
            self.slots = [
                d.slot("recurrent_state", c.at, list(map(_torch.size_expr, value.shape)), value.dtype, c.start)
                for c, value in zip(self.carried, values, strict=True)
            ]
            chunk = chunk_of(d, self.region)
            if d.steps == 1 and chunk > 1 and self._is_same_in_ones(chunk):
                self._chunk = chunk
        needs = tuple((n, d.newest(n)) for n in self.region.given)

        def write(*new: Any) -> Any:
            if self._written is None:
                self._written = self._write(dict(zip(self.region.given, new, strict=True)))
            return self._written[node]

        return Plan(needs, write)

    def _is_same_in_ones(self, chunk: int) -> bool:
        """Whether one step is the same in chunks of one; layers that are alike ask once."""
        known: bool = self.d.shared(
            ("in ones", kind_of(self.region)), lambda: is_same_in_ones(self.d, self.region, self.carried or (), chunk)
        )
        return known

    def _write(self, new: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        d = self.d
        assert self.carried is not None
        first = {(c.at, c.index): slot.placeholder for c, slot in zip(self.carried, self.slots, strict=True)}
        for node in self._inside():
            with d.emit.of(node):
                new[node] = self._copied(node, new, first)
        for c, slot in zip(self.carried, self.slots, strict=True):
            end = new[c.end]
            slot.following = (
                item(d, end, c.index) if c.axis is None else d.emit(aten.slice.Tensor, end, c.axis, -1, END)
            )
        return new

    def _inside(self) -> list[fx.Node]:
        """What is written: with chunks of one step, the masks within a chunk too."""
        if self._chunk == 1:
            return list(self.region.inside)
        masks = ancestors(n for n in self.region.given if is_computed(self.d, n))
        written = {n for n in masks if n.op == "call_function" and not is_size(n)} | set(self.region.inside)
        return [n for n in self.d.source.graph.nodes if n in written]

    def _size(self, value: Any) -> Any:
        return self.d.size(of_one(sympy.sympify(_torch.size_expr(value)), self._chunk))

    def _copied(self, node: fx.Node, new: Mapping[fx.Node, Any], first: Mapping[tuple[fx.Node, int], fx.Node]) -> Any:
        d = self.d
        if is_recurrence(node):
            loop = parts(node)
            if self._chunk > 1:
                loop = replace(loop, body=body_of_one(loop.body, self._chunk))
            trip = self._size(loop.trip.meta["val"] if isinstance(loop.trip, fx.Node) else loop.trip)
            starts = [first.get((node, i)) or new[n] for i, n in enumerate(loop.carries)]
            return loop_from(d, loop, trip, starts, [new[n] for n in loop.xs], [new[n] for n in loop.invariants])
        if isinstance(new.get(node.args[0]), tuple):  # type: ignore[arg-type]
            return new[node.args[0]][node.args[1]]  # type: ignore[index]

        def mapped(arg: Any) -> Any:
            if not isinstance(arg, fx.Node):
                return arg
            return self._size(arg.meta["val"]) if is_size(arg) else new[arg]

        stated = of_one((node.args, dict(node.kwargs)), self._chunk)
        args, kwargs = pytree.tree_map(mapped, stated, is_leaf=lambda a: a is None)
        if (node, 0) in first:
            args = ([first[node, 0], *args[0][1:]], *args[1:])
        result = d.emit(target_of(node), *args, **kwargs)
        return self._of_plain_shape(node, result) if node in self.region.exits else result

    def _of_plain_shape(self, node: fx.Node, new: fx.Node) -> fx.Node:
        """``new`` with sizes that say they are the number of steps, where they only come to the same."""
        exprs = [_torch.size_expr(s) for s in node.meta["val"].shape]
        wanted = [e.subs(self.d.time, self.d.steps) for e in map(sympy.sympify, exprs)]
        if [_torch.size_expr(s) for s in new.meta["val"].shape] == wanted:
            return new
        return self.d.emit(aten.reshape.default, new, [self.d.size(e) for e in exprs])
