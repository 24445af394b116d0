"""How the form of a value follows from those of its operands, by operator."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from seqc.axes import PERMUTES, order_of
from seqc.classify.forms import Factor, Form, Label, NotMultilinear
from seqc.pieces import piece
from seqc.program import named_args
from seqc.verify import same_shape

if TYPE_CHECKING:
    from seqc.classify.terms import Terms

aten = torch.ops.aten

Rule = Callable[["Terms", fx.Node], Form]


def _mul(terms: Terms, node: fx.Node) -> Form:
    return terms.multiplied(terms.operand(node.args[0]), terms.operand(node.args[1]))


def _div(terms: Terms, node: fx.Node) -> Form:
    if len(node.args) > 2 or node.kwargs:
        raise NotMultilinear("a rounded division")
    top, bottom = node.args
    if not isinstance(bottom, fx.Node):
        return terms.operand(top).times(1 / float(bottom))  # type: ignore[arg-type]
    if terms.reads(bottom):
        raise NotMultilinear("a division by the state")
    below = terms.atom(bottom)
    inverse = tuple(replace(t, factors=tuple(replace(f, power=-f.power) for f in t.factors)) for t in below.terms)
    return terms.multiplied(terms.operand(top), replace(below, terms=inverse))


def _added(sign: float, swap: bool = False) -> Rule:
    def rule(terms: Terms, node: fx.Node) -> Form:
        left, right = (terms.operand(a) for a in (reversed(node.args[:2]) if swap else node.args[:2]))
        a, b = terms.aligned(left, right.times(sign * float(named_args(node).get("alpha") or 1)))
        return Form(a.axes, a.terms + b.terms)

    return rule


def _negated(terms: Terms, node: fx.Node) -> Form:
    return terms.operand(node.args[0]).times(-1)


def _lerp(terms: Terms, node: fx.Node) -> Form:
    start, end, weight = (terms.operand(a) for a in node.args[:3])
    a, b = terms.aligned(start, terms.multiplied(weight, end))
    a, c = terms.aligned(Form(a.axes, a.terms + b.terms), terms.multiplied(weight, start).times(-1))
    return Form(a.axes, a.terms + c.terms)


def _chosen(terms: Terms, node: fx.Node) -> Form:
    """where(mask, x, y), with a mask that reads no state: mask * x + (1 - mask) * y, exactly 0 where not chosen."""
    if node.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        other, mask, value = node.args
        branches = [(value, True), (other, False)]
    else:
        mask, *values = node.args
        branches = list(zip(values, (True, False), strict=True))
    assert isinstance(mask, fx.Node)
    if terms.reads(mask):
        raise NotMultilinear("a choice that depends on the state")
    dtype = node.meta["val"].dtype
    result: Form | None = None
    with terms.emit.before(node):
        for value, when in branches:
            if isinstance(value, fx.Node) and not terms.reads(value):
                full = terms.emit(aten.zeros_like.default, value)
                pair = (value, full) if when else (full, value)
                part = terms.atom(terms.emit(aten.where.self, mask, *pair))
            else:
                chosen = mask if when else terms.emit(aten.logical_not.default, mask)
                zero_one = terms.emit(aten._to_copy.default, chosen, dtype=dtype)
                part = terms.multiplied(terms.atom(zero_one), terms.operand(value))
            if result is None:
                result = part
            else:
                a, b = terms.aligned(result, part)
                result = Form(a.axes, a.terms + b.terms)
    assert result is not None
    return result


def _same(terms: Terms, node: fx.Node) -> Form:
    source = node.args[0]
    if source.meta["val"].dtype != node.meta["val"].dtype:  # type: ignore[union-attr]
        raise NotMultilinear(f"a cast to {node.meta['val'].dtype}")
    return terms.operand(source)


def _unsqueezed(terms: Terms, node: fx.Node) -> Form:
    form = terms.operand(node.args[0])
    at = int(node.args[1]) % (len(form.axes) + 1)  # type: ignore[arg-type]
    return replace(form, axes=(*form.axes[:at], (), *form.axes[at:]))


def _squeezed(terms: Terms, node: fx.Node) -> Form:
    form = terms.operand(node.args[0])
    dims = node.args[1] if isinstance(node.args[1], (tuple, list)) else [node.args[1]]
    gone = {int(d) % len(form.axes) for d in dims if form.axes[int(d)] == ()}  # type: ignore[arg-type]
    return replace(form, axes=tuple(axis for i, axis in enumerate(form.axes) if i not in gone))


def _permuted(terms: Terms, node: fx.Node) -> Form:
    form = terms.operand(node.args[0])
    return replace(form, axes=tuple(form.axes[i] for i in order_of(node)))


def _reshaped(terms: Terms, node: fx.Node) -> Form:
    """To any shape that keeps, merges or splits again whole axes."""
    form = terms.operand(node.args[0])
    given = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    labels = []
    for whole, merged in zip(given, form.axes, strict=True):
        labels += list(merged) if merged or whole == 1 else [terms.label(whole)]
    axes: list[tuple[Label, ...]] = []
    for wanted in node.meta["val"].shape:
        axis: tuple[Label, ...] = ()
        size: Any = 1
        while not same_shape((size,), (wanted,)):
            if not labels:
                raise NotMultilinear("a reshape that cuts an axis")
            size = size * terms.sizes[labels[0]]
            axis += (labels.pop(0),)
        axes.append(axis)
    if labels:
        raise NotMultilinear("a reshape that cuts an axis")
    return replace(form, axes=tuple(axes))


def _expanded(terms: Terms, node: fx.Node) -> Form:
    form = terms.operand(node.args[0])
    shape = node.meta["val"].shape
    axes = ((),) * (len(shape) - len(form.axes)) + form.axes
    full = [axis if axis or size == 1 else (terms.label(size),) for axis, size in zip(axes, shape, strict=True)]
    return replace(form, axes=tuple(full))


def _sum(terms: Terms, node: fx.Node) -> Form:
    named = named_args(node)
    form = terms.operand(node.args[0])
    rank = len(form.axes)
    dims = sorted({int(d) % rank for d in named.get("dim") or range(rank)}, reverse=True)
    for dim in dims:
        form = terms.summed(form, dim, bool(named.get("keepdim")))
    return form


def _matmul(terms: Terms, node: fx.Node) -> Form:
    return _product(terms, terms.operand(node.args[0]), terms.operand(node.args[1]))


def _product(terms: Terms, a: Form, b: Form) -> Form:
    vector_a, vector_b = len(a.axes) == 1, len(b.axes) == 1
    if vector_a:
        a = replace(a, axes=((), *a.axes))
    if vector_b:
        b = replace(b, axes=(*b.axes, ()))
    a = replace(a, axes=(*a.axes, ()))  # [..., M, K, 1]
    b = replace(b, axes=(*b.axes[:-2], (), *b.axes[-2:]))  # [..., 1, K, N]
    form = terms.summed(terms.multiplied(a, b), -2)
    axes = form.axes
    axes = axes[:-2] + (() if vector_a else (axes[-2],)) + (() if vector_b else (axes[-1],))
    return replace(form, axes=axes)


def _linear(terms: Terms, node: fx.Node) -> Form:
    weight = terms.operand(node.args[1])
    weight = replace(weight, axes=tuple(reversed(weight.axes)))
    form = _product(terms, terms.operand(node.args[0]), weight)
    bias = node.args[2] if len(node.args) > 2 else None
    if bias is None:
        return form
    a, b = terms.aligned(form, terms.operand(bias))
    return Form(a.axes, a.terms + b.terms)


def _addmm(terms: Terms, node: fx.Node) -> Form:
    named = named_args(node)
    product = _product(terms, terms.operand(node.args[1]), terms.operand(node.args[2])).times(float(named["alpha"]))
    a, b = terms.aligned(product, terms.operand(node.args[0]).times(float(named["beta"])))
    return Form(a.axes, a.terms + b.terms)


def _einsum(terms: Terms, node: fx.Node) -> Form:
    equation, operands = node.args[:2]
    left, arrow, right = str(equation).replace(" ", "").partition("->")
    if not arrow or "." in left or any(len(set(part)) != len(part) for part in left.split(",")):
        raise NotMultilinear(f"einsum {equation!r}")
    letters = [*right, *sorted(set(left) - set(right) - {","})]
    result: Form | None = None
    for part, operand in zip(left.split(","), operands, strict=True):  # type: ignore[arg-type]
        form = terms.operand(operand)
        axes = tuple(form.axes[part.index(c)] if c in part else () for c in letters)
        form = replace(form, axes=axes)
        result = form if result is None else terms.multiplied(result, form)
    assert result is not None
    for _ in letters[len(right) :]:
        result = terms.summed(result, -1)
    return result


def _sliced(terms: Terms, node: fx.Node) -> Form:
    """A slice of a value, or one part of a split: that of every factor which the axis is one of."""
    cut = piece(node)
    if cut is None:
        raise NotMultilinear(f"a result of {node.target}, which is no part of fixed place of a tensor")
    source, dim = cut.source, cut.axis
    form = terms.operand(source)
    axis = form.axes[dim]
    if same_shape(source.meta["val"].shape, node.meta["val"].shape):
        return form
    if len(axis) != 1:
        raise NotMultilinear("a part of a broadcast or merged axis")
    size = node.meta["val"].shape[dim]
    new = None if size == 1 else terms.label(size)
    parts: dict[Factor, Factor] = {}
    with terms.emit.before(node):
        for factor in dict.fromkeys(f for t in form.terms for f in t.factors if axis[0] in f.support):
            if factor.node in terms.states or factor.node.graph is not terms.emit.graph:
                raise NotMultilinear("a part of the state")
            part = terms.emit(aten.slice.Tensor, factor.node, factor.labels.index(axis[0]), cut.start, cut.end)
            labels = tuple(new if label == axis[0] else label for label in factor.labels)
            parts[factor] = Factor(part, labels, factor.power)
    axes = list(form.axes)
    axes[dim] = () if new is None else (new,)
    return Form(tuple(axes), tuple(replace(t, factors=tuple(parts.get(f, f) for f in t.factors)) for t in form.terms))


ADDITIVE = frozenset({
    operator.getitem, aten.slice.Tensor, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar,
    aten.rsub.Scalar, aten.rsub.Tensor, aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
    aten.lerp.Tensor, aten.lerp.Scalar, aten.linear.default, aten.addmm.default, aten.matmul.default,
    aten.mm.default, aten.bmm.default, aten.mv.default, aten.sum.dim_IntList, aten.einsum.default,
    aten.where.ScalarSelf, aten.where.ScalarOther,
})  # fmt: skip
"""Operators that are expanded only on values that read the state: elsewhere their result is an atom."""

SUMS = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar,
                   aten.rsub.Tensor})  # fmt: skip
"""Those of them that only add."""

RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _mul),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _div),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _added(1.0)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _added(-1.0)),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), _added(-1.0, swap=True)),
    aten.neg.default: _negated,
    **dict.fromkeys((aten.lerp.Tensor, aten.lerp.Scalar), _lerp),
    **dict.fromkeys((aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther), _chosen),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _chosen),
    **dict.fromkeys((aten.clone.default, aten.alias.default, aten._to_copy.default, aten.contiguous.default), _same),
    aten.unsqueeze.default: _unsqueezed,
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.dims), _squeezed),
    **dict.fromkeys(PERMUTES, _permuted),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), _reshaped),
    aten.expand.default: _expanded,
    aten.slice.Tensor: _sliced,
    operator.getitem: _sliced,
    aten.sum.dim_IntList: _sum,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default), _matmul),
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.einsum.default: _einsum,
}
