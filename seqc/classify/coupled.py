"""States of a loop whose values of all steps are known outside of it: what is computed from them leaves the loop too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from seqc.batch import Value
from seqc.classify.forms import NotMultilinear
from seqc.classify.rewrite import Rewritten
from seqc.dependence import computed_from
from seqc.loop import Loop
from seqc.outside import Outside

aten = torch.ops.aten


@dataclass(frozen=True)
class State:
    """A carry computed outside: its values behind each step [trip, ...], and the last."""

    steps: fx.Node
    final: fx.Node


def settled(loop: Loop, name: str, why: str, states: dict[int, State], outside: Outside, mark: int) -> Rewritten:
    """A group of carries, by index, that is computed from no other carry, with the results computed from it alone.

    ``mark`` is where what was written for it begins. Where other carries are left, the group's values are added to the
    loop's results, so that they are confirmed, and given to the loop as xs. Raises NotMultilinear where no other carry is
    left to keep a loop for a result that cannot be computed for all steps at once.
    """
    left = [i for i in range(len(loop.carries)) if i not in states]
    fed: dict[fx.Node, fx.Node] = {}
    for index, state in states.items():
        start, carry = loop.carries[index]
        fed[carry] = _before(loop, start, state.steps)
        fed[loop.next_carries[index]] = state.steps
        if left:
            loop.read(loop.next_carries[index])
    outside.known |= {inner: Value(outer, True) for inner, outer in fed.items()}
    results = {index: state.final for index, state in states.items()}
    others = computed_from(loop.carries[i][1] for i in left)
    for index in range(len(loop.carries), len(loop.results)):
        value, reader = loop.results[index]
        if reader is None or value in others:
            continue
        written = outside.value(value)
        if written is not None and written.batched:
            results[index] = written.node
        elif not left:
            raise NotMultilinear("what is read of it cannot be computed for all steps at once")
    loop.commit()
    return Rewritten(name, why, results, loop.emit.since(mark), tuple(states), fed if left else {})


def _before(loop: Loop, start: fx.Node, steps: fx.Node) -> fx.Node:
    """The values in front of each step: those behind the step before, or the initial one."""
    first = loop.emit(aten.unsqueeze.default, start, 0)
    walked = loop.emit(aten.cat.default, [steps, first] if loop.reverse else [first, steps], 0)
    return loop.emit(aten.slice.Tensor, walked, 0, *((1, 2**63 - 1) if loop.reverse else (0, loop.trip)))
