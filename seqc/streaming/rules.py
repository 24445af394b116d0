"""What each operation needs of its operands for what is wanted of it.

The first of these that applies: a value that is the same whatever the sequence is copied; an operation that looks along the
time has its rule; a window that reaches back becomes a state, and everything of a computed value a growing one; a value that
depends on positions alone is computed for the positions at hand; every other operation has to treat each step by itself,
which is tried.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import sympy
import torch
import torch.fx as fx

from seqc import _torch
from seqc.ops.recurrence import is_recurrence
from seqc.outside import is_size
from seqc.streaming import attention, layers, positions, shifts, sums
from seqc.streaming.commutes import commutes
from seqc.streaming.demand import Demand, Everything, Plan, Recent, Window, refuse
from seqc.streaming.derivation import MOVES, Derivation, Rule, first, resized, target_of

aten = torch.ops.aten

_ABSORBS_WINDOWS: dict[Any, Rule] = {
    aten.slice.Tensor: shifts.slice_of,
    aten.pad.default: shifts.pad,
    aten.constant_pad_nd.default: shifts.pad,
    aten.cat.default: shifts.cat,
}
"""Operations that only move elements along the time: a window of the result is a window of the operand."""

_OF_NEW: dict[Any, Rule] = {
    aten.conv1d.default: shifts.convolution,
    aten.conv2d.default: shifts.convolution,
    aten.avg_pool1d.default: shifts.pool,
    aten.max_pool1d.default: shifts.pool,
    aten.unfold.default: shifts.unfold,
    aten.select.int: shifts.select,
    aten.cumsum.default: sums.running,
    aten.cumprod.default: sums.running,
    aten.logcumsumexp.default: sums.running,
    aten.cummax.default: sums.running,
    aten.cummin.default: sums.running,
    aten.sum.dim_IntList: sums.reduction,
    aten.mean.dim: sums.reduction,
    aten.amax.default: sums.reduction,
    aten.amin.default: sums.reduction,
    aten.max.dim: sums.reduction,
    aten.logsumexp.default: sums.reduction,
    aten.lstm.input: layers.recurrent_layer,
    aten.gru.input: layers.recurrent_layer,
    aten.rnn_tanh.input: layers.recurrent_layer,
    aten.rnn_relu.input: layers.recurrent_layer,
    aten.scaled_dot_product_attention.default: attention.whole,
    aten.softmax.int: attention.softmax,
    aten._softmax.default: attention.softmax,
    aten.matmul.default: attention.product,
    aten.bmm.default: attention.product,
    aten.einsum.default: attention.einsum,
    aten.tril.default: attention.triangle,
    aten.triu.default: attention.triangle,
    aten.index.Tensor: positions.lookup,
}


def plan(d: Derivation, node: fx.Node, demand: Demand) -> Plan:
    """How ``node`` is computed for ``demand``. Raises NotCausal where it cannot be."""
    if d.is_fixed(node):
        return _copied(d, node, demand)
    if node.target is operator.getitem:
        return _item(d, node, demand)
    if node.op == "call_function":
        found = _ABSORBS_WINDOWS.get(node.target, _none)(d, node, demand)
        if found is not None:
            return found
    found = positions.closed_form(d, node, demand) if node not in d.timed else None
    if found is not None:
        return found
    if node.target not in _OF_NEW and not is_recurrence(node) and any(_in_padding(d, node, demand)):
        return each_step(d, node, demand)
    return _kept(d, node, demand) or _of_new(d, node, demand)


def _in_padding(d: Derivation, node: fx.Node, demand: Demand) -> Iterator[bool]:
    """For each axis, whether it was padded in front of the first step and what is wanted begins in the padding.

    Its newest element is then as far behind the newest step as the padding is long: it is no later step that is read.
    """
    for size, mode in zip(first(node.meta["val"]).shape, demand.modes, strict=True):
        longer = sympy.expand(_torch.size_expr(size) - d.time)
        yield (
            node.op == "call_function"
            and isinstance(mode, Window)
            and mode.start >= 0
            and longer.is_Integer
            and 0 < mode.stop <= longer
        )


def _none(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    return None


def _of_new(d: Derivation, node: fx.Node, demand: Demand) -> Plan:
    if node.op == "placeholder":
        return Plan((), lambda: d.inputs[node])
    if is_recurrence(node):
        return layers.recurrence_of(d, node, demand)
    found = _OF_NEW.get(node.target, _none)(d, node, demand)
    if found is not None:
        return found
    if not any(demand.modes) and not demand.at_end:
        raise refuse(node, "it is known at the end of the sequence only, but is needed at each step of it")
    return each_step(d, node, demand)


def _copied(d: Derivation, node: fx.Node, demand: Demand) -> Plan:
    if node.op == "placeholder":
        return Plan((), lambda: d.inputs[node])
    if node.target in positions.FACTORIES:
        return positions.filled(d, node, demand)
    operands = _operands(node)

    def write(*new: Any) -> Any:
        args, kwargs = d.arguments(node, dict(zip(operands, new, strict=True)))
        return d.emit(node.target, *args, **kwargs)

    return Plan(tuple((n, d.newest(n)) for n in operands), write)


def _item(d: Derivation, node: fx.Node, demand: Demand) -> Plan:
    source, index = node.args
    assert isinstance(source, fx.Node) and isinstance(index, int)
    if not any(demand.modes) and not demand.at_end:
        raise refuse(node, "it is known at the end of the sequence only, but is needed at each step of it")

    def write(new: Any) -> Any:
        return new[index] if isinstance(new, tuple) else d.emit(operator.getitem, new, index)

    if demand.is_new and not any(isinstance(m, (Everything, Recent)) for m in demand.modes):
        return Plan(((source, Demand(()) if layers.is_layer(source) else demand),), write)
    return _kept(d, node, demand) or Plan(((source, demand),), write)


def _kept(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """A window that reaches back, or everything of a computed value: by a state."""
    for axis, mode in enumerate(demand.modes):
        if isinstance(mode, Window) and not mode.is_new and (node in d.timed or mode.fill is not None):
            return shifts.delayed(d, node, demand, axis, mode)
    over = [(a, m) for a, m in enumerate(demand.modes) if m is not None]
    if node in d.timed and len(over) == 1 and isinstance(over[0][1], (Everything, Recent)) and not _repeats(d, node):
        return attention.kept(d, node, demand, over[0][0])
    return None


def _repeats(d: Derivation, node: fx.Node) -> bool:
    """Whether the value is a smaller one repeated, or one with its steps at the last axis: then that one is kept."""
    if node.target is aten.unsqueeze.default:
        return True
    if node.target in (aten.transpose.int, aten.permute.default):
        return d.axes(node) == (node.meta["val"].dim() - 1,)
    while node.target in MOVES and isinstance(node.args[0], fx.Node):
        before = node.args[0]
        if node.target is aten.expand.default and node.meta["val"].numel() != before.meta["val"].numel():
            return True
        node = before
    return False


def each_step(d: Derivation, node: fx.Node, demand: Demand) -> Plan:
    """An operation that treats each element along its axes over time by itself."""
    operands = _operands(node)
    over = [n for n in operands if d.axes(n)]
    out = d.axes(node)
    axes = _axes(d, node, over, out)
    if axes is None:
        raise refuse(node, "it mixes the steps of the sequence in a way for which there is no rule")
    needs = []
    for n in operands:
        if n not in axes:
            needs.append((n, d.newest(n)))
            continue
        modes = list(d.newest(n).modes)
        for own, result in zip(d.axes(n), axes[n], strict=True):
            modes[own] = demand.modes[result]
        needs.append((n, Demand(tuple(modes))))

    def write(*new: Any) -> Any:
        args, kwargs = d.arguments(node, dict(zip(operands, new, strict=True)), d.shape(node, demand) if out else None)
        return d.emit(target_of(node), *args, **kwargs)

    return Plan(tuple(needs), write)


def _operands(node: fx.Node) -> list[fx.Node]:
    return list(dict.fromkeys(n for n in node.all_input_nodes if not is_size(n)))


def _axes(
    d: Derivation, node: fx.Node, over: list[fx.Node], out: tuple[int, ...]
) -> dict[fx.Node, tuple[int, ...]] | None:
    """For each operand with axes over time, which axes of the result these are; None where steps are mixed."""
    if any(len(d.axes(n)) > len(out) for n in over):
        return None
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        rank = first(node.meta["val"]).dim()
        return {n: tuple(a + rank - n.meta["val"].dim() for a in d.axes(n)) for n in over}
    candidates = [{n: out[: len(d.axes(n))] for n in over}]
    if len(out) > 1:
        candidates.append({n: out[::-1][: len(d.axes(n))] for n in over})
        candidates.append({n: out[len(out) - len(d.axes(n)) :] for n in over})
    sizes = {s: v for s, v in d.at(0).items() if s != d.time}
    for axes in candidates:
        if commutes(node, axes, d.time, sizes, d.source.weights, resized):
            return axes
    return None
