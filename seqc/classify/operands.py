"""Products of a body's values, written outside the loop for all steps, with their axes in a wanted order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from seqc import _torch
from seqc.batch import Value
from seqc.classify.forms import TIME, Factor, Label, NotMultilinear, Term
from seqc.classify.terms import Terms
from seqc.emit import Emitter
from seqc.outside import Outside

aten = torch.ops.aten

Groups = Sequence[Sequence[Label]]
"""The labels of each axis wanted; several become one axis, none an axis of size 1."""


class Operands:
    """Writes the operands of a dialect op, outside of the loop that it replaces."""

    def __init__(self, outside: Outside, terms: Terms) -> None:
        self.outside, self.terms = outside, terms
        self.emit = outside.loop.emit

    def product(self, term: Term, groups: Groups, full: bool = False, once: bool = False) -> fx.Node:
        """``term`` as [trip, one axis per group]; an axis along which it is constant is of size 1 unless ``full``.

        With ``once`` it is [1, one axis per group] where it is the same in each step.
        """
        order = [label for group in groups for label in group]
        if stray := term.support - set(order):
            raise NotMultilinear(f"a factor has {len(stray)} axes that the state has not")
        result: Value | None = None
        for factor in sorted(term.factors, key=lambda f: len(f.support)):
            value = self._aligned(factor, order)
            result = value if result is None else self._times(result, value)
        if result is None:
            result = Value(self.emit(aten.ones.default, [1] * len(order), dtype=self._dtype()), False)
        if term.scale != 1:
            result = Value(self.emit(aten.mul.Tensor, result.node, term.scale), result.batched)
        single = once and not result.batched
        steps = self.emit(aten.unsqueeze.default, result.node, 0) if single else self.every_step(result)
        return self.grouped(steps, groups, full)

    def fixed(self, term: Term, order: Sequence[Label]) -> fx.Node:
        """``term``, the same in each step, as [one axis per label]."""
        values = [self._aligned(factor, order) for factor in term.factors]
        if not values or any(value.batched for value in values) or term.support != set(order):
            raise NotMultilinear("rates that are not one constant for each channel and state")
        node = values[0].node
        for value in values[1:]:
            node = self.emit(aten.mul.Tensor, node, value.node)
        return node if term.scale == 1 else self.emit(aten.mul.Tensor, node, term.scale)

    def varies(self, factor: Factor) -> bool:
        """Whether ``factor`` differs from step to step."""
        if factor.node.graph is self.emit.graph:
            return TIME in factor.labels
        value = self.outside.value(factor.node)
        return value is None or value.batched

    def vector(self, term: Term, label: Label) -> fx.Node:
        """``term``, the same in each step, as [size of ``label``]."""
        size = self.size(label)
        node: fx.Node | None = None
        for factor in term.factors:
            value = self._aligned(factor, [label])
            node = value.node if node is None else self.emit(aten.mul.Tensor, node, value.node)
        if node is None:
            return self.emit(aten.full.default, [size], term.scale, dtype=self._dtype())
        node = node if term.scale == 1 else self.emit(aten.mul.Tensor, node, term.scale)
        return node if label in term.support else self.emit(aten.expand.default, node, [size])

    def coefficient(self, term: Term, order: Sequence[Label]) -> fx.Node:
        """``term``, the same in each step, as [one axis per label of ``order``], summed over its other labels."""
        summed = sorted(term.support - set(order))
        node = self.emit(aten.full.default, [self.size(label) for label in order], term.scale, dtype=self._dtype())
        product: fx.Node | None = None
        for factor in term.factors:
            value = self._aligned(factor, [*order, *summed])
            product = value.node if product is None else self.emit(aten.mul.Tensor, product, value.node)
        if product is None:
            return node
        if summed:
            product = self.emit(aten.sum.dim_IntList, product, list(range(len(order), len(order) + len(summed))))
        return self.emit(aten.mul.Tensor, node, product)

    def every_step(self, value: Value) -> fx.Node:
        """``value`` with the time axis, repeated where it is the same in each step."""
        if value.batched:
            return value.node
        lead = self.emit(aten.unsqueeze.default, value.node, 0)
        return self.emit(aten.expand.default, lead, [self.outside.loop.trip, *([-1] * value.rank)])

    def grouped(self, node: fx.Node, groups: Groups, full: bool) -> fx.Node:
        """From [trip, one axis per label] to [trip, one axis per group]; groups of several labels are full."""
        order = [label for group in groups for label in group]
        expand = [full or len(group) > 1 for group in groups for _ in group]
        shape = node.meta["val"].shape[1:]
        small = [e and size == 1 and self.terms.sizes[o] != 1 for e, size, o in zip(expand, shape, order, strict=True)]
        if any(small):
            sizes = [self.size(label) if s else -1 for s, label in zip(small, order, strict=True)]
            node = self.emit(aten.expand.default, node, [-1, *sizes])
        if all(len(group) == 1 for group in groups):
            return node
        shape = node.meta["val"].shape[1:]
        sizes = []
        for group in groups:
            known = [shape[order.index(label)] for label in group]
            sizes.append(self._merged(group, known))
        return self.emit(aten.reshape.default, node, [self.outside.loop.trip, *sizes])

    def _merged(self, group: Sequence[Label], sizes: list[Any]) -> Any:
        if all(isinstance(size, int) for size in sizes):
            return math.prod(sizes)
        if len(group) > 1:
            raise NotMultilinear("axes of free size would have to be merged")
        return self.size(group[0])

    def size(self, label: Label) -> Any:
        """The size of ``label`` as an int or a node outside the loop."""
        size = self.terms.sizes[label]
        if isinstance(size, int):
            return size
        node = self.outside.size_of(_torch.size_expr(size))
        if node is None:
            raise NotMultilinear("a size is not known outside the loop")
        return node

    def state(self, outer: fx.Node, labels: Sequence[Label | None], groups: Groups) -> fx.Node:
        """The initial state [one axis per label] as [one axis per group]."""
        order = [label for group in groups for label in group]
        node = self.ordered(outer, labels, order)
        if all(len(group) == 1 for group in groups):
            return node
        shape = node.meta["val"].shape
        sizes = [self._merged(group, [shape[order.index(label)] for label in group]) for group in groups]
        return self.emit(aten.reshape.default, node, sizes)

    def restored(self, node: fx.Node, groups: Groups, labels: Sequence[Label | None], lead: int) -> fx.Node:
        """Back from [lead axes, one axis per group] to [lead axes, one axis per label]."""
        order = [label for group in groups for label in group]
        if not all(len(group) == 1 for group in groups):
            sizes = [self.size(label) for label in order]
            trip = [self.outside.loop.trip] if lead else []
            node = self.emit(aten.reshape.default, node, [*trip, *sizes])
        dims = [*range(lead), *(lead + order.index(label) for label in labels if label is not None)]
        if dims != sorted(dims):
            node = self.emit(aten.permute.default, node, dims)
        for i, label in enumerate(labels):
            if label is None:
                node = self.emit(aten.unsqueeze.default, node, lead + i)
        return node

    def _aligned(self, factor: Factor, order: Sequence[Label]) -> Value:
        """``factor`` as [time where it differs by step, one axis per label]."""
        if len(factor.support) != len([label for label in factor.labels if label not in (None, TIME)]):
            raise NotMultilinear("a diagonal of a factor")
        node, labels = factor.node, factor.labels
        if node.graph is not self.emit.graph:
            value = self.outside.value(node)
            if value is None:
                raise NotMultilinear(f"there is no rule to compute {node.target} for all steps at once")
            node, labels = value.node, ((TIME, *labels) if value.batched else labels)
        batched = TIME in labels
        node = self.ordered(node, labels, [TIME, *order] if batched else order)
        if factor.power < 0:
            node = self.emit(aten.reciprocal.default, node)
        return Value(node, batched)

    def ordered(self, node: fx.Node, labels: Sequence[Label | None], order: Sequence[Label]) -> fx.Node:
        return ordered(self.emit, node, labels, order)

    def _times(self, a: Value, b: Value) -> Value:
        return Value(self.emit(aten.mul.Tensor, a.node, b.node), a.batched or b.batched)

    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.outside.loop.carries[0][1].meta["val"].dtype
        return dtype


def ordered(emit: Emitter, node: fx.Node, labels: Sequence[Label | None], order: Sequence[Label]) -> fx.Node:
    """``node`` with one axis per label of ``order``, of size 1 where it has none."""
    present = [label for label in labels if label is not None]
    for axis in reversed([i for i, label in enumerate(labels) if label is None]):
        node = emit(aten.squeeze.dim, node, axis)
    dims = [present.index(label) for label in order if label in present]
    if dims != sorted(dims):
        node = emit(aten.permute.default, node, dims)
    for i, label in enumerate(order):
        if label not in present:
            node = emit(aten.unsqueeze.default, node, i)
    return node
