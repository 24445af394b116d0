"""Running sums and maxima along the time, and what is summed over all of it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from seqc import _torch
from seqc.program import named_args
from seqc.streaming.attention import extreme, read_by, steps_only
from seqc.streaming.causal import beyond, is_nothing, is_zero
from seqc.streaming.demand import ALL, Demand, Mode, Plan, Window, refuse
from seqc.streaming.derivation import END, Derivation, first
from seqc.streaming.exact_sums import running_sum

aten = torch.ops.aten

_RUNNING: dict[Any, tuple[Any, float]] = {
    aten.cumsum.default: (aten.add.Tensor, 0.0),
    aten.cumprod.default: (aten.mul.Tensor, 1.0),
    aten.logcumsumexp.default: (aten.logaddexp.default, -math.inf),
    aten.cummax.default: (aten.maximum.default, -math.inf),
    aten.cummin.default: (aten.minimum.default, math.inf),
}


def _never(value: float | bool | None) -> bool:
    return False


_LETS_NOTHING_THROUGH: dict[Any, tuple[Callable[[float | bool | None], bool], float]] = {
    aten.sum.dim_IntList: (is_zero, 0.0),
    aten.amax.default: (is_nothing, -math.inf),
    aten.max.dim: (is_nothing, -math.inf),
    aten.logsumexp.default: (is_nothing, -math.inf),
    aten.amin.default: (_never, math.inf),
    aten.mean.dim: (_never, 0.0),
}
"""Of a reduction: whether elements of a value count for nothing in it, and such a value."""


def running(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """A running sum, product, maximum or log of a sum of exponentials: its newest value is a state."""
    arg = named_args(node)
    source = arg["self"]
    value = first(node.meta["val"])
    several = isinstance(node.meta["val"], (tuple, list))
    axis = arg["dim"] % value.dim()
    if axis not in d.axes(source):
        return None
    together, initial = _RUNNING[node.target]
    if d.axes(source) != (axis,) or _torch.size_expr(value.shape[axis]) != d.time:
        raise refuse(node, "a running sum along an axis that is not the sequence alone")
    if several and any(user.args[1] != 0 for user in node.users):
        raise refuse(node, "the place of a running maximum is read")
    if math.isinf(initial) and not value.dtype.is_floating_point:
        initial = extreme(value.dtype, initial)
    if node.target is aten.cumsum.default and value.dtype.is_floating_point:
        return running_sum(d, node, axis)
    exprs = [_torch.size_expr(s) if a != axis else _torch.size_expr(1) for a, s in enumerate(value.shape)]
    slot = d.slot("recurrent_state", node, exprs, value.dtype, initial)

    def write(new: fx.Node) -> Any:
        own = d.emit(node.target, new, *node.args[1:], **node.kwargs)
        result = d.emit(together, d.emit(operator.getitem, own, 0) if several else own, slot.placeholder)
        slot.following = d.emit(aten.slice.Tensor, result, axis, -1, END)
        return (result,) if several else result

    return Plan(((source, d.newest(source)),), write)


def reduction(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """A sum over everything so far: each step's own where later steps count for nothing in it, else that of the end."""
    arg = named_args(node)
    source = arg["self"]
    rank = source.meta["val"].dim()
    several = node.target is aten.max.dim
    dims = [a % rank for a in ([arg["dim"]] if several else arg["dim"])]
    summed = [a for a in dims if a in d.axes(source)]
    if not summed:
        return None
    if several and any(user.args[1] != 0 for user in node.users):
        raise refuse(node, "the place of a maximum over the sequence is read")
    kept = [a for a in range(rank) if a not in dims]
    results = kept if not arg["keepdim"] else list(range(rank))
    modes = list(d.newest(source).modes)
    for at, axis in enumerate(results):
        if axis in kept and modes[axis] is not None:
            modes[axis] = demand.modes[at]
    counts_not, nothing = _LETS_NOTHING_THROUGH[node.target]
    read: Mode = ALL
    if len(d.axes(source)) == 2 and len(summed) == 1:
        read = read_by(d, source, counts_not)
    for axis in summed:
        modes[axis] = read
    per_step = any(isinstance(m, Window) for m in modes)
    if per_step and not counts_not(beyond(d, source)):
        raise refuse(node, "each step reads later ones", "a causal mask has to rule them out")
    if not per_step and not demand.at_end:
        raise refuse(node, "it is known at the end of the sequence only, but is needed at each step of it")

    def write(new: fx.Node) -> Any:
        seen = new
        for axis in summed:
            seen = steps_only(d, seen, axis, read, nothing, per_step)
        if several:
            return (d.emit(aten.amax.default, seen, dims, arg["keepdim"]),)
        result = d.emit(node.target, seen, *node.args[1:], **node.kwargs)
        return result if node.target is not aten.mean.dim else _of_steps(d, result, len(summed))

    return Plan(((source, Demand(tuple(modes))),), write)


def _of_steps(d: Derivation, mean: fx.Node, times: int) -> fx.Node:
    """The mean of steps, of one over all places of a buffer in which the others are 0."""
    share = d.emit(aten.mean.dim, d.emit(aten._to_copy.default, d.are_steps(ALL), dtype=torch.float32), [0])
    for _ in range(times):
        mean = d.emit(aten.div.Tensor, mean, share)
    return mean
