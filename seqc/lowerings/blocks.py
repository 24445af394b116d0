"""Steps in blocks, and what an associative operation makes of all blocks up to each: a scan of logarithmic depth.

Sources: Hillis and Steele, "Data parallel algorithms" (1986); Blelloch, "Prefix sums and their applications" (1990).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from seqc import _torch
from seqc.emit import Emitter
from seqc.lowerings.base import Refused, size_of, trip_of

aten = torch.ops.aten

BLOCK = 16

Combine = Callable[[list[fx.Node], list[fx.Node]], list[fx.Node]]
"""``combine(earlier, later)``: of two stretches of steps, each told by the same number of values, what tells both."""


def blocks_of(emit: Emitter, trip: Any, size: int) -> Any:
    """The number of blocks of ``size`` that hold ``trip`` steps, an int or a node as ``trip`` is."""
    if isinstance(trip, int):
        return -(-trip // size)
    return emit(operator.floordiv, emit(operator.add, trip, size - 1), size)


def whole_blocks(emit: Emitter, trip: Any, size: int) -> tuple[Any, Any, Any]:
    """(blocks, steps in them, those behind the last of ``trip``), ints or nodes as ``trip`` is: the last block is filled."""
    count = blocks_of(emit, trip, size)
    if isinstance(trip, int):
        return count, count * size, count * size - trip
    whole = emit(operator.mul, count, size)
    return count, whole, emit(operator.sub, whole, trip)


def padded(emit: Emitter, x: fx.Node, count: Any, fill: float = 0.0) -> fx.Node:
    """``x`` [T, ...] with ``count`` steps of ``fill`` behind."""
    rest = [size_of(emit, x, axis) for axis in range(1, x.meta["val"].dim())]
    padding = emit(aten.full.default, [count, *rest], fill, dtype=x.meta["val"].dtype)
    return emit(aten.cat.default, [x, padding], 0)


class Blocks:
    """The blocks of ``steps`` [T, ...] and the scan over them. Raises Refused where T has no upper bound."""

    def __init__(self, emit: Emitter, steps: fx.Node, reverse: bool = False, size: int = BLOCK) -> None:
        most = _torch.largest(steps.meta["val"].shape[0])
        if most is None:
            raise Refused("the number of steps has no upper bound: give the dimension one")
        self.emit, self.reverse, self.size = emit, reverse, size
        self.most = -(-most // size)
        self.trip = trip_of(emit, steps)
        self.count = blocks_of(emit, self.trip, size)

    @property
    def order(self) -> range:
        """The steps of a block as they are walked."""
        return range(self.size - 1, -1, -1) if self.reverse else range(self.size)

    def split(self, x: fx.Node, fill: float) -> fx.Node:
        """[T, ...] as [count, size, ...], with ``fill`` behind the last step."""
        emit = self.emit
        rest = [size_of(emit, x, axis) for axis in range(1, x.meta["val"].dim())]
        whole = self.count * self.size if isinstance(self.count, int) else emit(operator.mul, self.count, self.size)
        filled = emit(aten.slice.Tensor, padded(emit, x, self.size - 1, fill), 0, 0, whole)
        return emit(aten.reshape.default, filled, [self.count, self.size, *rest])

    def joined(self, x: fx.Node, like: fx.Node) -> fx.Node:
        """[count, size, ...] as [T, ...], where the rest is that of ``like``."""
        emit = self.emit
        rest = [size_of(emit, like, axis) for axis in range(like.meta["val"].dim())]
        return emit(aten.slice.Tensor, emit(aten.reshape.default, x, [-1, *rest]), 0, 0, self.trip)

    def each_step(self, values: Sequence[fx.Node], combine: Combine) -> tuple[list[fx.Node], list[fx.Node]]:
        """For each step of each block ``values`` [count, size, ...] of all steps of the block up to it; those of the last."""
        emit = self.emit
        steps = {i: [emit(aten.select.int, x, 1, i) for x in values] for i in self.order}
        for before, i in itertools.pairwise(self.order):
            steps[i] = combine(steps[before], steps[i])
        columns = zip(*(steps[i] for i in range(self.size)), strict=True)
        stacked = [emit(aten.stack.default, list(column), 1) for column in columns]
        return stacked, steps[self.order[-1]]

    def up_to_each(self, values: Sequence[fx.Node], combine: Combine, unit: Sequence[float | fx.Node]) -> list[fx.Node]:
        """``values`` [count, ...] of all blocks up to each. ``unit`` are the values of no steps, of all or of one block."""
        found, distance = list(values), 1
        while distance < self.most:
            found = combine([self._before(x, distance, fill) for x, fill in zip(found, unit, strict=True)], found)
            distance *= 2
        return found

    def around(self, behind: fx.Node, state: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(the state in front of each block, the final one) of the initial one and those behind each block."""
        emit = self.emit
        first = emit(aten.unsqueeze.default, state, 0)
        ends = emit(aten.cat.default, [behind, first] if self.reverse else [first, behind], 0)
        start, final = (1, 0) if self.reverse else (0, -1)
        stop = 2**63 - 1 if self.reverse else self.count
        return emit(aten.slice.Tensor, ends, 0, start, stop), emit(aten.select.int, ends, 0, final)

    def entering(self, a: fx.Node, b: fx.Node, state: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(the state in front of each block, the final one), where block k makes a[k] h + b[k] of h."""
        a, b = self.up_to_each([a, b], self.affine, (1.0, 0.0))
        emit = self.emit
        return self.around(emit(aten.add.Tensor, emit(aten.mul.Tensor, a, state), b), state)

    def affine(self, earlier: list[fx.Node], later: list[fx.Node]) -> list[fx.Node]:
        """Pairs (a, b) stand for h -> a h + b; two in a row are (a2 a1, a2 b1 + b2)."""
        emit, (a1, b1), (a2, b2) = self.emit, earlier, later
        return [
            emit(aten.mul.Tensor, a2, a1),
            emit(aten.add.Tensor, emit(aten.mul.Tensor, a2, b1), b2),
        ]

    def _before(self, x: fx.Node, distance: int, fill: float | fx.Node) -> fx.Node:
        """``x`` [count, ...] as it was ``distance`` blocks before, ``fill`` where there was none."""
        emit = self.emit
        rest = [size_of(emit, x, axis) for axis in range(1, x.meta["val"].dim())]
        if isinstance(fill, fx.Node):
            filled = emit(aten.expand.default, fill, [distance, *rest])
        else:
            filled = emit(aten.full.default, [distance, *rest], fill, dtype=x.meta["val"].dtype)
        if self.reverse:
            both = emit(aten.cat.default, [x, filled], 0)
            return emit(aten.slice.Tensor, both, 0, distance, 2**63 - 1)
        return emit(aten.slice.Tensor, emit(aten.cat.default, [filled, x], 0), 0, 0, self.count)
