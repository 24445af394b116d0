"""Linear recurrences as prefix scans: blocks of unrolled steps, and a scan of logarithmic depth over the blocks.

Pairs (a, b) stand for h -> a h + b; two in a row are (a2 a1, a2 b1 + b2). Nothing is divided, so decays of 0 are exact. For
machines on which a loop of small operations costs a kernel each. Sources: Hillis and Steele, "Data parallel algorithms"
(1986); Blelloch, "Prefix sums and their applications" (1990).
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
import torch.fx as fx

from seqc import _torch
from seqc.emit import Emitter
from seqc.lowerings.base import Lowering, Refused, size_of, trip_of
from seqc.program import named_args

aten = torch.ops.aten

BLOCK = 16


def linear_scan(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """Each element's recurrence."""
    decay, update, state, reverse = named_args(node).values()
    blocks = Blocks(emit, update, reverse)
    a, b = blocks.split(decay, 1.0), blocks.split(update, 0.0)
    inner_a, inner_b = _each_step(emit, a, b, reverse)
    last = 0 if reverse else BLOCK - 1
    total_a, total_b = (emit(aten.select.int, x, 1, last) for x in (inner_a, inner_b))
    entering, final = blocks.entering(total_a, total_b, state)
    steps = emit(aten.add.Tensor, emit(aten.mul.Tensor, inner_a, emit(aten.unsqueeze.default, entering, 1)), inner_b)
    return [blocks.joined(steps, state), final]


def selective_scan(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """The blocks' last states are found first; from these each block's steps are taken again, and read out at once.

    No value holds the states of all steps: the largest is that of one state per block.
    """
    x, dt, rates, b, c, state, reverse = named_args(node).values()
    blocks = Blocks(emit, x, reverse)
    xs = [blocks.split(value, 0.0) for value in (x, dt, b, c)]
    steps = [[emit(aten.select.int, value, 1, i) for value in xs] for i in range(BLOCK)]

    def after(h: fx.Node | None, i: int) -> fx.Node:
        x_i, dt_i, b_i, _ = steps[i]
        added = emit(aten.mul.Tensor, _column(emit, x_i), emit(aten.unsqueeze.default, b_i, -2))
        if h is None:
            return added
        decay = emit(aten.exp.default, emit(aten.mul.Tensor, _column(emit, dt_i), rates))
        return emit(aten.add.Tensor, emit(aten.mul.Tensor, decay, h), added)

    order = range(BLOCK - 1, -1, -1) if reverse else range(BLOCK)
    total: fx.Node | None = None
    for i in order:
        total = after(total, i)
    assert total is not None
    exponent = emit(aten.mul.Tensor, _column(emit, emit(aten.sum.dim_IntList, xs[1], [1])), rates)
    h, final = blocks.entering(emit(aten.exp.default, exponent), total, state)
    out: dict[int, fx.Node] = {}
    for i in order:
        h = after(h, i)
        read = emit(aten.mul.Tensor, h, emit(aten.unsqueeze.default, steps[i][3], -2))
        out[i] = emit(aten.sum.dim_IntList, read, [-1])
    y = emit(aten.stack.default, [out[i] for i in range(BLOCK)], 1)
    return [blocks.joined(y, emit(aten.select.int, state, -1, 0)), final]


def _column(emit: Emitter, x: fx.Node) -> fx.Node:
    return emit(aten.unsqueeze.default, x, -1)


class Blocks:
    """The blocks of ``steps`` [T, ...] and the scan over them. Raises Refused where T has no upper bound."""

    def __init__(self, emit: Emitter, steps: fx.Node, reverse: bool = False, size: int = BLOCK) -> None:
        most = _torch.largest(steps.meta["val"].shape[0])
        if most is None:
            raise Refused("the number of steps has no upper bound: give the dimension one")
        self.emit, self.reverse, self.size = emit, reverse, size
        self.most = -(-most // size)
        self.trip = trip_of(emit, steps)
        if isinstance(self.trip, int):
            self.count: Any = self.most
        else:
            self.count = emit(operator.floordiv, emit(operator.add, self.trip, size - 1), size)

    def split(self, x: fx.Node, fill: float) -> fx.Node:
        """[T, ...] as [count, size, ...], with ``fill`` behind the last step."""
        emit = self.emit
        rest = [size_of(emit, x, axis) for axis in range(1, x.meta["val"].dim())]
        whole = self.count * self.size if isinstance(self.count, int) else emit(operator.mul, self.count, self.size)
        padding = emit(aten.full.default, [self.size - 1, *rest], fill, dtype=x.meta["val"].dtype)
        padded = emit(aten.slice.Tensor, emit(aten.cat.default, [x, padding], 0), 0, 0, whole)
        return emit(aten.reshape.default, padded, [self.count, self.size, *rest])

    def joined(self, x: fx.Node, like: fx.Node) -> fx.Node:
        """[count, size, ...] as [T, ...], where the rest is that of ``like``."""
        emit = self.emit
        rest = [size_of(emit, like, axis) for axis in range(like.meta["val"].dim())]
        return emit(aten.slice.Tensor, emit(aten.reshape.default, x, [-1, *rest]), 0, 0, self.trip)

    def entering(self, a: fx.Node, b: fx.Node, state: fx.Node) -> tuple[fx.Node, fx.Node]:
        """(the state in front of each block, the final one), where block k makes a[k] h + b[k] of h."""
        emit = self.emit
        distance = 1
        while distance < self.most:
            before_a, before_b = self._shifted(a, distance, 1.0), self._shifted(b, distance, 0.0)
            b = emit(aten.add.Tensor, emit(aten.mul.Tensor, a, before_b), b)
            a = emit(aten.mul.Tensor, a, before_a)
            distance *= 2
        behind = emit(aten.add.Tensor, emit(aten.mul.Tensor, a, state), b)
        first = emit(aten.unsqueeze.default, state, 0)
        ends = emit(aten.cat.default, [behind, first] if self.reverse else [first, behind], 0)
        start, final = (1, 0) if self.reverse else (0, -1)
        stop = 2**63 - 1 if self.reverse else self.count
        return emit(aten.slice.Tensor, ends, 0, start, stop), emit(aten.select.int, ends, 0, final)

    def _shifted(self, x: fx.Node, distance: int, fill: float) -> fx.Node:
        """``x`` [count, ...] as it was ``distance`` blocks before, ``fill`` where there was none."""
        emit = self.emit
        rest = [size_of(emit, x, axis) for axis in range(1, x.meta["val"].dim())]
        filled = emit(aten.full.default, [distance, *rest], fill, dtype=x.meta["val"].dtype)
        if self.reverse:
            both = emit(aten.cat.default, [x, filled], 0)
            return emit(aten.slice.Tensor, both, 0, distance, 2**63 - 1)
        return emit(aten.slice.Tensor, emit(aten.cat.default, [filled, x], 0), 0, 0, self.count)


def _each_step(emit: Emitter, a: fx.Node, b: fx.Node, reverse: bool) -> tuple[fx.Node, fx.Node]:
    """For each step of each block the pair of all steps of the block up to it."""
    order = range(BLOCK - 1, -1, -1) if reverse else range(BLOCK)
    steps_a, steps_b = ([emit(aten.select.int, x, 1, i) for i in range(BLOCK)] for x in (a, b))
    for before, i in itertools.pairwise(order):
        steps_b[i] = emit(aten.add.Tensor, emit(aten.mul.Tensor, steps_a[i], steps_b[before]), steps_b[i])
        steps_a[i] = emit(aten.mul.Tensor, steps_a[i], steps_a[before])
    return emit(aten.stack.default, steps_a, 1), emit(aten.stack.default, steps_b, 1)


LOWERINGS = (
    Lowering(
        "seqc::linear_scan",
        "prefix",
        f"blocks of {BLOCK} unrolled steps and a scan of logarithmic depth over the blocks: few kernels, no loop",
        linear_scan,
    ),
    Lowering(
        "seqc::selective_scan",
        "prefix",
        f"blocks of {BLOCK} unrolled steps, taken twice, and a scan of logarithmic depth over the blocks: no loop",
        selective_scan,
    ),
)
