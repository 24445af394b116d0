"""Operations that move elements along the time, or read a window of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.fx as fx

from seqc import _torch
from seqc.program import named_args
from seqc.streaming.demand import Demand, Everything, Mode, Plan, Recent, Window, refuse
from seqc.streaming.derivation import END, Derivation

aten = torch.ops.aten


def delayed(d: Derivation, node: fx.Node, demand: Demand, axis: int, mode: Window) -> Plan:
    """A window that begins before the newest steps: the last elements of the steps before are a state."""
    newest = d.newest_of(node, axis)
    later = mode.stop - newest.stop
    if later > 0:
        what = "a later step is" if later == 1 else f"{later} later steps are"
        raise refuse(node, f"{what} read", "pad in front by all that is read")
    count = newest.start - mode.start
    if count < 0:
        raise refuse(node, "a window that begins behind the first new step")
    base = Demand(tuple(newest if a == axis else m for a, m in enumerate(demand.modes)), demand.at_end)
    value = node.meta["val"]
    exprs = [d.expected(s, m) for s, m in zip(value.shape, base.modes, strict=True)]
    exprs[axis] = sympy.Integer(count)
    slot = d.slot("conv_state", node, exprs, value.dtype, 0.0 if mode.fill is None else mode.fill)

    def write(new: fx.Node, *fill: fx.Node) -> fx.Node:
        line = d.emit(aten.cat.default, [slot.placeholder, new], axis)
        slot.following = d.emit(aten.slice.Tensor, line, axis, -count, END)
        return line if later == 0 else d.emit(aten.slice.Tensor, line, axis, 0, later)

    fills = ((mode.fill, d.newest(mode.fill)),) if isinstance(mode.fill, fx.Node) else ()
    return Plan(((node, base), *fills), write)


def filled(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """What is in front of a value whose first element comes later than the first step."""
    if node not in d.timed or (node.target is aten.slice.Tensor and not named_args(node)["start"]):
        return None
    for axis, mode in enumerate(demand.modes):
        if isinstance(mode, Window) and mode.fill is not None and mode.start < 0 and d.newest_of(node, axis).start < 0:
            break
    else:
        return None
    fill, bare = mode.fill, replace(mode, fill=None)
    need = Demand(tuple(bare if a == axis else m for a, m in enumerate(demand.modes)))

    def write(new: fx.Node, *before: fx.Node) -> fx.Node:
        at = d.positions(bare)
        if before:
            count = before[0].meta["val"].shape[axis]
            place = d.emit(aten.clamp.default, d.emit(aten.add.Tensor, at, count), 0, count - 1)
            front = d.emit(aten.index_select.default, before[0], axis, place)
        else:
            front = d.emit(aten.full.default, [], fill, dtype=new.meta["val"].dtype)
        return d.emit(aten.where.self, _along(d, d.emit(aten.lt.Scalar, at, 0), axis, new), front, new)

    return Plan(((node, need), *([(fill, d.newest(fill))] if isinstance(fill, fx.Node) else ())), write)


def _along(d: Derivation, numbers: fx.Node, axis: int, like: fx.Node) -> fx.Node:
    """``numbers`` [n] along an axis of what has the rank of ``like``."""
    return d.emit(aten.reshape.default, numbers, [-1 if a == axis else 1 for a in range(like.meta["val"].dim())])


def slice_of(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """x[s:], x[:n - k] and the like along the time."""
    arg = named_args(node)
    source, axis = arg["self"], arg["dim"] % node.meta["val"].dim()
    mode = demand.modes[axis]
    if axis not in d.axes(source):
        return _of_table(d, node, source, axis, demand)
    if mode is None:
        return _part(d, node, source, axis, _expr(arg["start"] or 0), demand)
    start = _expr(arg["start"] or 0)
    if d.time in start.free_symbols and start.could_extract_minus_sign():  # counted from the end: x[-n:] of n steps
        start = sympy.expand(start + _torch.size_expr(source.meta["val"].shape[axis]))
    if not start.is_Integer or start < 0 or arg["step"] != 1:
        raise refuse(
            node, "a part of the sequence that begins at its end, or leaves steps out, is no sequence of steps"
        )
    if isinstance(mode, (Everything, Recent)):
        whole = start == 0 and _torch.size_expr(source.meta["val"].shape[axis]) == d.time
        return Plan(((source, demand),), lambda new: new) if whole else None
    extra = sympy.expand(_torch.size_expr(node.meta["val"].shape[axis]) - d.time)
    if not extra.is_Integer or mode.stop > extra:
        raise refuse(node, "steps are read that the slice has left out")
    moved = Window(mode.start + int(start), mode.stop + int(start), mode.fill)
    need = Demand(tuple(moved if a == axis else m for a, m in enumerate(demand.modes)), demand.at_end)
    return Plan(((source, need),), lambda new: new)


def _of_table(d: Derivation, node: fx.Node, source: fx.Node, axis: int, demand: Demand) -> Plan | None:
    """table[:n], of n steps: the entries of the positions at hand. A position that it has no entry for is an error."""
    arg, mode = named_args(node), demand.modes[axis]
    whole = arg["start"] in (None, 0) and arg["step"] == 1 and _torch.size_expr(node.meta["val"].shape[axis]) == d.time
    if mode is None or not whole or (isinstance(mode, Window) and mode.start < 0):
        return None
    need = Demand(tuple(None if a == axis else m for a, m in enumerate(demand.modes)), demand.at_end, demand.since)

    def write(new: fx.Node) -> fx.Node:
        at = d.positions(mode)
        if isinstance(mode, Everything):  # places behind the newest step may be more than there are entries
            at = d.emit(aten.clamp.default, at, None, d.size(_torch.size_expr(new.meta["val"].shape[axis])) - 1)
        return d.emit(aten.index_select.default, new, axis, at)

    return Plan(((source, need),), write)


def _part(d: Derivation, node: fx.Node, source: fx.Node, axis: int, start: Any, demand: Demand) -> Plan | None:
    """x[-1:], at the end; a part of constant length is known to no step but the last."""
    if node not in d.timed:
        return None
    size = _torch.size_expr(source.meta["val"].shape[axis])
    count = _torch.size_expr(node.meta["val"].shape[axis])
    if start.is_Integer and start >= 0 and count.is_Integer:
        last = int(start + count)
        return early(
            d, node, source, axis, last, demand, lambda new: d.emit(aten.slice.Tensor, new, axis, int(start), last)
        )
    if not demand.at_end or size != d.time or start not in (sympy.Integer(-1), d.time - 1):
        raise refuse(node, "some steps of the sequence are read at every other", "pass them as an input of their own")
    return Plan(((source, d.newest(source)),), lambda new: d.emit(aten.slice.Tensor, new, axis, -1, END))


def _expr(value: Any) -> Any:
    return _torch.size_expr(value.meta["val"] if isinstance(value, fx.Node) else value)


def pad(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """Constants put in front of the sequence, or steps cut off there; None where the result is what has to be kept."""
    arg = named_args(node)
    source, widths, rank = arg["self"], list(arg["pad"]), node.meta["val"].dim()
    over = d.axes(source)
    padded = [rank - 1 - i for i in range(len(widths) // 2) if widths[2 * i] != 0 or widths[2 * i + 1] != 0]
    if not any(a in over for a in padded):
        return None
    if len(padded) > 1 or arg.get("mode", "constant") != "constant":
        raise refuse(node, "padding of several axes, or not by a constant, along the time")
    axis = padded[0]
    before = widths[2 * (rank - 1 - axis)]
    mode = demand.modes[axis]
    if not isinstance(before, int):
        raise refuse(node, "padding whose size depends on the sequence")
    fill = arg["value"] or 0.0
    if not isinstance(mode, Window) or (before > 0 and mode.start < 0 and mode.fill != fill):
        return None
    moved = Window(mode.start - before, mode.stop - before, fill if before > 0 else mode.fill)
    need = Demand(tuple(moved if a == axis else m for a, m in enumerate(demand.modes)), demand.at_end)
    return Plan(((source, need),), lambda new: new)


def cat(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """Constants put in front of the sequence by cat; None where the result is what has to be kept."""
    arg = named_args(node)
    parts, axis = list(arg["tensors"]), arg["dim"] % node.meta["val"].dim()
    mode = demand.modes[axis] if demand.modes else None
    if axis not in d.axes(node):
        return None
    over = [p for p in parts if axis in d.axes(p)]
    index = parts.index(over[0]) if over else 0
    if len(over) != 1 or (parts[index + 1 :] and not isinstance(mode, Window)):
        raise refuse(node, "parts of the sequence are put together in another order")
    count = sum(int(p.meta["val"].shape[axis]) for p in parts[:index])
    behind = isinstance(mode, Window) and mode.start >= count
    if not behind and (index > 1 or not all(d.is_constant(p) for p in parts[:index])):
        return _put_in_front(d, node, demand, axis, index, count)
    if not isinstance(mode, Window) or (count and mode.start < 0):
        return None
    fill = None if behind else parts[0] if count else mode.fill
    moved = Window(mode.start - count, mode.stop - count, fill)
    need = Demand(tuple(moved if a == axis else m for a, m in enumerate(demand.modes)), demand.at_end)
    # Asked for here, where it stands behind them, since what is filled with it may stand in front of the constants.
    fills = [(fill, d.newest(fill))] if isinstance(fill, fx.Node) else []
    return Plan(((over[0], need), *fills), lambda new, *_: new)


def _put_in_front(d: Derivation, node: fx.Node, demand: Demand, axis: int, index: int, count: int) -> Plan | None:
    """Computed values in front of the rest of the sequence: where the positions are theirs."""
    mode = demand.modes[axis]
    if not isinstance(mode, Window) or not mode.is_same(d.newest_of(node, axis)):
        return None
    parts = list(named_args(node)["tensors"])
    rest = Window(mode.start - count, mode.stop - count)
    moved = Demand(tuple(rest if a == axis else m for a, m in enumerate(demand.modes)))
    known = itertools.accumulate([0, *(int(p.meta["val"].shape[axis]) for p in parts[: index - 1])])
    needs = [(p, d.newest(p, since=-mode.start + at)) for p, at in zip(parts, known, strict=False)]

    def write(new: fx.Node, *front: fx.Node) -> fx.Node:
        at = d.positions(replace(mode, fill=None))
        line = d.emit(aten.cat.default, list(front), axis)
        line = d.emit(aten.index_select.default, line, axis, d.emit(aten.clamp.default, at, 0, count - 1))
        return d.emit(aten.where.self, _along(d, d.emit(aten.lt.Scalar, at, count), axis, new), line, new)

    return Plan(((parts[index], moved), *needs), write)


def early(
    d: Derivation,
    node: fx.Node,
    source: fx.Node,
    axis: int,
    count: int,
    demand: Demand,
    write: Callable[[fx.Node], fx.Node],
) -> Plan:
    """A part of the first ``count`` steps, which are a state; those not yet there are 0 in it."""
    newest = d.newest_of(source, axis)
    if count - 1 - newest.start > demand.since and not demand.at_end:
        raise refuse(
            node,
            f"step {count - 1 - newest.start} of the sequence, counted from 0, is read at step {demand.since}",
            "pass it as an input of its own",
        )
    exprs = [d.expected(s, m) for s, m in zip(source.meta["val"].shape, d.newest(source).modes, strict=True)]
    exprs[axis] = sympy.Integer(count)
    slot = d.shared(("early", node), lambda: d.slot("first_steps", node, exprs, source.meta["val"].dtype, 0.0))

    def kept(new: fx.Node) -> fx.Node:
        before = d.emit(aten.add.Tensor, d.position(), newest.start) if newest.start else d.position()
        here = d.emit(aten.sub.Tensor, d.emit(aten.arange.default, count), before)
        zeros = d.emit(aten.zeros_like.default, slot.placeholder)
        line = d.emit(aten.cat.default, [new, zeros], axis)
        line = d.emit(aten.index_select.default, line, axis, d.emit(aten.clamp.default, here, 0))
        seen = _along(d, d.emit(aten.lt.Scalar, here, 0), axis, line)
        slot.following = d.emit(aten.where.self, seen, slot.placeholder, line)
        return write(slot.following)

    return Plan(((source, d.newest(source)),), kept)


def convolution(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """A convolution along the time: the steps it reads back are a state."""
    arg = named_args(node)
    source = arg["input"]
    if len(d.axes(source)) != 1 or d.axes(source)[0] < 2:
        return None
    at = d.axes(source)[0] - 2
    spatial = node.meta["val"].dim() - 2
    stride, padding, dilation = ([*arg[k]] * (spatial // len(arg[k])) for k in ("stride", "padding", "dilation"))
    if stride[at] != 1:
        raise refuse(node, "a convolution with a stride makes fewer steps of the sequence")
    size = int(arg["weight"].meta["val"].shape[2 + at])
    need = _reaching(d, source, 2 + at, demand.modes[2 + at], (size - 1) * int(dilation[at]), int(padding[at]), 0.0)
    others = [n for n in (arg["weight"], arg["bias"]) if isinstance(n, fx.Node)]
    inner = [0 if a == at else n for a, n in enumerate(padding)]

    def write(new: fx.Node, *fixed: fx.Node) -> fx.Node:
        weight, bias = (*fixed, None)[:2]
        return d.emit(node.target, new, weight, bias, stride, inner, dilation, arg["groups"])

    return Plan(((source, need), *((n, d.newest(n)) for n in others)), write)


def _reaching(d: Derivation, source: fx.Node, axis: int, mode: Mode, reach: int, padding: int, fill: float) -> Demand:
    """What ``mode`` needs of ``source`` where each element along ``axis`` reads ``reach`` behind it, less the padding."""
    assert isinstance(mode, Window)
    window = Window(mode.start - padding, mode.stop + reach - padding, fill if padding else None)
    return Demand(tuple(window if a == axis else m for a, m in enumerate(d.newest(source).modes)))


def pool(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """A mean or maximum over neighbouring steps: those it reads back are a state."""
    arg = named_args(node)
    source = arg["self"]
    axis = source.meta["val"].dim() - 1
    if d.axes(source) != (axis,):
        return None
    size, padding = arg["kernel_size"][0], arg["padding"][0]
    dilation = arg["dilation"][0] if "dilation" in arg else 1
    if (arg["stride"] or arg["kernel_size"])[0] != 1:
        raise refuse(node, "pooling with a stride makes fewer steps of the sequence")
    mean = node.target is aten.avg_pool1d.default
    if mean and padding and not arg["count_include_pad"]:
        raise refuse(node, "a mean that leaves the padding out", "pad in front, and count it")
    need = _reaching(d, source, axis, demand.modes[axis], (size - 1) * dilation, padding, 0.0 if mean else -math.inf)

    def write(new: fx.Node) -> fx.Node:
        return d.emit(node.target, new, [size], [1], [0], *([] if mean else [[dilation]]))

    return Plan(((source, need),), write)


def unfold(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """Windows of neighbouring steps: those they reach back are a state."""
    source, axis, size, step = named_args(node).values()
    axis %= source.meta["val"].dim()
    if d.axes(source) != (axis,):
        return None
    if step != 1:
        raise refuse(node, "windows that leave steps out make fewer steps of the sequence")
    need = _reaching(d, source, axis, demand.modes[axis], size - 1, 0, 0.0)
    return Plan(((source, need),), lambda new: d.emit(node.target, new, axis, size, step))


def select(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """The newest step."""
    source, axis, index = named_args(node).values()
    axis %= source.meta["val"].dim()
    if axis not in d.axes(source):
        return None
    size = _torch.size_expr(source.meta["val"].shape[axis])
    at = _expr(index)
    if at.is_Integer and at >= 0:
        return early(
            d, node, source, axis, int(at) + 1, demand, lambda new: d.emit(aten.select.int, new, axis, int(at))
        )
    if sympy.expand(size - d.time) != 0 or _expr(index) not in (sympy.Integer(-1), size - 1):
        raise refuse(node, "one step of the sequence is read at every other", "pass it as an input of its own")
    if not demand.at_end:
        raise refuse(node, "the last step of the sequence is read at an earlier one")
    return Plan(((source, d.newest(source)),), lambda new: d.emit(aten.select.int, new, axis, -1))
