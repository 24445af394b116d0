"""Loops over time and torch's recurrent layers: the carried values are states."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.fx as fx

from seqc import _torch
from seqc.emit import Emitter
from seqc.ops.recurrence import Parts, is_recurrence, parts
from seqc.outside import is_size
from seqc.program import named_args
from seqc.streaming.demand import NEW, Demand, Plan, refuse
from seqc.streaming.derivation import Derivation
from seqc.write_loop import write_recurrence

aten = torch.ops.aten

_LAYERS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


def is_layer(d: Derivation, node: fx.Node) -> bool:
    """Whether ``node`` walks along the sequence, and gives its steps together with its last state."""
    if is_recurrence(node):
        trip = parts(node).trip
        return isinstance(trip, fx.Node) and d.has_time(trip.meta["val"])
    return node.target in _LAYERS


def recurrence_of(d: Derivation, node: fx.Node, demand: Demand) -> Plan:
    """The loop over the new steps, from the state on."""
    loop = parts(node)
    trip = _torch.size_expr(loop.trip.meta["val"] if isinstance(loop.trip, fx.Node) else loop.trip)
    late = sympy.expand(d.time - trip)
    if d.time not in trip.free_symbols:
        return _once_for_all(d, node, loop, trip, demand)
    if not late.is_Integer or late < 0:
        raise refuse(
            node, f"a loop of {d.source.size_of(loop.trip.meta['val'])} steps, not one for each of the sequence"
        )
    if loop.reverse:
        raise refuse(node, "the loop walks from the end of the sequence")
    if any(d.axes(n) for n in (*loop.carries, *loop.invariants)):
        raise refuse(node, "the loop reads the whole sequence in each step")
    first = FirstStates(d, node, loop.carries, int(late))
    needs = [(n, d.newest(n)) for n in loop.xs]
    values = [n for n in loop.invariants if not is_size(n)]
    needs += [(n, d.newest(n, since=int(late))) for n in values]
    count, several = len(loop.xs), len(needs)

    def write(*new: fx.Node) -> Any:
        xs, starts = new[:count], new[several:]
        given = dict(zip(values, new[count:several], strict=True))
        invariants: Sequence[Any] = [given[n] if n in given else d.number(node, n) for n in loop.invariants]
        again, carries = loop, first.now(starts)
        if late:
            again = _begun_at(d, loop, carries)
            xs, invariants = (first.waiting(), *xs), (*starts, *invariants)
        written = loop_from(d, again, d.size(d.time), carries, xs, invariants)
        first.go_on(written, 0)
        return written

    return Plan((*needs, *first.needs), write)


class FirstStates:
    """The states of what walks along the sequence from its step ``late`` on, counted from 0.

    A first state that is no constant is computed in every call, and taken in that of its step.
    """

    def __init__(self, d: Derivation, node: fx.Node, starts: Sequence[fx.Node], late: int) -> None:
        self.d, self.late = d, late
        self.constant = late == 0 and all(d.is_constant(n) for n in starts)
        self.needs = () if self.constant else tuple((n, d.newest(n, since=late)) for n in starts)
        self.slots = [
            d.slot(
                "recurrent_state",
                node,
                [_torch.size_expr(s) for s in n.meta["val"].shape],
                n.meta["val"].dtype,
                n if self.constant else 0.0,
            )
            for n in starts
        ]

    def now(self, starts: Sequence[fx.Node]) -> list[fx.Node]:
        """The states that the new steps begin with, given the first ones."""
        kept = [slot.placeholder for slot in self.slots]
        if self.constant or self.late:
            return kept
        begins = self.d.emit(aten.eq.Scalar, self.d.position(), 0)
        return [self.d.emit(aten.where.self, begins, a, b) for a, b in zip(starts, kept, strict=True)]

    def waiting(self) -> fx.Node:
        """bool [new steps]: whether the first state still replaces what was carried on."""
        return self.d.emit(aten.le.Scalar, self.d.positions(NEW), self.late)

    def go_on(self, results: Any, index: int) -> None:
        """Take the states after the newest step, which are the ``results`` from ``index`` on."""
        for i, slot in enumerate(self.slots):
            slot.following = item(self.d, results, index + i)


def _begun_at(d: Derivation, loop: Parts, carries: Sequence[fx.Node]) -> Parts:
    """The loop with a further x, whether a step begins with the first states, which become its first invariants."""
    body = copy.deepcopy(loop.body)
    graph, inner = body.graph, [n for n in body.graph.nodes if n.op == "placeholder"]
    states = inner[: len(carries)]
    users = [list(state.users) for state in states]
    mode = d.source.fake_mode

    def placeholder(name: str, after: fx.Node, value: torch.Tensor) -> fx.Node:
        with graph.inserting_after(after):
            node = graph.placeholder(name)
        node.meta["val"] = value
        return node

    with mode:
        flag = placeholder("begins", states[-1], torch.empty([], dtype=torch.bool))
    last = inner[len(carries) + len(loop.xs) - 1] if loop.xs else flag
    emit = Emitter(body, mode)
    firsts = []
    for state in states:
        last = placeholder(f"first_{state.name}", last, state.meta["val"])
        firsts.append(last)
    inside = next(n for n in graph.nodes if n.op != "placeholder")
    with emit.before(inside):
        for state, first, before in zip(states, firsts, users, strict=True):
            chosen = emit(aten.where.self, flag, first, state)
            for user in before:
                user.replace_input_with(state, chosen)
    body.recompile()
    return replace(loop, body=body)


def _once_for_all(d: Derivation, node: fx.Node, loop: Parts, trip: Any, demand: Demand) -> Plan:
    """A loop of a fixed number of steps, of what is known at the beginning or at the end of the sequence."""
    reads = (*loop.carries, *loop.xs, *loop.invariants)
    if any(d.axes(n) for n in reads):
        raise refuse(node, "a loop over another axis, whose states are sequences, has no streaming form yet")
    n, m = len(loop.carries), len(loop.carries) + len(loop.xs)

    def write(*new: fx.Node) -> Any:
        return loop_from(d, loop, d.size(trip), new[:n], new[n:m], new[m:])

    return Plan(tuple((r, d.newest(r, demand.at_end, demand.since)) for r in reads), write)


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
    return write_recurrence(d.emit, copy.deepcopy(loop.body), trip, carries, xs, invariants)


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
    if _torch.size_expr(source.meta["val"].shape[d.axes(source)[0]]) != d.time:
        raise refuse(node, "a layer over a part of the sequence", "write it as a loop")
    states_of = FirstStates(d, node, starts, 0)
    weights = list(arg["params"])

    def write(new: fx.Node, *others: fx.Node) -> fx.Node:
        params, firsts = others[: len(weights)], others[len(weights) :]
        states: Any = states_of.now(firsts)
        hx = states if isinstance(arg["hx"], (list, tuple)) else states[0]
        rest = [arg[k] for k in ("has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")]
        written = d.emit(node.target, new, hx, list(params), *rest)
        states_of.go_on(written, 1)
        return written

    return Plan(((source, d.newest(source)), *((n, d.newest(n)) for n in weights), *states_of.needs), write)
