"""Recognises sums weighted by exponentials of scores, kept relative to the largest score: a running maximum m and
states that are multiplied by exp(m_before + decay - m) and to which exp(score - m) * value is added.

What is compared is exponents, as sums: however a product is spelled, those of its factors that read the maximum must
multiply to exactly one of these two exponentials.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from seqc.classify.coupled import State, settled
from seqc.classify.exponents import Exponents
from seqc.classify.forms import Form, Label, NotMultilinear, Term, renamed
from seqc.classify.operands import Operands
from seqc.classify.rewrite import Rewritten
from seqc.classify.rules import SUMS
from seqc.classify.running_maximum import Running, running
from seqc.classify.terms import Terms
from seqc.dependence import computed_from
from seqc.loop import Loop
from seqc.outside import Outside

aten = torch.ops.aten
Labels = tuple[Label | None, ...]


@dataclass(frozen=True)
class _Sum:
    """Carry ``index`` sums ``value``; ``labels`` are those of its axes, ``top_labels`` those of the maximum's axes."""

    index: int
    labels: Labels
    top_labels: Labels
    value: tuple[Term, ...]

    @property
    def counts(self) -> bool:
        """Whether it sums the weights themselves, one sum for each maximum."""
        return self.value == (Term(1.0),) and {*self.labels} - {None} == {*self.top_labels} - {None}


def as_softmax_scan(loop: Loop, index: int, outside: Outside) -> Rewritten:
    """Carry ``index`` as a running maximum, with the sums relative to it, or as the logarithm of a running sum.

    Raises NotMultilinear where it is neither.
    """
    top = running(loop, index)
    if top is None:
        raise NotMultilinear("it is no largest value so far")
    mark = loop.emit.mark()
    recognition = _Recognition(loop, outside, top)
    why, states = recognition.logarithm() if top.smooth else recognition.sums()
    if recognition.decay:
        why += ", with decay"
    return settled(loop, "softmax_scan", why, states, outside, mark)


class _Recognition:
    def __init__(self, loop: Loop, outside: Outside, top: Running) -> None:
        self.loop, self.top = loop, top
        mode, xs = loop.emit.mode, {inner: outer for outer, inner in loop.xs}
        others = [inner for _, inner in loop.carries if inner is not top.carry]
        reading = computed_from(others)
        if top.kept in reading or top.score in reading:
            raise NotMultilinear("the largest value so far is computed from another state")
        around = Terms(loop.gm, (), mode)
        flat = Terms(loop.gm, (), mode, around, expanded=SUMS)
        both = Terms(loop.body, {top.carry, top.following}, mode, flat, xs, expanded=SUMS)
        self.exponents = Exponents(both, top)
        self.sum_terms = Terms(loop.body, others, mode, around, xs, opened=[top.carry, top.following])
        self.ops = Operands(outside, self.sum_terms)
        self.terms = Terms(loop.body, {top.carry}, mode, around, xs)
        kept = self.terms.form(top.kept)
        states = [t for t in kept.terms if any(f.node is top.carry for f in t.factors)]
        self.labels = tuple(axis[0] if axis else None for axis in kept.axes)
        if [(t.scale, len(t.factors), t.factors[0].labels) for t in states] != [(1.0, 1, self.labels)]:
            raise NotMultilinear("the largest value so far is not kept, or shifted by a sum, but otherwise changed")
        self.decay = tuple(t for t in kept.terms if t not in states)
        _, score = self.terms.aligned(kept, self.terms.atom(top.score))
        self.score = score.terms

    def logarithm(self) -> tuple[str, dict[int, State]]:
        """The logarithm of the sum: its maximum plus the logarithm of the sum relative to it, which is 1 at first."""
        emit, top = self.loop.emit, _Sum(self.top.index, self.labels, self.labels, ())
        ones = emit(aten.ones_like.default, self.loop.carries[top.index][0])
        m, _, w = self._written(top, None, (ones, self.labels))
        steps = emit(aten.add.Tensor, m.steps, emit(aten.log.default, w.steps))
        final = emit(aten.add.Tensor, m.final, emit(aten.log.default, w.final))
        return "the logarithm of summed exponentials", {top.index: State(steps, final)}

    def sums(self) -> tuple[str, dict[int, State]]:
        """The maximum with the sums that are relative to it."""
        found = [s for index in range(len(self.loop.carries)) if (s := self._sum(index)) is not None]
        if not found:
            raise NotMultilinear("no state is a sum relative to the largest value so far")
        count = next((s for s in found if s.counts), None)
        values = [s for s in found if s is not count]
        if len(values) > 1:
            raise NotMultilinear(f"{len(values)} states, with values of their own, are relative to one largest value")
        value = values[0] if values else None
        wide = value or found[0]
        if count is None:
            start = self.loop.emit(aten.zeros_like.default, self.loop.carries[self.top.index][0]), wide.top_labels
        else:
            names = dict(zip(count.top_labels, wide.top_labels, strict=True))
            start = self.loop.carries[count.index][0], tuple(names[label] for label in count.labels)
        m, u, w = self._written(wide, value, start)
        states = {self.top.index: m}
        if value is not None:
            states[value.index] = u
        if count is not None:
            states[count.index] = w
        what = (
            "one score for each value" if set(wide.labels) == set(wide.top_labels) else "one score for several values"
        )
        return f"sums relative to a running maximum, {what}", states

    def _sum(self, index: int) -> _Sum | None:
        """Carry ``index`` as a sum relative to the maximum; None where it is none."""
        carry = self.loop.carries[index][1]
        if index == self.top.index:
            return None
        try:
            form = self.sum_terms.form(self.loop.next_carries[index])
        except NotMultilinear:
            return None
        if any(len(axis) > 1 for axis in form.axes):
            return None
        labels = tuple(axis[0] if axis else None for axis in form.axes)
        kept = [t for t in form.terms if self.sum_terms.has_state(t)]
        if [(t.scale, [f.labels for f in t.factors if f.node is carry]) for t in kept] != [(1.0, [labels])]:
            return None
        top_labels = self.exponents.of_old(f for f in kept[0].factors if f.node is not carry)
        added = [t for t in form.terms if t is not kept[0]]
        if top_labels is None or not added:
            return None
        value = [self.exponents.without_new(t, top_labels) for t in added]
        return None if None in value else _Sum(index, labels, top_labels, tuple(t for t in value if t is not None))

    def _written(self, wide: _Sum, value: _Sum | None, start: tuple[fx.Node, Labels]) -> tuple[State, State, State]:
        """The op, with axes in the order of ``wide``; ``start`` is the initial denominator with its labels."""
        emit, ops, carries = self.loop.emit, self.ops, self.loop.carries
        order = [label for label in wide.labels if label is not None]
        names = {a: b for a, b in zip(self.labels, wide.top_labels, strict=True) if a is not None and b is not None}
        score = self._total(_named(self.score, names), order)
        decay = self._total(_named(self.decay, names), order, once=True) if self.decay else None
        top, below = ops.ordered(carries[self.top.index][0], wide.top_labels, order), ops.ordered(*start, order)
        if value is None:  # an axis of no values
            score, top, below = (emit(aten.unsqueeze.default, n, -1) for n in (score, top, below))
            decay = None if decay is None else emit(aten.unsqueeze.default, decay, -1)
            values, above = (emit(aten.slice.Tensor, n, -1, 0, 0) for n in (score, top))
        else:
            values = self._total(value.value, order)
            above = ops.ordered(carries[value.index][0], value.labels, order)
        node = emit(torch.ops.seqc.softmax_scan.default, score, values, decay, top, above, below, self.loop.reverse)
        out = [emit(operator.getitem, node, i) for i in range(6)]
        labels = (wide.top_labels, wide.labels, start[1])

        def state(i: int) -> State:
            if value is None and i != 1:
                out[i], out[i + 3] = (emit(aten.squeeze.dim, n, -1) for n in (out[i], out[i + 3]))
            return State(self._restored(out[i], order, labels[i], 1), self._restored(out[i + 3], order, labels[i], 0))

        return state(0), State(out[1], out[4]) if value is None else state(1), state(2)

    def _total(self, terms: Sequence[Term], order: list[Label], once: bool = False) -> fx.Node:
        """The sum of ``terms`` as [trip, one axis per label]; with ``once``, [1, ...] where all are the same in each step."""
        first, *rest = (self.ops.product(term, [[label] for label in order], once=once) for term in terms)
        for node in rest:
            first = self.loop.emit(aten.add.Tensor, first, node)
        return first

    def _restored(self, node: fx.Node, order: list[Label], labels: Labels, lead: int) -> fx.Node:
        """From [lead axes, one axis per label of ``order``] to [lead axes, one axis per label of ``labels``]."""
        for axis in reversed([i for i, label in enumerate(order) if label not in labels]):
            node = self.loop.emit(aten.squeeze.dim, node, lead + axis)
        return self.ops.restored(node, [[label] for label in order if label in labels], labels, lead)


def _named(terms: Sequence[Term], names: dict[Label, Label]) -> list[Term]:
    return list(renamed(Form((), tuple(terms)), names).terms)
