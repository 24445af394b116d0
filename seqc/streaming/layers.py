"""Loops over time and torch's recurrent layers: the carried values are states."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from seqc import _torch
from seqc.ops.recurrence import Parts, is_recurrence, parts, recurrence, recurrence_shapes
from seqc.program import named_args
from seqc.streaming.demand import Demand, Plan, refuse
from seqc.streaming.derivation import Derivation

aten = torch.ops.aten

_LAYERS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


def is_layer(node: fx.Node) -> bool:
    """Whether ``node`` gives its steps together with its last state."""
    return is_recurrence(node) or node.target in _LAYERS


def recurrence_of(d: Derivation, node: fx.Node, demand: Demand) -> Plan:
    """The loop over the new steps, from the state on."""
    loop = parts(node)
    trip = _torch.size_expr(loop.trip.meta["val"] if isinstance(loop.trip, fx.Node) else loop.trip)
    if trip != d.time:
        if d.time in trip.free_symbols:
            raise refuse(
                node, f"a loop of {d.source.size_of(loop.trip.meta['val'])} steps, not one for each of the sequence"
            )
        raise refuse(node, "a loop over another axis, whose states are sequences, has no streaming form yet")
    if loop.reverse:
        raise refuse(node, "the loop walks from the end of the sequence")
    for start in loop.carries:
        if not d.is_fixed(start):
            raise refuse(node, "the loop's first state is computed from the sequence", "start it from a constant")
    if not all(d.is_fixed(n) for n in loop.invariants):
        raise refuse(node, "the loop reads the whole sequence in each step")
    slots = [
        d.slot("recurrent_state", node, [_torch.size_expr(s) for s in n.meta["val"].shape], n.meta["val"].dtype, n)
        for n in loop.carries
    ]
    count = len(loop.xs)

    def write(*new: fx.Node) -> Any:
        xs, invariants = new[:count], new[count:]
        written = loop_from(d, loop, d.size(d.time), [slot.placeholder for slot in slots], xs, invariants)
        for i, slot in enumerate(slots):
            slot.following = item(d, written, i)
        return written

    return Plan(tuple((n, d.newest(n)) for n in (*loop.xs, *loop.invariants)), write)


def loop_from(
    d: Derivation,
    loop: Parts,
    trip: Any,
    carries: Sequence[fx.Node],
    xs: Sequence[fx.Node],
    invariants: Sequence[fx.Node],
) -> Any:
    """The loop, written for ``trip`` steps from other first values; a single step without a loop, as a tuple."""
    if trip == 1 and not any(n.op == "get_attr" for n in loop.body.graph.nodes):
        return _once(d, loop, carries, xs, invariants)
    name = f"body_{len(list(d.gm.children()))}"
    body = copy.deepcopy(loop.body)
    d.gm.add_submodule(name, body)
    attr = d.gm.graph.get_attr(name)
    steps = trip.meta["val"] if isinstance(trip, fx.Node) else trip
    values = [[n.meta["val"] for n in group] for group in (carries, xs, invariants)]
    value = d.emit.compute(lambda: recurrence_shapes(body, steps, values[0], values[1], values[2]))
    return d.emit.written(recurrence, (attr, trip, tuple(carries), tuple(xs), tuple(invariants), False), value)


def item(d: Derivation, results: Any, index: int) -> Any:
    """One of several results, which are a tuple where they were written one by one."""
    return results[index] if isinstance(results, tuple) else d.emit(operator.getitem, results, index)


def _once(
    d: Derivation, loop: Parts, carries: Sequence[fx.Node], xs: Sequence[fx.Node], invariants: Sequence[fx.Node]
) -> tuple[fx.Node, ...]:
    """The results of one step, written without a loop."""
    steps = [d.emit(aten.select.int, x, 0, 0) for x in xs]
    inner = [*loop.body_carries, *loop.body_xs, *loop.body_invariants]
    new: dict[fx.Node, fx.Node] = dict(zip(inner, (*carries, *steps, *invariants), strict=True))
    for node in loop.body.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: new[n])
            with d.emit.of(node):
                new[node] = d.emit(node.target, *args, **kwargs)
    ys = (d.emit(aten.unsqueeze.default, new[y], 0) for y in loop.ys)
    return (*(new[n] for n in loop.next_carries), *ys)


def recurrent_layer(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """torch's LSTM, GRU or RNN over the new steps, from the state on."""
    arg = named_args(node)
    source = arg["input"]
    if d.axes(source) != ((1,) if arg["batch_first"] else (0,)):
        return None
    if arg["bidirectional"]:
        raise refuse(node, "the layer walks from the end of the sequence too")
    starts = arg["hx"] if isinstance(arg["hx"], (list, tuple)) else [arg["hx"]]
    if not all(d.is_fixed(n) for n in starts):
        raise refuse(node, "the layer's first state is computed from the sequence", "start it from a constant")
    slots = [
        d.slot("recurrent_state", node, [_torch.size_expr(s) for s in n.meta["val"].shape], n.meta["val"].dtype, n)
        for n in starts
    ]
    weights = list(arg["params"])

    def write(new: fx.Node, *params: fx.Node) -> fx.Node:
        states: Any = [slot.placeholder for slot in slots]
        hx = states if isinstance(arg["hx"], (list, tuple)) else states[0]
        rest = [arg[k] for k in ("has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")]
        written = d.emit(node.target, new, hx, list(params), *rest)
        for i, slot in enumerate(slots):
            slot.following = d.emit(operator.getitem, written, 1 + i)
        return written

    return Plan(((source, d.newest(source)), *((n, d.newest(n)) for n in weights)), write)
