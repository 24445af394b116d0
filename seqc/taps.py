"""Convolutions spelled out: products of slices of one padded tensor with weights per channel, added up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from seqc.convolutions import NotCausal, Sum
from seqc.emit import Emitter
from seqc.program import named_args
from seqc.windows import Window, size, window

aten = torch.ops.aten
Coefficient = fx.Node | float

# Two products and an addition are as fast where they stand, without a change of layout.
_FEWEST_TAPS = 3


@dataclass(frozen=True)
class _Term:
    """``node``, a tensor that differs by step, times ``factors``."""

    node: fx.Node
    factors: tuple[Coefficient, ...]


class Taps:
    """Finds such sums in a graph of which ``weights`` are the placeholders that no input changes."""

    def __init__(self, gm: fx.GraphModule, weights: Sequence[fx.Node]) -> None:
        self.fixed = set(weights)
        for node in gm.graph.nodes:
            pure = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
            if pure and node.all_input_nodes and all(n in self.fixed for n in node.all_input_nodes):
                self.fixed.add(node)

    def sum(self, node: fx.Node) -> Sum | None:
        """The convolution that ``node`` is; None where it is no sum of slices. Raises NotCausal where it stays."""
        if node.target is aten.sum.dim_IntList:
            return self._windows(node)
        if not _is_add(node) or any(_is_add(user) for user in node.users if len(node.users) == 1):
            return None
        rank = node.meta["val"].dim()
        terms = [self._term(addend) for addend in _addends(node)]
        for axis in range(rank) if rank == 3 else ():
            full = {i: t.node for i, t in enumerate(terms) if isinstance(t, _Term) and t.node.meta["val"].dim() == rank}
            lines = {i: window(term, axis) for i, term in full.items()}
            for i, line in lines.items():
                same = [j for j, other in lines.items() if _same_line(line, other)]
                if i == same[0] and len({lines[j].start for j in same}) > 1:
                    return self._of_taps(node, axis, terms, {j: lines[j] for j in same})
        return None

    def _term(self, addend: fx.Node | float) -> _Term | Coefficient:
        """A product of one tensor with weights and numbers; what no input changes is a coefficient."""
        if not isinstance(addend, fx.Node) or addend in self.fixed:
            return addend
        factors: list[Coefficient] = []
        while addend.target is aten.mul.Tensor:
            fixed = [a for a in addend.args if not isinstance(a, fx.Node) or a in self.fixed]
            if len(fixed) != 1:
                break
            (other,) = [a for a in addend.args if a is not fixed[0]]
            factors.append(fixed[0])  # type: ignore[arg-type]
            addend = other  # type: ignore[assignment]
        return _Term(addend, tuple(factors))

    def _of_taps(self, node: fx.Node, axis: int, terms: list[_Term | Coefficient], lines: dict[int, Window]) -> Sum:
        steps = {-line.start: terms[i] for i, line in lines.items()}
        dilation = math.gcd(*steps)
        if len(steps) < _FEWEST_TAPS:
            raise NotCausal("two taps are two products and an addition")
        if sorted(steps) != [dilation * i for i in range(len(lines))]:
            raise NotCausal("its taps are not evenly spaced up to the present step")
        first = next(iter(lines.values()))
        if any(line.length != first.steps for line in lines.values()) or size(node, axis) != first.steps:
            raise NotCausal("its slices are not proved to be as long as the sequence")
        taps = [steps[shift].factors for shift in sorted(steps, reverse=True)]  # type: ignore[union-attr]
        others = [term for i, term in enumerate(terms) if i not in lines]
        biases = [t for t in others if not isinstance(t, _Term)]
        rest = tuple(self._product(node, t) for t in others if isinstance(t, _Term))
        channel = self._channel(node, axis, [*(f for tap in taps for f in tap), *biases])
        dtypes = {f.meta["val"].dtype for f in [*(f for t in taps for f in t), *biases] if isinstance(f, fx.Node)}
        if dtypes - {first.source.meta["val"].dtype}:
            raise NotCausal("its weights are of another type")
        width = int(node.meta["val"].shape[channel])
        (batch,) = {0, 1, 2} - {axis, channel}
        layout = [0, 0, 0]
        layout[batch], layout[channel], layout[axis] = 0, 1, 2
        return Sum(
            node,
            first,
            (batch, channel, axis),
            tuple(layout),
            len(taps),
            dilation,
            0,
            lambda emit: _kernel(emit, taps, width, first.source),
            lambda emit: _added(emit, biases, width, first.source),
            rest,
        )

    def _product(self, node: fx.Node, term: _Term) -> fx.Node:
        """The addend that ``term`` was read off."""
        return next(a for a in _addends(node) if isinstance(a, fx.Node) and self._term(a) == term)

    def _channel(self, node: fx.Node, time: int, coefficients: Sequence[Coefficient]) -> int:
        """The one axis of ``node`` along which weights differ. Raises NotCausal where there are several."""
        rank = node.meta["val"].dim()
        found: set[int] = set()
        for coefficient in coefficients:
            shape = coefficient.meta["val"].shape if isinstance(coefficient, fx.Node) else ()
            found |= {i + rank - len(shape) for i, s in enumerate(shape) if s != 1}
        if not found:
            found = {i for i in range(rank) if i != time and isinstance(node.meta["val"].shape[i], int)}
        if len(found) != 1 or time in found or not isinstance(node.meta["val"].shape[min(found)], int):
            raise NotCausal("its weights do not differ along one axis beside time")
        (channel,) = found
        return int(channel)

    def _windows(self, node: fx.Node) -> Sum | None:
        """``(x.unfold(time, taps, 1) * weight).sum(-1)``."""
        arguments = named_args(node)
        product = arguments["self"]
        rank = product.meta["val"].dim()
        if product.target is not aten.mul.Tensor or rank != 4 or arguments["keepdim"]:
            return None
        if [d % rank for d in arguments["dim"]] != [rank - 1]:
            return None
        unfolded = [a for a in product.args if isinstance(a, fx.Node) and a.target is aten.unfold.default]
        weights = [a for a in product.args if isinstance(a, fx.Node) and a in self.fixed]
        if len(unfolded) != 1 or len(weights) != 1:
            return None
        x, axis, taps, step = (named_args(unfolded[0])[name] for name in ("self", "dimension", "size", "step"))
        shape = [1] * (rank - weights[0].meta["val"].dim()) + list(weights[0].meta["val"].shape)
        axis %= rank - 1
        line = window(x, axis)
        (channel, *others) = [i for i in range(rank - 1) if i != axis and shape[i] != 1] or [-1]
        if step != 1 or others or channel < 0 or shape[axis] != 1 or shape[-1] != taps or not line.whole:
            raise NotCausal("its windows do not meet one weight per channel and tap")
        (batch,) = {0, 1, 2} - {axis, channel}
        layout = [0, 0, 0]
        layout[batch], layout[channel], layout[axis] = 0, 1, 2
        return Sum(
            node,
            line,
            (batch, channel, axis),
            tuple(layout),
            taps,
            1,
            line.start + taps - 1,
            lambda emit: emit(aten.reshape.default, weights[0], [shape[channel], 1, taps]),
            lambda emit: None,
        )


def _is_add(node: fx.Node) -> bool:
    return node.target is aten.add.Tensor and bool(node.kwargs.get("alpha", 1) == 1)


def _addends(node: fx.Node) -> list[fx.Node | float]:
    """What is added up, sums that are read elsewhere too as a whole; zeros left out."""
    found: list[fx.Node | float] = []
    pending: list[fx.Node | float] = [node]
    while pending:
        part = pending.pop()
        if isinstance(part, fx.Node) and _is_add(part) and (part is node or len(part.users) == 1):
            pending += reversed(part.args)  # type: ignore[arg-type]
        elif part != 0:
            found.append(part)
    return found


def _same_line(a: Window, b: Window) -> bool:
    return (a.source, a.order, a.axis, a.state, a.state_order) == (b.source, b.order, b.axis, b.state, b.state_order)


def _kernel(emit: Emitter, taps: list[tuple[Coefficient, ...]], width: int, like: fx.Node) -> fx.Node:
    """[width, 1, taps] of the products of each tap's factors."""
    whole = _selected(taps, width)
    if whole is not None:
        return emit(aten.unsqueeze.default, whole, 1)
    rows = []
    for factors in taps:
        row = None
        for factor in factors or (1.0,):
            value = _vector(emit, factor, width, like)
            row = value if row is None else emit(aten.mul.Tensor, row, value)
        rows.append(row)
    return emit(aten.unsqueeze.default, emit(aten.stack.default, rows, 1), 1)


def _selected(taps: list[tuple[Coefficient, ...]], width: int) -> fx.Node | None:
    """The tensor [width, taps] of which tap j is column j; None where there is none."""
    bases = set()
    for j, factors in enumerate(taps):
        if len(factors) != 1 or not isinstance(factors[0], fx.Node) or factors[0].target is not aten.select.int:
            return None
        base, axis, index = factors[0].args
        rank = base.meta["val"].dim()  # type: ignore[union-attr]
        if rank != 2 or int(axis) % rank != 1 or index != j:  # type: ignore[arg-type]
            return None
        bases.add(base)
    base = bases.pop()
    return base if not bases and list(base.meta["val"].shape) == [width, len(taps)] else None  # type: ignore[union-attr, return-value]


def _added(emit: Emitter, biases: Sequence[Coefficient], width: int, like: fx.Node) -> fx.Node | None:
    total = None
    for bias in biases:
        value = _vector(emit, bias, width, like)
        total = value if total is None else emit(aten.add.Tensor, total, value)
    return total


def _vector(emit: Emitter, value: Coefficient, width: int, like: fx.Node) -> fx.Node:
    """[width]."""
    if not isinstance(value, fx.Node):
        return emit(aten.full.default, [width], value, dtype=like.meta["val"].dtype)
    shape = list(value.meta["val"].shape)
    if shape == [width]:
        return value
    if math.prod(shape) == width:
        return emit(aten.reshape.default, value, [width])
    return emit(aten.expand.default, emit(aten.reshape.default, value, [1]), [width])
