"""FillLoops: loops that may have no step make one that nothing reads, for targets whose loops cannot be skipped."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from seqc.emit import Emitter, rewrite_nodes
from seqc.lowerings.blocks import padded
from seqc.ops.recurrence import always_steps, is_branch, is_recurrence, parts
from seqc.program import Program
from seqc.rewrite import result_index
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
        return rewrite_nodes(program, _filled)


def _filled(program: Program, emit: Emitter, node: fx.Node) -> bool:
    if not is_recurrence(node) or is_branch(node) or always_steps(program.dims, parts(node)):
        return False
    loop = parts(node)
    trip = loop.trip
    with emit.before(node):
        most = emit(torch.sym_max, trip, 1)
        xs = [emit(aten.slice.Tensor, padded(emit, x, 1), 0, 0, most) for x in loop.xs]
        new = write_recurrence(emit, loop.body, most, loop.carries, xs, loop.invariants, loop.reverse)
        found = [emit(operator.getitem, new, i) for i in range(len(new.meta["val"]))]
        any_step = emit(aten.gt.Scalar, emit(aten.full.default, [], trip, dtype=torch.int64), 0)
        count = len(loop.carries)
        results = [emit(aten.where.self, any_step, h, old) for h, old in zip(found, loop.carries, strict=False)]
        results += [emit(aten.slice.Tensor, y, 0, 0, trip) for y in found[count:]]
    for reader in list(node.users):
        reader.replace_all_uses_with(results[result_index(reader)])
    return True
