"""Values that depend on positions alone: computed for the positions at hand."""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.fx as fx

from seqc import _torch
from seqc.dependence import ancestors
from seqc.outside import is_size
from seqc.program import flat_args, named_args
from seqc.streaming.concrete import SHAPE_ONLY
from seqc.streaming.demand import Demand, Plan, Window
from seqc.streaming.derivation import Derivation

aten = torch.ops.aten

# Beyond this literal in a computation of positions, its values are not looked at: it is written operation by operation.
_LARGEST_LITERAL = 10_000
_NO_LITERAL = 2**31

FACTORIES: dict[Any, Any] = {
    aten.zeros.default: 0,
    aten.ones.default: 1,
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.full.default: "fill_value",
    aten.full_like.default: "fill_value",
    aten.new_full.default: "fill_value",
}


def closed_form(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """A value that is constant, or grows evenly with the position; found by looking at it. None where it is neither."""
    if node.target in FACTORIES:
        return filled(d, node, demand)
    if len(d.axes(node)) > 1 or is_size(node) or isinstance(node.meta["val"], (tuple, list)):
        return None
    if any(isinstance(m, Window) and m.fill is not None and m.start < 0 for m in demand.modes):
        return None
    found = _even(d, node)
    if found is None:
        return None
    base, slope = found

    def write() -> fx.Node:
        value = _constant(d, node, base)
        if slope:
            (axis,) = d.axes(node)
            at = d.positions(demand.modes[axis])
            shape = [-1 if a == axis else 1 for a in range(len(demand.modes))]
            steps = d.emit(aten.reshape.default, at, shape)
            if slope != 1:
                steps = d.emit(aten.mul.Tensor, steps, slope)
            value = d.emit(aten.add.Tensor, value, steps) if bool((base != 0).any()) else steps
            if value.meta["val"].dtype != node.meta["val"].dtype:
                value = d.emit(aten._to_copy.default, value, dtype=node.meta["val"].dtype)
        return d.emit(aten.expand.default, value, d.shape(node, demand))

    return Plan((), write)


def _constant(d: Derivation, node: fx.Node, base: torch.Tensor) -> fx.Node:
    if base.numel() == 1:
        return d.emit(aten.full.default, list(base.shape), base.item(), dtype=base.dtype)
    return d.constant(base, node.name)


def filled(d: Derivation, node: fx.Node, demand: Demand) -> Plan:
    """One number in every place."""
    value = FACTORIES[node.target]
    if value == "fill_value":
        value = named_args(node)[value]
    dtype = node.meta["val"].dtype
    return Plan((), lambda: d.emit(aten.full.default, d.shape(node, demand), value, dtype=dtype))


def _even(d: Derivation, node: fx.Node) -> tuple[torch.Tensor, int] | None:
    """(value at position 0, what each position adds), where the value is that at every length; axes of size 1 do not vary."""
    value = node.meta["val"]
    whole = value.dtype in (torch.int64, torch.int32, torch.bool) or node.target in (
        aten.arange.default,
        aten.arange.start,
    )
    if not whole:
        return None
    length = enough_steps(node)
    if length is None:
        return None
    try:
        length = d.within(length + 3) - 3
        short, longer = (d.concrete(n).value(node) for n in (length, length + 3))
    except Exception:  # what cannot be looked at is written operation by operation
        return None
    over = d.axes(node)
    for axis in over:
        if longer.narrow(axis, 0, short.shape[axis]).shape != short.shape:
            return None
        if _torch.size_expr(value.shape[axis]) != d.time and not _shifted(d, value.shape[axis]):
            return None
    if not torch.equal(short, longer[tuple(slice(0, n) for n in short.shape)]):
        return None
    slope = 0
    base = longer
    for axis in over:
        steps = longer.to(torch.float64).diff(dim=axis)
        if not bool((steps == steps.flatten()[0]).all()) or steps.flatten()[0] % 1:
            return None
        slope = int(steps.flatten()[0])
        base = base.narrow(axis, 0, 1)
    for axis, size in enumerate(value.shape):
        if isinstance(size, torch.SymInt) and axis not in over:
            if not torch.equal(base, base.narrow(axis, 0, 1).expand_as(base)):
                return None
            base = base.narrow(axis, 0, 1)
    return base.clone(), slope


def _shifted(d: Derivation, size: Any) -> bool:
    return bool(sympy.expand(_torch.size_expr(size) - d.time).is_Integer)


def enough_steps(node: fx.Node) -> int | None:
    """A length beyond every number that the computation compares positions with; None where there is a very large one."""
    numbers = [8]
    for n in ancestors([node]):
        if n.op == "call_function" and n.target not in SHAPE_ONLY:
            if n.target is aten.slice.Tensor:
                numbers += [size for size in n.args[0].meta["val"].shape if isinstance(size, int)]  # type: ignore[union-attr]
            leaves = [abs(a) for a in flat_args(n) if isinstance(a, (int, float)) and not isinstance(a, bool)]
            numbers += [int(a) for a in leaves if a < _NO_LITERAL]
    largest = max(numbers)
    return 2 * largest + 5 if largest <= _LARGEST_LITERAL else None


def lookup(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """A sequence read at its own positions: ``mask[batch, position]``, as masks made by vmap do."""
    source, indices = node.args
    assert isinstance(source, fx.Node) and isinstance(indices, (list, tuple))
    over = d.axes(source)
    if len(over) != 1 or source not in d.timed:
        return None
    result = node.meta["val"].dim()
    places: list[int] = []
    for axis, index in enumerate(indices):
        if not isinstance(index, fx.Node) or index in d.timed:
            return None
        place = _counts_along(d, index, axis in over)
        if place is None:
            return None
        places.append(place + result - index.meta["val"].dim())
    if len(places) != source.meta["val"].dim() or places != sorted(set(places)):
        return None
    mode = demand.modes[places[over[0]]]
    need = Demand(tuple(mode if a in over else None for a in range(len(places))))

    def write(new: fx.Node) -> fx.Node:
        for axis in range(result):
            if axis not in places:
                new = d.emit(aten.unsqueeze.default, new, axis)
        return d.emit(aten.expand.default, new, d.shape(node, demand))

    return Plan(((source, need),), write)


def _counts_along(d: Derivation, index: fx.Node, over_time: bool) -> int | None:
    """The one axis along which ``index`` counts 0, 1, 2 ...; None where it does not."""
    value = index.meta["val"]
    if over_time:
        found = _even(d, index)
        if found is None or found[1] != 1 or bool(found[0].any()):
            return None
        return d.axes(index)[0]
    numbers = d.concrete(8).value(index)
    wide = [a for a, n in enumerate(numbers.shape) if isinstance(value.shape[a], torch.SymInt) or n > 1]
    if len(wide) != 1 or not torch.equal(numbers.flatten(), torch.arange(numbers.numel())):
        return None
    return wide[0]
