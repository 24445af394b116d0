"""Confirms that what a class wrote computes a loop's results, and puts it in place of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.fx as fx

from seqc.classify.confirm import largest_error
from seqc.classify.forms import NotMultilinear
from seqc.classify.rewrite import Rewritten
from seqc.loop import Loop
from seqc.program import Program

# Two spellings of one computation in float64 differ by a few roundings of 1e-16 per step.
AGREEMENT = 1e-10


def confirmed(program: Program, loop: Loop, attempt: Callable[[], Rewritten]) -> tuple[Rewritten, float]:
    """What ``attempt`` writes in front of the loop, and its largest error in float64 on random numbers.

    Raises what ``attempt`` raises, and NotMultilinear where the numbers differ; nothing is written then.
    """
    mark = loop.emit.mark()
    try:
        with loop.emit.before(loop.node):
            rewritten = attempt()
        error = _error(program, loop, rewritten)
        if not error <= AGREEMENT:
            raise NotMultilinear(f"as {rewritten.name} it differs by {error:.1e} on random numbers")
    except Exception:
        loop.emit.undo(mark)
        raise
    return rewritten, error


def states_of(program: Program, loop: Loop, carries: Iterable[int]) -> str:
    """The shapes of some of the loop's states, for people."""
    shapes = [program.shape_of(loop.carries[i][1].meta["val"]) for i in carries]
    return f"state {' and '.join('[' + ', '.join(map(str, shape)) + ']' for shape in shapes)}"


def _error(program: Program, loop: Loop, rewritten: Rewritten) -> float:
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
