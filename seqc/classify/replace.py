"""Confirms that what a class wrote computes a loop's results, and puts it in place of them."""

from __future__ import annotations

import torch.fx as fx

from seqc.classify.confirm import largest_error
from seqc.classify.rewrite import Rewritten
from seqc.loop import Loop
from seqc.program import Program


def replacement_error(program: Program, loop: Loop, rewritten: Rewritten) -> float:
    """The largest error in float64, on random numbers, of what was written."""
    pairs = [(reader, new) for i, new in rewritten.results.items() if (reader := loop.results[i][1]) is not None]
    written = set(rewritten.written)
    loop_inputs = [outer for outer, _ in (*loop.carries, *loop.xs, *loop.invariants)]
    read = [n for node in written for n in node.all_input_nodes if n not in written]
    trip = loop.trip.meta["val"] if isinstance(loop.trip, fx.Node) else loop.trip
    return largest_error(pairs, [*loop_inputs, *read], program.weights, trip)


def replace_results(loop: Loop, rewritten: Rewritten) -> None:
    """Let what was written serve the readers of the loop's results, and take its carries out of the loop."""
    for i, new in rewritten.results.items():
        value, reader = loop.results[i]
        if reader is not None:
            reader.replace_all_uses_with(new)
            loop.gm.graph.erase_node(reader)
            loop.results[i] = (value, None)
    for i in sorted((i for i in rewritten.results if i >= len(loop.carries)), reverse=True):
        loop.drop_result(i)
    loop.erase_unused()
    for value, steps in rewritten.fed.items():
        if any(user.op == "call_function" for user in value.users):
            loop.feed_step(value, steps)
    inner = [loop.drop_carry(i) for i in sorted(rewritten.carries, reverse=True)]
    loop.erase_unused()
    for node in inner:
        if not node.users:
            loop.body.graph.erase_node(node)
