"""Writes a region of the source graph again: for another length of the sequence, from other first states."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.ops.recurrence import Parts, is_recurrence, parts
from seqc.outside import is_size
from seqc.streaming.derivation import Derivation, target_of
from seqc.streaming.double import body_of_one, of_one
from seqc.streaming.layers import loop_from
from seqc.streaming.regions import Region
from seqc.widen import wide, wide_body, wide_type

aten = torch.ops.aten


@dataclass(frozen=True)
class Copy:
    """``length``: of the sequence in the copy, where ``d.time`` stands for the number of new steps. ``first``: new first
    states, by what reads them and the index. ``chunk``: each number that is this is 1 in the copy. ``tracked``: the loops
    whose results in the copy end with what is carried before each step. ``wide``: the copy computes float32 where the region
    computes in a narrower type.
    """

    d: Derivation
    region: Region
    length: Any
    first: Mapping[tuple[fx.Node, int], fx.Node]
    chunk: int = 1
    tracked: Collection[fx.Node] = ()
    wide: bool = False

    def write(self, inside: Iterable[fx.Node], given: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """The new nodes of ``inside``, from those of what it is ``given``; these among them."""
        new = {n: wide(self.d.emit, v) for n, v in given.items()} if self.wide else dict(given)
        for node in inside:
            with self.d.emit.of(node):
                new[node] = self._recurrence(node, new) if is_recurrence(node) else self._call(node, new)
        return new

    def size(self, value: Any) -> Any:
        """A size of the region, in the copy."""
        expr = sympy.sympify(_torch.size_expr(value)).subs(self.d.time, self.length)
        return self.d.size(of_one(expr, self.chunk))

    def _recurrence(self, node: fx.Node, new: Mapping[fx.Node, Any]) -> Any:
        loop = parts(node)
        if self.chunk > 1:
            loop = replace(loop, body=body_of_one(loop.body, self.chunk))
        if self.wide:
            loop = replace(loop, body=wide_body(loop.body))
        if node in self.tracked:
            loop = _tracking(loop)
        trip = self.size(loop.trip.meta["val"] if isinstance(loop.trip, fx.Node) else loop.trip)
        starts = [self.first.get((node, i)) or new[n] for i, n in enumerate(loop.carries)]
        return loop_from(self.d, loop, trip, starts, [new[n] for n in loop.xs], [new[n] for n in loop.invariants])

    def _call(self, node: fx.Node, new: Mapping[fx.Node, Any]) -> Any:
        if isinstance(new.get(node.args[0]), tuple):  # type: ignore[arg-type]
            return new[node.args[0]][node.args[1]]  # type: ignore[index]

        def mapped(arg: Any) -> Any:
            if not isinstance(arg, fx.Node):
                return wide_type(arg) if self.wide else arg
            return self.size(arg.meta["val"]) if is_size(arg) else new[arg]

        stated = of_one((node.args, dict(node.kwargs)), self.chunk)
        args, kwargs = pytree.tree_map(mapped, stated, is_leaf=lambda a: a is None)
        if (node, 0) in self.first:
            args = ([self.first[node, 0], *args[0][1:]], *args[1:])
        return self.d.emit(target_of(node), *args, **kwargs)


def _tracking(loop: Parts) -> Parts:
    """The loop with what is carried before each step as further results."""
    body = copy.deepcopy(loop.body)
    changed = replace(loop, body=body)
    output = body.graph.output_node()
    output.args = ((*output.args[0], *changed.body_carries),)  # type: ignore[misc]
    body.recompile()
    return changed


def as_in_the_model(d: Derivation, node: fx.Node, new: fx.Node) -> fx.Node:
    """``new``, for the new steps of ``node``, in its type, with sizes that say they are their number where they come to it."""
    value = node.meta["val"]
    if new.meta["val"].dtype != value.dtype:
        new = d.emit(aten._to_copy.default, new, dtype=value.dtype)
    exprs = [_torch.size_expr(s) for s in value.shape]
    wanted = [e.subs(d.time, d.steps) for e in map(sympy.sympify, exprs)]
    if [_torch.size_expr(s) for s in new.meta["val"].shape] == wanted:
        return new
    return d.emit(aten.reshape.default, new, [d.size(e) for e in exprs])
