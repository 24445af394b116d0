"""Where the axes of an operand are in the result of an operation that only moves them."""

from __future__ import annotations

import torch
import torch.fx as fx

aten = torch.ops.aten

PERMUTES = frozenset({aten.permute.default, aten.transpose.int, aten.t.default})


def order_of(node: fx.Node) -> list[int]:
    """For each axis of a permutation the axis of its operand."""
    rank = node.meta["val"].dim()
    if node.target is aten.permute.default:
        return [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    order = list(range(rank))
    if rank >= 2:
        i, j = (-2, -1) if node.target is aten.t.default else node.args[1:3]
        order[i], order[j] = order[j], order[i]  # type: ignore[index]
    return order
