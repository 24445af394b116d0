"""A loop that is affine in its states, without a loop: blocks of unrolled steps and a prefix scan over the blocks.

The loop's own body is run for one step of all blocks at a time, twice. First from states of 0, beside the product of the
steps' transitions (:mod:`seqc.classify.transition`): so each block is an affine map of the states in front of it. A scan
over the blocks gives these states. From them the body is run again, now for its results. No value holds the states of all
steps. Groups of states that read others come after them, and may depend on these in any way.

The last block walked is padded with steps of zeros. They come behind all others, so only the final states would see them:
these keep their values there. Sources as in :mod:`seqc.lowerings.prefix`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from seqc import _torch
from seqc.batch import Value
from seqc.classify.forms import NotMultilinear
from seqc.classify.kinds import groups, kinds_of
from seqc.classify.terms import Terms
from seqc.classify.transition import Transition, transition
from seqc.dependence import ancestors
from seqc.emit import Emitter
from seqc.loop import Loop
from seqc.lowerings.base import Lowering, Refused, size_of
from seqc.lowerings.maps import Entries, Maps
from seqc.outside import Outside, is_size
from seqc.program import source_line

aten = torch.ops.aten

BLOCK = 16

# Matrices of every block are multiplied by each other; one for all blocks is multiplied by itself alone.
_MOST_MIXED = 16
_MOST_MIXED_CONSTANT = 256
_MOST_COUPLED = 4

# Beyond this a builder takes minutes, and the kernels are no longer few.
_MOST_OPERATIONS = 4096


def blocked(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """Every result of the loop ``node``. Raises Refused where a state's update is not affine in it, and says which."""
    loop = Loop(emit.gm, node, emit.mode)
    loop.emit = emit
    if not loop.carries:
        raise Refused("it has no state")
    known: list[Terms] = []
    try:
        found = []
        for group in groups(loop):
            known.append(Terms(loop.body, [loop.carries[i][1] for i in group], emit.mode))
            found.append(_transition(loop, group, known[-1]))
        return _Walk(loop, found).results()
    finally:
        for terms in reversed(known):
            terms.emit.undo(0)


def _transition(loop: Loop, group: Sequence[int], terms: Terms) -> Transition:
    values = [loop.carries[i][1].meta["val"] for i in group]
    what = " and ".join(f"[{', '.join(map(str, value.shape))}]" for value in values)
    if any(not value.dtype.is_floating_point for value in values):
        raise Refused(f"state {what} holds no real numbers")
    try:
        found = transition(loop, group, terms)
    except NotMultilinear as reason:
        raise Refused(f"state {what}: {reason}") from reason
    if found.axis is None:
        if len(group) > _MOST_COUPLED:
            raise Refused(f"{len(group)} coupled states, more than {_MOST_COUPLED}")
        return found
    size = sum(value.shape[found.axis] for value in values)
    most = _MOST_MIXED_CONSTANT if _is_constant(loop, found) else _MOST_MIXED
    if size > most:
        raise Refused(f"state {what}: {size} elements are mixed in each step, more than {most}")
    return found


def _is_constant(loop: Loop, found: Transition) -> bool:
    """Whether the transition is the same in each step."""
    varying = {inner for _, inner in (*loop.carries, *loop.xs)}
    return not ancestors(found.nodes) & varying


@dataclass(frozen=True)
class _Step:
    """What was written for one step. Others differ in their inputs alone: no shape has to be found again."""

    inputs: list[fx.Node]
    nodes: list[fx.Node]
    outputs: list[fx.Node]

    def again(self, emit: Emitter, inputs: list[fx.Node]) -> list[fx.Node]:
        """Write the step of other ``inputs``; returns its outputs."""
        new = dict(zip(self.inputs, inputs, strict=True))
        for node in self.nodes:
            if any(n in new for n in node.all_input_nodes):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: new.get(n, n))
                with emit.of(node):
                    new[node] = emit.written(node.target, args, node.meta["val"], kwargs)
        return [new.get(node, node) for node in self.outputs]


class _Walk:
    """Runs a loop's body step by step, for all blocks at once."""

    def __init__(self, loop: Loop, transitions: Sequence[Transition]) -> None:
        self.loop, self.transitions, self.emit = loop, transitions, loop.emit
        self._refuse_many()
        most = _torch.largest(loop.trip.meta["val"] if isinstance(loop.trip, fx.Node) else loop.trip)
        if most is None:
            raise Refused("the number of steps has no upper bound: give the dimension one")
        self.most, self.trip = -(-most // BLOCK), loop.trip
        if isinstance(self.trip, int):
            self.count: Any = self.most
            self.padded: Any = self.most * BLOCK
        else:
            more = self.emit(operator.add, self.trip, BLOCK - 1)
            self.count = self.emit(operator.floordiv, more, BLOCK)
            self.padded = self.emit(operator.mul, self.count, BLOCK)
        self.order = range(BLOCK - 1, -1, -1) if loop.reverse else range(BLOCK)
        self.outside = Outside(loop, self.count)
        self.fixed = {inner: Value(outer, False) for outer, inner in loop.invariants}
        self.xs = {inner: self._steps(outer) for outer, inner in loop.xs}

    def _refuse_many(self) -> None:
        passes = [self._needed(self._with(t.carries), t.nodes) for t in self.transitions]
        passes.append(self._needed(range(len(self.loop.carries)), self.loop.ys))
        count = BLOCK * sum(map(len, passes))
        if count > _MOST_OPERATIONS:
            raise Refused(f"{count} operations in blocks of {BLOCK} steps, more than {_MOST_OPERATIONS}")

    def results(self) -> list[fx.Node]:
        loop = self.loop
        entering: dict[int, fx.Node] = {}
        for found in self.transitions:
            entering |= self._entering(found, entering)
        last = [i for i in entering if loop.results[i][1] is not None]
        following, steps = self._run(entering, loop.ys, last)
        final = [self._final(i, following[i]) if i in last else loop.carries[i][0] for i in range(len(loop.carries))]
        return [*final, *(self._joined([step[k] for step in steps]) for k in range(len(loop.ys)))]

    def _with(self, carries: Sequence[int]) -> list[int]:
        """``carries`` and those from which their next values are computed."""
        inner = {carry: i for i, (_, carry) in enumerate(self.loop.carries)}
        found: set[int] = set()
        pending = set(carries)
        while pending:
            found |= pending
            behind = ancestors(self.loop.next_carries[i] for i in found)
            pending = {i for carry, i in inner.items() if carry in behind} - found
        return sorted(found)

    def _needed(self, carries: Sequence[int], read: Sequence[fx.Node]) -> list[fx.Node]:
        """The operations of the body for the next values of ``carries`` and for ``read``."""
        leading = ancestors([*(self.loop.next_carries[i] for i in carries), *read])
        return [n for n in self.loop.operations() if n in leading and not is_size(n)]

    def _entering(self, found: Transition, before: dict[int, fx.Node]) -> dict[int, fx.Node]:
        """The states of a group in front of each block, from those ``before`` that it depends on."""
        starts = {i: before[i] for i in self._with(found.carries) if i in before}
        starts |= {i: self._zeros(self.loop.carries[i][0]) for i in found.carries}
        constant = _is_constant(self.loop, found)
        following, steps = self._run(starts, [] if constant else found.nodes)
        maps = Maps(self.emit, found.axis is not None)
        if constant:
            entries = _like(found.entries, [self._fixed(node) for node in found.nodes])
            for _ in range(BLOCK.bit_length() - 1):
                entries = maps.product(entries, entries)
        else:
            entries = _like(found.entries, steps[0])
            for step in steps[1:]:
                entries = maps.product(_like(found.entries, step), entries)
        axis = found.axis
        added = [self._moved(following[i], axis, 1) for i in found.carries]
        first = [self._moved(self.loop.carries[i][0], axis, 0) for i in found.carries]
        states = maps.entering(entries, constant, added, first, self.count, self.most, self.loop.reverse)
        return {i: self._moved(x, axis, 1, back=True) for i, x in zip(found.carries, states, strict=True)}

    def _run(
        self, starts: dict[int, fx.Node], read: Sequence[fx.Node], kept: Sequence[int] = ()
    ) -> tuple[dict[int, fx.Node], list[list[fx.Node]]]:
        """The states behind each block, from ``starts``, and the values ``read`` of each step, in the order walked.

        The states ``kept`` do not change at padded steps.
        """
        needed = self._needed(list(starts), read)
        valid = [self._steps(self.emit(aten.full.default, [self.trip], 1.0))] if kept else []
        states, found = list(starts.values()), []
        written: _Step | None = None
        for i in self.order:
            inputs = [*states, *(steps[i] for steps in self.xs.values()), *(steps[i] for steps in valid)]
            if written is None or len(set(written.inputs)) < len(inputs):
                mark = self.emit.mark()
                outputs = self._step(dict(zip(starts, inputs, strict=False)), i, needed, read, kept, inputs[-1])
                written = _Step(inputs, self.emit.since(mark), outputs)
            else:
                outputs = written.again(self.emit, inputs)
            states = outputs[: len(starts)]
            found.append(outputs[len(starts) :])
        return dict(zip(starts, states, strict=True)), found

    def _step(
        self,
        states: dict[int, fx.Node],
        i: int,
        needed: Sequence[fx.Node],
        read: Sequence[fx.Node],
        kept: Sequence[int],
        valid: fx.Node,
    ) -> list[fx.Node]:
        """The states behind step ``i`` of each block, then the values ``read``."""
        known = {self.loop.carries[k][1]: Value(x, True) for k, x in states.items()}
        known |= {inner: Value(steps[i], True) for inner, steps in self.xs.items()}
        self.outside.known = known | self.fixed
        for n in needed:
            self._write(n)
        following = {k: self._every(self.loop.next_carries[k]) for k in states}
        for k in kept:
            shape = [-1] + [1] * (following[k].meta["val"].dim() - 1)
            real = self.emit(aten.gt.Scalar, self.emit(aten.reshape.default, valid, shape), 0)
            following[k] = self.emit(aten.where.self, real, following[k], states[k])
        return [*following.values(), *(self._every(value) for value in read)]

    def _write(self, node: fx.Node) -> None:
        """Let ``node`` of the body be known outside, for this step of every block."""
        outside = self.outside
        if node in outside.known:
            return
        value = outside.write(node) if outside.movable(node) else None
        if value is None:
            where = f" at {line}" if (line := source_line(node)) else ""
            raise Refused(f"there is no rule to compute {node.target} for several steps at once{where}")
        outside.known[node] = value
        if not value.batched:
            self.fixed[node] = value

    def _fixed(self, node: fx.Node) -> fx.Node:
        """``node`` of the body, the same in each step."""
        self.outside.known = dict(self.fixed)
        leading = ancestors([node])
        for n in self.loop.operations():
            if n in leading and not is_size(n):
                self._write(n)
        return self.outside.known[node].node

    def _every(self, node: fx.Node) -> fx.Node:
        """What ``node`` of the body is outside, with an axis of blocks."""
        value = self.outside.known[node]
        if value.batched:
            return value.node
        lead = self.emit(aten.unsqueeze.default, value.node, 0)
        return self.emit(aten.expand.default, lead, [self.count, *([-1] * value.rank)])

    def _zeros(self, state: fx.Node) -> fx.Node:
        value = state.meta["val"]
        sizes = [size_of(self.emit, state, axis) for axis in range(value.dim())]
        return self.emit(aten.full.default, [self.count, *sizes], 0.0, dtype=value.dtype)

    def _steps(self, x: fx.Node) -> list[fx.Node]:
        """Of ``x`` [trip, ...] the steps of the blocks, each [count, ...]; behind the last step walked there are zeros."""
        emit = self.emit
        rest = [size_of(emit, x, axis) for axis in range(1, x.meta["val"].dim())]
        zeros = emit(aten.full.default, [BLOCK - 1, *rest], 0, dtype=x.meta["val"].dtype)
        if self.loop.reverse:
            start = self._number(operator.sub, self._number(operator.add, self.trip, BLOCK - 1), self.padded)
            padded = emit(aten.slice.Tensor, emit(aten.cat.default, [zeros, x], 0), 0, start, 2**63 - 1)
        else:
            padded = emit(aten.slice.Tensor, emit(aten.cat.default, [x, zeros], 0), 0, 0, self.padded)
        split = emit(aten.reshape.default, padded, [self.count, BLOCK, *rest])
        return [emit(aten.select.int, split, 1, i) for i in range(BLOCK)]

    def _joined(self, steps: list[fx.Node]) -> fx.Node:
        """Back to [trip, ...] from the steps in the order walked."""
        emit = self.emit
        stacked = emit(aten.stack.default, steps[::-1] if self.loop.reverse else steps, 1)
        rest = [size_of(emit, stacked, axis) for axis in range(2, stacked.meta["val"].dim())]
        flat = emit(aten.reshape.default, stacked, [self.padded, *rest])
        if self.loop.reverse:
            return emit(aten.slice.Tensor, flat, 0, self._number(operator.sub, self.padded, self.trip), 2**63 - 1)
        return emit(aten.slice.Tensor, flat, 0, 0, self.trip)

    def _number(self, operation: Any, a: Any, b: Any) -> Any:
        return self.emit(operation, a, b) if isinstance(a, fx.Node) or isinstance(b, fx.Node) else operation(a, b)

    def _final(self, index: int, ends: fx.Node) -> fx.Node:
        """The state behind the last block walked; the initial one where there is no block."""
        start = self.emit(aten.unsqueeze.default, self.loop.carries[index][0], 0)
        reverse = self.loop.reverse
        walked = self.emit(aten.cat.default, [ends, start] if reverse else [start, ends], 0)
        return self.emit(aten.select.int, walked, 0, 0 if reverse else -1)

    def _moved(self, x: fx.Node, axis: int | None, lead: int, back: bool = False) -> fx.Node:
        """``x`` [lead axes, a state's axes] with the state's ``axis`` as the last one, or ``back`` where it was."""
        rank = x.meta["val"].dim()
        if axis is None or lead + axis == rank - 1:
            return x
        order = [i for i in range(rank) if i != lead + axis]
        order.append(lead + axis)
        if back:
            order = [order.index(i) for i in range(rank)]
        return self.emit(aten.permute.default, x, order)


def _like(entries: Entries, nodes: Sequence[fx.Node]) -> Entries:
    """``nodes`` in the places of ``entries`` that are something."""
    following = iter(nodes)
    return tuple(tuple(None if entry is None else next(following) for entry in row) for row in entries)


def _why(node: fx.Node) -> str:
    return (
        f"{kinds_of(node)}: blocks of {BLOCK} unrolled steps, taken twice, and a prefix scan over the blocks, no loop"
    )


LOWERINGS = (
    Lowering(
        "seqc::recurrence",
        "blocked",
        _why,
        blocked,
        confirmed_over=2 * BLOCK + 1,
    ),
)
