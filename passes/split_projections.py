"""SplitProjections: a matrix product of the input and the state, put together, becomes one of each."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.loop import Loop
from seqc.ops.recurrence import is_recurrence
from seqc.program import Program
from seqc.rewrite import replace_node

aten = torch.ops.aten

_TRANSPOSED: dict[Any, bool] = {aten.linear.default: True, aten.mm.default: False, aten.matmul.default: False}


@dataclass(frozen=True)
class SplitProjections:
    """In loops, splits the product of concatenated parts that depend on different carries.

        gates = linear(cat([x_t, h]), W, b)    ->    gates = linear(x_t, W[:, :D], b) + linear(h, W[:, D:])

    The product of the input can then leave the loop (Hoist), and what is left is a cell that can be recognised.

    ``tolerance``: a sum of D + H products becomes the sum of two sums, the usual error of a float32 dot product.
    """

    name: ClassVar[str] = "split_projections"
    tolerance: ClassVar[float] = 1e-5

    def __call__(self, program: Program) -> int:
        changes = 0
        for gm in program.graph_modules():
            for node in [n for n in gm.graph.nodes if is_recurrence(n)]:
                changes += self._loop(Loop(gm, node, program.fake_mode))
        return changes

    def _loop(self, loop: Loop) -> int:
        invariants = {inner for _, inner in loop.invariants}
        emit = Emitter(loop.body, loop.emit.mode)
        changes = 0
        for node in loop.operations():
            if node.target not in _TRANSPOSED or node.args[1] not in invariants:
                continue
            parts = _parts(node.args[0])
            groups = [list(group) for _, group in itertools.groupby(parts, key=loop.carries_behind)]
            if len(groups) > 1:
                with emit.before(node):
                    replace_node(node, _summed(emit, node, groups))
                loop.reload()
                changes += 1
        if changes:
            loop.erase_unused()
            loop.commit()
        return changes


def _parts(node: Any) -> list[fx.Node]:
    """What ``node`` is a concatenation of, along its last axis and of fixed sizes; nothing where it is none."""
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default:
        return []
    parts, axis = (*node.args, 0)[:2]
    rank = node.meta["val"].dim()
    widths = [part.meta["val"].shape[-1] for part in parts]  # type: ignore[union-attr]
    last = axis % rank == rank - 1 and all(part.meta["val"].dim() == rank for part in parts)  # type: ignore[union-attr]
    return list(parts) if last and all(isinstance(w, int) for w in widths) else []  # type: ignore[arg-type]


def _summed(emit: Emitter, node: fx.Node, groups: list[list[fx.Node]]) -> fx.Node:
    weight, *bias = node.args[1:]
    axis = 1 if _TRANSPOSED[node.target] else 0
    total: fx.Node | None = None
    start = 0
    for group in groups:
        end = start + sum(part.meta["val"].shape[-1] for part in group)
        value = group[0] if len(group) == 1 else emit(aten.cat.default, group, -1)
        rows = emit(aten.slice.Tensor, weight, axis, start, end)
        product = emit(node.target, value, rows, *(bias if total is None else []))
        total = product if total is None else emit(aten.add.Tensor, total, product)
        start = end
    assert total is not None
    return total
