"""Sink: broadcasts that blow up what a loop reads move from in front of it into its body."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from seqc.axes import PERMUTES, order_of
from seqc.emit import Emitter
from seqc.loop import Loop
from seqc.memory import nbytes
from seqc.ops.recurrence import is_recurrence
from seqc.passes.loop_cleanup import clean
from seqc.program import Program, source_line
from seqc.rewrite import remove_dead_code
from seqc.verify import same_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Leaf:
    """A value outside the loop. ``axis`` is where its time axis is; it may be of size 1, or missing (None)."""

    node: fx.Node
    axis: int | None
    varies: bool = True

    @property
    def step_bytes(self) -> int:
        """Bytes that one step reads anew."""
        if not self.varies or self.axis is None:
            return 0
        shape = list(self.node.meta["val"].shape)
        del shape[self.axis]
        return nbytes(shape, self.node.meta["val"].dtype)


@dataclass(frozen=True)
class Sink:
    """Lets a loop read the small operands of a broadcast, step by step, instead of its large result.

        decay = exp(dt[..., None] * A)  # [T, B, D, N]        for t: h = decay[t] * h + ...
    ->                                                        for t: h = exp(dt[t][..., None] * A) * h + ...

    What enters the loop must fall to at most 1 / ``min_saving`` of its bytes. The state-space models of most libraries
    discretise all steps at once, which takes 16 times the memory of everything else for a state of 16 numbers.
    Results that nothing reads go first: stacked over all steps they would be as large. The same operations are done on
    the same numbers: results are bitwise equal.
    """

    min_saving: float = 2.0

    name: ClassVar[str] = "sink"
    tolerance: ClassVar[float] = 0.0

    def __call__(self, program: Program) -> int:
        changes = 0
        for gm in program.graph_modules():
            for node in [n for n in gm.graph.nodes if is_recurrence(n)]:
                changes += self._loop(Loop(gm, node, program.fake_mode), program)
        if changes:
            remove_dead_code(program)
        return changes

    def _loop(self, loop: Loop, program: Program) -> int:
        cleaned = clean(loop)
        if cleaned:
            loop.commit()
        return cleaned if all(reader is None for _, reader in loop.results) else cleaned + self._sink(loop, program)

    def _sink(self, loop: Loop, program: Program) -> int:
        known: dict[Leaf, set[Leaf]] = {}
        xs = {inner: Leaf(outer, 0) for outer, inner in loop.xs}
        large = {inner: leaf for inner, leaf in xs.items() if _bytes(_frontier(leaf, known)) < leaf.step_bytes}
        kept = {leaf for inner, leaf in xs.items() if inner not in large}
        front = set().union(kept, *(known[leaf] for leaf in large.values()))
        before = _bytes(large.values())
        after = _bytes(front - kept)
        if not large or after * self.min_saving > before:
            return 0
        program.reasons.append(
            f"the loop at {source_line(loop.node) or '?'} reads {_readable(after)} a step instead of "
            f"{_readable(before)}: broadcasts moved into it"
        )
        place = next(n for n in loop.body.graph.nodes if n.op != "placeholder")
        writer = _Writer(loop, front)
        for inner, leaf in large.items():
            with writer.emit.before(place, origin=leaf.node):
                value = writer.write(leaf)
            assert same_shape(value.meta["val"].shape, inner.meta["val"].shape), f"{leaf.node} sinks to another shape"
            inner.replace_all_uses_with(value)
            loop.reload()
            loop.drop_input(loop.xs, inner)
        if (
            isinstance(loop.trip, fx.Node) and loop.xs
        ):  # read off a large value, the number of steps would keep it alive
            with loop.emit.before(loop.node):
                loop.trip = loop.emit(aten.sym_size.int, loop.xs[0][0], 0)
        loop.commit()
        return len(large)


class _Writer:
    """Writes into the body what values outside are at one step, down to ``front``."""

    def __init__(self, loop: Loop, front: set[Leaf]) -> None:
        self.loop, self.front = loop, front
        self.emit = Emitter(loop.body, loop.emit.mode)
        self._written: dict[Leaf, fx.Node] = {}

    def write(self, leaf: Leaf) -> fx.Node:
        if leaf not in self._written:
            read = leaf in self.front or not leaf.varies
            self._written[leaf] = self._read(leaf) if read else self._compute(leaf)
        return self._written[leaf]

    def _compute(self, leaf: Leaf) -> fx.Node:
        node, time = leaf.node, leaf.axis
        operands = _operands(leaf)
        assert operands is not None and time is not None
        values = {operand: self.write(source) for operand, source in operands.items()}
        if node.target is aten.expand.default:
            (value,), sizes = values.values(), _expanded(node, time)
            assert sizes is not None
            return value if all(size == -1 for size in sizes) else self.emit(aten.expand.default, value, sizes)
        args = list(fx.node.map_arg(node.args, lambda n: values[n]))
        if node.target is aten.unsqueeze.default:
            axis = args[1] % node.meta["val"].dim()
            args[1] = axis - (time < axis)
        elif node.target in PERMUTES:
            order = order_of(node)
            source = order[time]
            return self.emit(aten.permute.default, args[0], [i - (i > source) for i in order if i != source])
        return self.emit(node.target, *args, **node.kwargs)

    def _read(self, leaf: Leaf) -> fx.Node:
        node, axis = leaf.node, leaf.axis
        if axis is None:
            return self.loop.invariant_of(node)
        with self.loop.emit.before(self.loop.node, origin=node):
            if not leaf.varies:
                return self.loop.invariant_of(self.loop.emit(aten.squeeze.dim, node, axis))
            if axis:
                order = [axis, *(i for i in range(node.meta["val"].dim()) if i != axis)]
                node = self.loop.emit(aten.permute.default, node, order)
        return self.loop.step_of(node)


def _frontier(leaf: Leaf, known: dict[Leaf, set[Leaf]]) -> set[Leaf]:
    """The values from which ``leaf`` is computed by broadcasting, where these are smaller together than it is."""
    if leaf not in known:
        operands = _operands(leaf)
        below: set[Leaf] = {leaf}
        if operands is not None:
            below = set().union(*(_frontier(operand, known) for operand in operands.values()))
        smaller = _bytes(below) < leaf.step_bytes
        known[leaf] = below if smaller or leaf.node.target is aten.unsqueeze.default else {leaf}
    return known[leaf]


def _operands(leaf: Leaf) -> dict[fx.Node, Leaf] | None:
    """What ``leaf`` is computed from, step by step; None where a step needs more than that step of its operands."""
    node, time = leaf.node, leaf.axis
    if node.op != "call_function" or time is None or not leaf.varies:
        return None
    rank = node.meta["val"].dim()
    if node.target is aten.expand.default:
        return None if _expanded(node, time) is None else _broadcast(node, time, [node.args[0]])  # type: ignore[list-item]
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if len(tensors) != len(node.all_input_nodes):
        return None
    if node.target is aten.unsqueeze.default:
        axis = int(node.args[1]) % rank  # type: ignore[arg-type]
        return None if axis == time else {tensors[0]: Leaf(tensors[0], time - (axis < time))}
    if node.target in PERMUTES:
        return {tensors[0]: Leaf(tensors[0], order_of(node)[time])}
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise not in node.target.tags:
        return None
    return _broadcast(node, time, tensors)


def _expanded(node: fx.Node, time: int) -> list[int] | None:
    """The sizes of a step of an expand, -1 where the operand has that size; None where one is not known in the body."""
    shape, small = node.meta["val"].shape, node.args[0].meta["val"].shape  # type: ignore[union-attr]
    lead = len(shape) - len(small)
    kept = [i >= lead and same_shape((small[i - lead],), (size,)) for i, size in enumerate(shape)]
    sizes = [-1 if keep else size for keep, size in zip(kept, shape, strict=True)]
    del sizes[time]
    return sizes if all(isinstance(size, int) for size in sizes) else None


def _broadcast(node: fx.Node, time: int, tensors: list[fx.Node]) -> dict[fx.Node, Leaf]:
    """The operands of an operation that broadcasts them."""
    found: dict[fx.Node, Leaf] = {}
    rank = node.meta["val"].dim()
    for tensor in tensors:
        shape = tensor.meta["val"].shape
        axis = time - (rank - len(shape))
        varies = axis >= 0 and same_shape((shape[axis],), (node.meta["val"].shape[time],))
        found[tensor] = Leaf(tensor, axis if axis >= 0 else None, varies)
    return found


def _bytes(leaves: Iterable[Leaf]) -> int:
    return sum(leaf.step_bytes for leaf in leaves)


def _readable(count: int) -> str:
    return f"{count / 1024:.0f} KiB" if count >= 10240 else f"{count} bytes"
