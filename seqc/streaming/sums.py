"""Running sums along the time, and what is summed over all of it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx as fx

from seqc import _torch
from seqc.program import named_args
from seqc.streaming.causal import beyond
from seqc.streaming.demand import ALL, Demand, Plan, Window, refuse
from seqc.streaming.derivation import END, Derivation

aten = torch.ops.aten

_RUNNING: dict[Any, tuple[Any, float]] = {
    aten.cumsum.default: (aten.add.Tensor, 0.0),
    aten.cumprod.default: (aten.mul.Tensor, 1.0),
    aten.logcumsumexp.default: (aten.logaddexp.default, -math.inf),
}


def running(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """A running sum, product or log of a sum of exponentials: its newest value is a state."""
    arg = named_args(node)
    source = arg["self"]
    value = node.meta["val"]
    axis = arg["dim"] % value.dim()
    if axis not in d.axes(source):
        return None
    together, initial = _RUNNING[node.target]
    if d.axes(source) != (axis,) or _torch.size_expr(value.shape[axis]) != d.time:
        raise refuse(node, "a running sum along an axis that is not the sequence alone")
    exprs = [_torch.size_expr(s) if a != axis else _torch.size_expr(1) for a, s in enumerate(value.shape)]
    slot = d.slot("recurrent_state", node, exprs, value.dtype, initial)

    def write(new: fx.Node) -> fx.Node:
        result = d.emit(together, d.emit(node.target, new, *node.args[1:], **node.kwargs), slot.placeholder)
        slot.following = d.emit(aten.slice.Tensor, result, axis, -1, END)
        return result

    return Plan(((source, d.newest(source)),), write)


def reduction(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """A sum over everything so far: each step's own where later steps count for nothing in it, else that of the end."""
    arg = named_args(node)
    source = arg["self"]
    rank = source.meta["val"].dim()
    dims = [a % rank for a in arg["dim"]]
    summed = [a for a in dims if a in d.axes(source)]
    if not summed:
        return None
    kept = [a for a in range(rank) if a not in dims]
    results = kept if not arg["keepdim"] else list(range(rank))
    modes = list(d.newest(source).modes)
    for at, axis in enumerate(results):
        if axis in kept and modes[axis] is not None:
            modes[axis] = demand.modes[at]
    for axis in summed:
        modes[axis] = ALL
    per_step = any(isinstance(m, Window) for m in modes)
    if per_step and not (node.target is aten.sum.dim_IntList and beyond(d, source) == 0):
        raise refuse(node, "each step reads later ones", "a causal mask has to rule them out")
    if not per_step and not demand.at_end:
        raise refuse(node, "it is known at the end of the sequence only, but is needed at each step of it")

    def write(new: fx.Node) -> fx.Node:
        return d.emit(node.target, new, *node.args[1:], **node.kwargs)

    return Plan(((source, Demand(tuple(modes))),), write)
