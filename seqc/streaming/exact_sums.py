"""Running sums that go on for ever: what rounding takes from them is a part of the state."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx as fx

from seqc import _torch
from seqc.program import named_args
from seqc.streaming.demand import Plan
from seqc.streaming.derivation import END, Derivation

aten = torch.ops.aten


def running_sum(d: Derivation, node: fx.Node, axis: int) -> Plan:
    """A running sum of floats, whose state holds along ``axis`` the sum and what it lacks of the exact one.

    A float32 sum of ones stays at 2^24 for ever, step by step, while torch adds up whole sequences in float64. The pair is as
    good as twice the digits: Knuth's exact error of an addition (The Art of Computer Programming, 4.2.2), carried along.
    """
    value = node.meta["val"]
    exprs = [_torch.size_expr(2 if a == axis else s) for a, s in enumerate(value.shape)]
    slot = d.slot("recurrent_state", node, exprs, value.dtype, 0.0)

    def finite_or_zero(x: fx.Node, when: fx.Node) -> fx.Node:
        """Where a sum is infinite, the difference of two infinities says nothing of its error."""
        is_finite = d.emit(aten.lt.Scalar, d.emit(aten.abs.default, when), math.inf)
        return d.emit(aten.where.self, is_finite, x, d.emit(aten.zeros_like.default, x))

    def minus(a: fx.Node, b: fx.Node) -> fx.Node:
        return d.emit(aten.sub.Tensor, a, b)

    def write(new: fx.Node) -> Any:
        before, lacking = (d.emit(aten.slice.Tensor, slot.placeholder, axis, i, i + 1) for i in (0, 1))
        added = d.emit(aten.cumsum.default, new, *node.args[1:], **node.kwargs)
        total = d.emit(aten.add.Tensor, added, before)
        taken = minus(total, before)
        error = d.emit(aten.add.Tensor, minus(before, minus(total, taken)), minus(added, taken))
        rest = d.emit(aten.add.Tensor, finite_or_zero(error, total), lacking)
        result = d.emit(aten.add.Tensor, total, rest)
        rounded, rest, newest = (d.emit(aten.slice.Tensor, x, axis, -1, END) for x in (total, rest, result))
        left = finite_or_zero(d.emit(aten.add.Tensor, minus(rounded, newest), rest), newest)
        slot.following = d.emit(aten.cat.default, [newest, left], axis)
        return result

    source = named_args(node)["self"]
    return Plan(((source, d.newest(source)),), write)
