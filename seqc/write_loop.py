"""Writes a ``seqc::recurrence`` whose body is given as a Python function that emits it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.ops.recurrence import recurrence, recurrence_shapes

aten = torch.ops.aten

Step = Callable[[Emitter, list[fx.Node], list[fx.Node], list[fx.Node]], tuple[Sequence[fx.Node], Sequence[fx.Node]]]
"""``step(emit, carries, xs, invariants)`` emits one step and returns the next carries and the ys."""


def write_loop(
    emit: Emitter,
    step: Step,
    trip: Any,
    carries: Sequence[fx.Node],
    xs: Sequence[fx.Node],
    invariants: Sequence[fx.Node] = (),
    reverse: bool = False,
) -> list[fx.Node]:
    """Write the recurrence where ``emit`` stands; returns the getitem nodes of the final carries, then of the ys.

    ``carries``, ``xs`` [trip, ...] and ``invariants`` are nodes of the graph at hand, ``trip`` an int or a node. A
    single step is written as it is; what is returned are then the nodes of its results.
    """
    if isinstance(trip, int) and trip == 1:
        return _once(emit, step, carries, xs, invariants)
    graph = fx.Graph()
    groups = [
        [_placeholder(graph, emit, kind, outer, step_of) for outer in group]
        for kind, group, step_of in (("carry", carries, False), ("x", xs, True), ("invariant", invariants, False))
    ]
    output = graph.output(())
    body = fx.GraphModule({}, graph)
    inner = Emitter(body, emit.mode)
    with inner.before(output, origin=emit.origin):
        following, ys = step(inner, *groups)
    output.args = ((*following, *ys),)
    body.recompile()
    node = write_recurrence(emit, body, trip, carries, xs, invariants, reverse)
    return [emit(operator.getitem, node, i) for i in range(len(node.meta["val"]))]


def write_recurrence(
    emit: Emitter,
    body: fx.GraphModule,
    trip: Any,
    carries: Sequence[fx.Node],
    xs: Sequence[fx.Node],
    invariants: Sequence[fx.Node] = (),
    reverse: bool = False,
) -> fx.Node:
    """Write the recurrence of ``body``, which becomes a child of the graph's module, where ``emit`` stands."""
    name = next(f"body_{i}" for i in range(10**6) if not hasattr(emit.gm, f"body_{i}"))
    emit.gm.add_submodule(name, body)
    attr = emit.graph.get_attr(name)
    steps = trip.meta["val"] if isinstance(trip, fx.Node) else trip
    values = [[n.meta["val"] for n in group] for group in (carries, xs, invariants)]
    val = emit.compute(lambda: recurrence_shapes(body, steps, values[0], values[1], values[2], reverse))
    return emit.written(recurrence, (attr, trip, tuple(carries), tuple(xs), tuple(invariants), reverse), val)


def _once(
    emit: Emitter, step: Step, carries: Sequence[fx.Node], xs: Sequence[fx.Node], invariants: Sequence[fx.Node]
) -> list[fx.Node]:
    only = [emit(aten.select.int, x, 0, 0) for x in xs]
    following, ys = step(emit, list(carries), only, list(invariants))
    return [*following, *(emit(aten.unsqueeze.default, y, 0) for y in ys)]


def _placeholder(graph: fx.Graph, emit: Emitter, kind: str, outer: fx.Node, step_of: bool) -> fx.Node:
    node = graph.placeholder(f"{kind}_{len(graph.nodes)}")
    value = outer.meta["val"]
    node.meta["val"] = emit.compute(lambda: value.new_empty(value.shape[1:])) if step_of else value
    return node
