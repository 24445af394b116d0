"""SinkReadouts: reductions of the states that a loop gives back move from behind it into its body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from seqc.dependence import computed_from
from seqc.emit import Emitter
from seqc.loop import Loop
from seqc.memory import nbytes
from seqc.ops.recurrence import is_recurrence
from seqc.passes.loop_cleanup import clean
from seqc.program import Program, source_line
from seqc.rewrite import remove_dead_code, sort_topologically
from seqc.steps import Step, step_of

aten = torch.ops.aten


@dataclass(frozen=True)
class SinkReadouts:
    """Lets a loop give back what is read out of its states instead of the states of all steps.

        for t: h = a[t] * h + b[t]; hs[t] = h  # [T, B, D, N]          for t: h = a[t] * h + b[t]
        y = (hs * c[..., None, :]).sum(-1)     # [T, B, D]       ->          y[t] = (h * c[t][:, None, :]).sum(-1)

    What leaves the loop must fall to at most 1 / ``min_saving`` of its bytes, and everything that reads the states must
    do so step by step; results that are smaller than the states are readouts already. A loop with its readout inside is
    what selective scans and linear attention are recognised from.

    ``tolerance``: the same operations on the same numbers, but a sum or product over one step may be taken in another order
    than one over all steps: the usual error of a float32 dot product.
    """

    min_saving: float = 2.0

    name: ClassVar[str] = "sink_readouts"
    tolerance: ClassVar[float] = 1e-5

    def __call__(self, program: Program) -> int:
        changes = 0
        for gm in program.graph_modules():
            for node in [n for n in gm.graph.nodes if is_recurrence(n)]:
                changes += self._loop(Loop(gm, node, program.fake_mode), program)
        if changes:
            remove_dead_code(program)
        return changes

    def _loop(self, loop: Loop, program: Program) -> int:
        changes = 0
        for value, reader in list(loop.results[len(loop.carries) :]):
            region = None if reader is None or _is_read_out(loop, value) else self._region(loop, reader)
            if reader is None or region is None:
                continue
            program.reasons.append(
                f"the loop at {source_line(loop.node) or '?'} gives back {_bytes(region.finals)} bytes a step instead of "
                f"{_bytes({reader: 0})}: what is read out of its states moved into it"
            )
            _write(loop, value, reader, region)
            changes += 1
        if changes:
            clean(loop)
            loop.commit()
            sort_topologically(loop.gm.graph)
        return changes

    def _region(self, loop: Loop, reader: fx.Node) -> _Region | None:
        """What is computed step by step from ``reader``, up to where it is small; None where not all of it is."""
        behind = computed_from([loop.node])
        large: dict[fx.Node, int] = {reader: 0}
        steps: dict[fx.Node, Step] = {}
        finals: dict[fx.Node, int] = {}
        limit = _bytes(large) / self.min_saving
        for node in loop.gm.graph.nodes:
            if not any(n in large for n in node.all_input_nodes):
                continue
            step = step_of(node, large)
            if step is None or any(leaf.node in behind for leaf in step.leaves.values()):
                return None
            steps[node] = step
            small = _bytes({node: step.axis}) <= limit
            (finals if small else large)[node] = step.axis
        if not finals or any(not node.users for node in large) or _bytes(finals) > limit:
            return None
        return _Region(steps, finals)


def _is_read_out(loop: Loop, value: fx.Node) -> bool:
    """Whether ``value`` is smaller than every state it is computed from: what reads it then is no readout of the state."""
    states = loop.carries_behind(value)
    return bool(states) and _step_bytes(value) < min(_step_bytes(state) for state in states)


def _step_bytes(node: fx.Node) -> int:
    return nbytes(node.meta["val"].shape, node.meta["val"].dtype)


@dataclass(frozen=True)
class _Region:
    """The operations to move, in order, and where the results' axis of steps is."""

    steps: dict[fx.Node, Step]
    finals: dict[fx.Node, int]


def _write(loop: Loop, value: fx.Node, reader: fx.Node, region: _Region) -> None:
    emit = Emitter(loop.body, loop.emit.mode)
    known = {reader: value}
    output = loop.body.graph.output_node()
    for node, step in region.steps.items():
        for leaf in step.leaves.values():
            with loop.emit.before(loop.node, origin=node):
                known[leaf.node] = leaf.read(loop)
        with emit.before(output, origin=node):
            known[node] = step.write(emit, known)
    for final, axis in region.finals.items():
        result = loop.read(known[final])
        with loop.emit.before(final):
            order = list(range(1, result.meta["val"].dim()))
            order.insert(axis, 0)
            moved = result if axis == 0 else loop.emit(aten.permute.default, result, order)
        final.replace_all_uses_with(moved)
    for node in [*reversed(region.steps), reader]:
        loop.gm.graph.erase_node(node)
    index = next(i for i, (_, known_reader) in enumerate(loop.results) if known_reader is reader)
    loop.results[index] = (value, None)


def _bytes(values: dict[fx.Node, int]) -> int:
    """Bytes of one step of values, given with their axis of steps."""
    total = 0
    for node, axis in values.items():
        shape = list(node.meta["val"].shape)
        del shape[axis]
        total += nbytes(shape, node.meta["val"].dtype)
    return total
