"""The values of a loop's body as sums of products: the einsum normal form in which recurrences are recognised.

    S * g[:, None, None] + torch.einsum("bk,bv->bkv", k, v)        is  g[b] S[b,k,v] + k[b,k] v[b,v]
    S + beta * k.unsqueeze(-1) * (v - (S * k.unsqueeze(-1)).sum(1)).unsqueeze(1)
                              is  S[b,k,v] + beta[b] k[b,k] v[b,v] - beta[b] k[b,k] k[b,c] S[b,c,v]

However it is spelled (broadcasting, matmul, einsum, sums over an axis), a multilinear value has one such form, so what is
matched on the form holds for every spelling, also where a product is computed in front of the loop for all steps at once.
Values that read no state and are not products are atoms: they are the same numbers whatever the state is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from seqc.axes import PERMUTES, order_of
from seqc.emit import Emitter
from seqc.program import named_args, source_line
from seqc.verify import same_shape

aten = torch.ops.aten

Label = int
"""Names an index that factors share; its size is that of the axes it stands for."""

TIME: Label = 0
"""The index of steps: an axis of values computed in front of the loop, and of no value in its body."""

_MOST_TERMS = 32


@dataclass(frozen=True)
class Factor:
    """``node`` ** ``power`` with a label for each of its axes (None: an axis of size 1).

    The node is of the body, or of the graph around it; the latter has an axis labelled TIME if it differs by step.
    """

    node: fx.Node
    labels: tuple[Label | None, ...]
    power: int = 1

    @property
    def support(self) -> frozenset[Label]:
        return frozenset(label for label in self.labels if label is not None and label != TIME)


@dataclass(frozen=True)
class Term:
    """``scale`` times the product of the factors, summed over the labels that the value's axes do not have."""

    scale: float
    factors: tuple[Factor, ...] = ()

    @property
    def support(self) -> frozenset[Label]:
        return frozenset().union(*(f.support for f in self.factors))

    def times(self, scale: float) -> Term:
        return replace(self, scale=self.scale * scale)


@dataclass(frozen=True)
class Form:
    """A sum of terms. ``axes`` holds the labels of each axis: none for size 1, several where axes were merged."""

    axes: tuple[tuple[Label, ...], ...]
    terms: tuple[Term, ...]

    @property
    def labels(self) -> frozenset[Label]:
        return frozenset(label for axis in self.axes for label in axis)

    def times(self, scale: float) -> Form:
        return replace(self, terms=tuple(t.times(scale) for t in self.terms))


class NotMultilinear(Exception):
    """Why a value has no form: what is done to the state, and where."""


class Terms:
    """The forms of the values of ``gm``, linear in ``states``: the carries of a body, or values computed from them.

    ``xs`` are the body's placeholders for a step, with the values in front of the loop that they are a step of; the
    products that these are get forms by ``around``, the Terms of the graph around. ``gm`` may get new nodes (masks as
    numbers); those that nothing reads are dead code.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        states: Iterable[fx.Node],
        mode: Any,
        around: Terms | None = None,
        xs: Mapping[fx.Node, fx.Node] | None = None,
    ) -> None:
        self.states = frozenset(states)
        self.emit = Emitter(gm, mode)
        self.around, self.xs = around, dict(xs or {})
        self.sizes: dict[Label, Any] = around.sizes if around else {}
        self._count: Iterator[int] = around._count if around else itertools.count(TIME + 1)
        self._forms: dict[fx.Node, Form | NotMultilinear] = {}
        self._reading = _readers(gm, self.states)

    def reads(self, node: fx.Node) -> bool:
        """Whether ``node`` is a state or computed from one."""
        return node in self._reading

    def form(self, node: fx.Node) -> Form:
        """The form of ``node``. Raises NotMultilinear where it is no sum of products linear in the states."""
        pending = [node]
        while pending:
            current = pending[-1]
            waiting = [n for n in self._read_by_rule(current) if n not in self._forms]
            if current in self._forms or not waiting:
                pending.pop()
                if current not in self._forms:
                    self._forms[current] = self._derive(current)
            else:
                pending += waiting
        found = self._forms[node]
        if isinstance(found, NotMultilinear):
            raise found
        return found

    def _read_by_rule(self, node: fx.Node) -> list[fx.Node]:
        """The operands whose forms that of ``node`` is made of."""
        expanded = node.target in RULES and (self.reads(node) or node.target not in _ADDITIVE)
        return node.all_input_nodes if expanded and node not in self.states else []

    def atom(self, node: fx.Node) -> Form:
        """``node`` as one factor, with labels of its own."""
        shape = node.meta["val"].shape
        labels = [None if size == 1 else self.label(size) for size in shape]
        axes = tuple(() if label is None else (label,) for label in labels)
        return Form(axes, (Term(1.0, (Factor(node, tuple(labels)),)),))

    def name(self, node: fx.Node, form: Form) -> None:
        """Let ``node`` have ``form``, which reads a state."""
        self._forms[node] = form

    def argument(self, factor: Factor) -> Form:
        """The form of the argument of an elementwise ``factor``, its axes in the labels of the factor's."""
        node = factor.node.args[0]
        assert isinstance(node, fx.Node)
        inside = factor.node.graph is self.emit.graph
        terms = self if inside or self.around is None else self.around
        form = terms.renewed(terms.form(node))
        if len(form.axes) != len(factor.labels):
            raise NotMultilinear("an argument of another rank")
        pairs = zip(form.axes, factor.labels, strict=True)
        renames = {axis[0]: label for axis, label in pairs if len(axis) == 1 and label is not None}
        return _renamed(form, renames)

    def label(self, size: Any) -> Label:
        label = next(self._count)
        self.sizes[label] = size
        return label

    def _derive(self, node: fx.Node) -> Form | NotMultilinear:
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return NotMultilinear(f"{node.target} is no tensor")
        if node in self.xs:
            try:
                return self._step_of(self.xs[node])
            except NotMultilinear:
                return self.atom(node)
        if node in self.states or node.op == "placeholder":
            return self.atom(node)
        reads = self.reads(node)
        rule = RULES.get(node.target)
        try:
            if rule is None or (not reads and node.target in _ADDITIVE):
                raise NotMultilinear(f"{node.target} of the state")
            result = rule(self, node)
            if len(result.terms) > _MOST_TERMS:
                raise NotMultilinear(f"{node.target} makes more than {_MOST_TERMS} terms")
            return result
        except NotMultilinear as problem:
            if not reads:
                return self.atom(node)
            where = source_line(node)
            return problem if " at " in str(problem) or not where else NotMultilinear(f"{problem} at {where}")

    def _step_of(self, outer: fx.Node) -> Form:
        """The form of one step of ``outer``, a value of the graph around with time as axis 0."""
        assert self.around is not None
        form = self.around.form(outer)
        if not form.axes or len(form.axes[0]) != 1:
            raise NotMultilinear("no axis of steps of its own")
        return _renamed(Form(form.axes[1:], form.terms), {form.axes[0][0]: TIME})

    def operand(self, value: Any) -> Form:
        """The form of an argument: a node's, or that of a number."""
        if isinstance(value, fx.Node):
            if not isinstance(value.meta.get("val"), torch.Tensor):
                raise NotMultilinear("a size as a factor")
            return self.form(value)
        if isinstance(value, (int, float)):
            return Form((), (Term(float(value)),))
        raise NotMultilinear(f"an operand {value!r}")

    def has_state(self, term: Term) -> bool:
        return any(f.node in self.states for f in term.factors)

    def aligned(self, a: Form, b: Form) -> tuple[Form, Form]:
        """Both with the same axes, as broadcasting makes them; other labels of ``b`` are new."""
        b = self.renewed(b)
        rank = max(len(a.axes), len(b.axes))
        left, right = (((),) * (rank - len(f.axes)) + f.axes for f in (a, b))
        renames: dict[Label, Label] = {}
        axes = []
        for ours, theirs in zip(left, right, strict=True):
            if ours and theirs:
                if len(ours) != len(theirs):
                    raise NotMultilinear("axes merged in different ways")
                renames |= dict(zip(theirs, ours, strict=True))
            axes.append(ours or theirs)
        axes = [tuple(renames.get(label, label) for label in axis) for axis in axes]
        return Form(tuple(axes), a.terms), Form(tuple(axes), _renamed(b, renames).terms)

    def renewed(self, form: Form) -> Form:
        """``form`` with new labels throughout."""
        old = form.labels.union(*(t.support for t in form.terms))
        return _renamed(form, {label: self.label(self.sizes[label]) for label in sorted(old - {TIME})})

    def multiplied(self, a: Form, b: Form) -> Form:
        a, b = self.aligned(a, b)
        terms = []
        for left, right in itertools.product(a.terms, b.terms):
            if self.has_state(left) and self.has_state(right):
                raise NotMultilinear("a product of the state with itself")
            terms.append(Term(left.scale * right.scale, left.factors + right.factors))
        return Form(a.axes, tuple(terms))

    def summed(self, form: Form, axis: int, keep: bool = False) -> Form:
        """The sum over ``axis``."""
        axis %= len(form.axes)
        terms = form.terms
        for label in form.axes[axis]:
            size = self.sizes[label]
            if any(label not in t.support for t in terms):
                if not isinstance(size, int):
                    raise NotMultilinear("a sum over an axis along which a summand does not change")
                terms = tuple(t if label in t.support else t.times(size) for t in terms)
        rest = ((),) if keep else ()
        return Form(form.axes[:axis] + rest + form.axes[axis + 1 :], terms)


def _renamed(form: Form, renames: Mapping[Label, Label]) -> Form:
    def factor(f: Factor) -> Factor:
        return replace(f, labels=tuple(None if label is None else renames.get(label, label) for label in f.labels))

    terms = tuple(replace(t, factors=tuple(map(factor, t.factors))) for t in form.terms)
    return Form(tuple(tuple(renames.get(label, label) for label in axis) for axis in form.axes), terms)


def _readers(body: fx.GraphModule, states: frozenset[fx.Node]) -> set[fx.Node]:
    found = set(states)
    for node in body.graph.nodes:
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


Rule = Callable[[Terms, fx.Node], Form]


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
                zero_one = terms.emit(aten._to_copy.default, mask, dtype=dtype)
                if not when:
                    zero_one = terms.emit(aten.rsub.Scalar, zero_one, 1)
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


_ADDITIVE = frozenset({aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar,
                       aten.rsub.Tensor, aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
                       aten.lerp.Tensor, aten.lerp.Scalar, aten.linear.default, aten.addmm.default,
                       aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default,
                       aten.sum.dim_IntList, aten.einsum.default, aten.where.ScalarSelf, aten.where.ScalarOther})  # fmt: skip
"""Operators that are expanded only on values that read the state: elsewhere their result is an atom."""

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
    aten.sum.dim_IntList: _sum,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default), _matmul),
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.einsum.default: _einsum,
}
