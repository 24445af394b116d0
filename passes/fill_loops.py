"""FillLoops: loops that may have no step make one that nothing reads, for targets whose loops cannot be skipped."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import size_of
from seqc.ops.recurrence import always_steps, is_branch, is_recurrence, parts
from seqc.program import Program
from seqc.rewrite import remove_dead_code, result_index
from seqc.write_loop import write_recurrence

aten = torch.ops.aten


@dataclass(frozen=True)
class FillLoops:
    """A loop whose number of steps may be 0 gets a step of zeros then, whose results are dropped.

        h, y = recurrence(trip, h0, x)
    ->  h, y = recurrence(max(trip, 1), h0, cat(x, 0)[:max(trip, 1)]);    h = h if trip > 0 else h0;    y = y[:trip]

    For targets that build engines: elsewhere such a loop goes into an ``If``, where TensorRT builds none ("producer is not
    shape_call", tensorrt-rtx 1.7). The copy of each x is what it costs.

    ``tolerance``: nothing that is read is computed otherwise.
    """

    name: ClassVar[str] = "fill_loops"
    tolerance: ClassVar[float] = 0.0

    def __call__(self, program: Program) -> int:
        changes = 0
        for gm in program.graph_modules():
            emit = Emitter(gm, program.fake_mode)
            for node in list(gm.graph.nodes):
                if is_recurrence(node) and not is_branch(node) and not always_steps(program.dims, parts(node)):
                    _fill(emit, node)
                    changes += 1
        if changes:
            remove_dead_code(program)
        return changes


def _fill(emit: Emitter, node: fx.Node) -> None:
    loop = parts(node)
    trip = loop.trip
    with emit.before(node):
        most = emit(torch.sym_max, trip, 1)
        xs = [_filled(emit, x, most) for x in loop.xs]
        new = write_recurrence(emit, loop.body, most, loop.carries, xs, loop.invariants, loop.reverse)
        found = [emit(operator.getitem, new, i) for i in range(len(new.meta["val"]))]
        any_step = emit(aten.gt.Scalar, emit(aten.full.default, [], trip, dtype=torch.int64), 0)
        count = len(loop.carries)
        results = [emit(aten.where.self, any_step, h, old) for h, old in zip(found, loop.carries, strict=False)]
        results += [emit(aten.slice.Tensor, y, 0, 0, trip) for y in found[count:]]
    for reader in list(node.users):
        reader.replace_all_uses_with(results[result_index(reader)])


def _filled(emit: Emitter, x: fx.Node, most: Any) -> fx.Node:
    """``x`` [trip, ...] with a step of zeros behind, cut to ``most`` steps."""
    sizes = [size_of(emit, x, axis) for axis in range(1, x.meta["val"].dim())]
    step = emit(aten.full.default, [1, *sizes], 0, dtype=x.meta["val"].dtype)
    return emit(aten.slice.Tensor, emit(aten.cat.default, [x, step], 0), 0, 0, most)
