"""What each operation needs of its operands for what is wanted of it.

The first of these that applies: a value that is the same whatever the sequence is copied; an operation that looks along the
time has its rule; a window that reaches back becomes a state, and everything of a computed value a growing one; a value that
depends on positions alone is computed for the positions at hand; every other operation has to treat each step by itself,
which is tried.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
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
from seqc.streaming.together import together

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
    if node in d.restarts:
        return _kept(d, node, demand) or d.restarts[node].plan(node, demand)
    if node.target is operator.getitem:
        return _item(d, node, demand)
    found = shifts.filled(d, node, demand)
    if found is not None:
        return found
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
    if not any(demand.modes) and not demand.at_end and any(d.axes(n) for n in _operands(node)):
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
    if not any(demand.modes) and not demand.at_end and any(d.axes(n) for n in _operands(source)):
        raise refuse(node, "it is known at the end of the sequence only, but is needed at each step of it")

    def write(new: Any) -> Any:
        return layers.item(d, new, index)

    if d.is_newest(node, demand) and not any(isinstance(m, (Everything, Recent)) for m in demand.modes):
        whole = (
            Demand(()) if layers.is_layer(d, source) else replace(demand, modes=()) if is_recurrence(source) else demand
        )
        return Plan(((source, whole),), write)
    return _kept(d, node, demand) or Plan(((source, demand),), write)


def _kept(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """A window that reaches back, or everything of a computed value: by a state."""
    for axis, mode in enumerate(demand.modes):
        if not isinstance(mode, Window) or mode.is_same(d.newest_of(node, axis)):
            continue
        if node in d.timed or mode.fill is not None:
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
        found = together(d, node, demand, _others(d), _inner)
        if found is not None:
            return found
        raise refuse(node, "it mixes the steps of the sequence in a way for which there is no rule")
    needs = []
    since = max((-d.newest_of(node, a).start for a in out), default=demand.since)
    for n in operands:
        if n not in axes:
            needs.append((n, d.newest(n, demand.at_end and not out, since)))
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
    inner = {n: _inner(d, n) for n in (node, *over)}
    if any(len(d.axes(n)) > len(out) for n in over) or None in inner.values():
        return None
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        rank = first(node.meta["val"]).dim()
        return {n: tuple(a + rank - n.meta["val"].dim() for a in d.axes(n)) for n in over}
    return next((axes for axes in _candidates(d, over, out) if _commutes(d, node, axes, inner)), None)


def _candidates(d: Derivation, over: list[fx.Node], out: tuple[int, ...]) -> list[dict[fx.Node, tuple[int, ...]]]:
    candidates = [{n: out[: len(d.axes(n))] for n in over}]
    if len(out) > 1:
        candidates.append({n: out[::-1][: len(d.axes(n))] for n in over})
        candidates.append({n: out[len(out) - len(d.axes(n)) :] for n in over})
    return candidates


# Sizes of the other dimensions that no other size is a multiple of.
_PRIMES = (5, 11, 13, 17, 19, 23)


def _commutes(d: Derivation, node: fx.Node, axes: dict[fx.Node, tuple[int, ...]], inner: Any) -> bool:
    return commutes(node, axes, d.time, _others(d), d.source.weights, resized, inner)


def _others(d: Derivation) -> dict[sympy.Symbol, int]:
    return dict(zip((dim.symbol for dim in d.source.dims if dim.symbol != d.time), _PRIMES, strict=False))


def _inner(d: Derivation, node: fx.Node) -> int | None:
    """How many elements of each step lie together where steps are merged with other axes in one; None where none fits."""
    known: dict[fx.Node, int | None] = d.shared("inner", dict)
    if node not in known:
        known[node] = _merged(d, node)
    return known[node]


def _merged(d: Derivation, node: fx.Node) -> int | None:
    out = d.axes(node)
    sizes = [sympy.expand(_torch.size_expr(first(node.meta["val"]).shape[a])) for a in out]
    if len(out) != 1 or (sizes[0] - d.time).is_number or node.op != "call_function":
        return 1
    operands = _operands(node)
    over = [n for n in operands if d.axes(n)]
    if not over or node.target is operator.getitem or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        found = {_inner(d, n) for n in over if len(d.axes(n)) == 1} or {1}
        return found.pop() if len(found) == 1 else None
    inner = {n: _inner(d, n) for n in over}
    if any(len(d.axes(n)) > 1 for n in over) or None in inner.values():
        return 1
    together = sizes[0].subs({**_others(d), d.time: 1})
    choices = sympy.divisors(together) if together.is_Integer and together > 0 else [1]
    for choice in choices:
        if any(_commutes(d, node, axes, inner | {node: int(choice)}) for axes in _candidates(d, over, out)):
            return int(choice)
    return None
