"""Time-invariant state spaces: states whose coefficients are computed from weights alone, one input and output per channel."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from seqc.classify.affine import same_factors
from seqc.classify.forms import TIME, Factor, Form, Label, NotMultilinear, Term, renamed
from seqc.classify.kinds import coupled
from seqc.classify.operands import Operands
from seqc.classify.rewrite import Rewritten
from seqc.classify.terms import Terms
from seqc.dependence import ancestors, computed_from
from seqc.loop import Loop
from seqc.outside import Outside

aten = torch.ops.aten


class NotInvariant(NotMultilinear):
    """The coefficients of the state differ from step to step or call to call, or there is one state per channel only."""


@dataclass(frozen=True)
class _Sum:
    """A next state or the result: ``kept`` holds (term, carry, the labels at which it is read), ``added`` reads no state."""

    kept: tuple[tuple[Term, fx.Node, tuple[Label | None, ...]], ...]
    added: tuple[Term, ...]


def as_lti_scan(loop: Loop, index: int, outside: Outside, inputs: Sequence[fx.Node]) -> Rewritten:
    """Carry ``index``, with those that it is coupled with, as a ``seqc::lti_scan``.

    ``inputs`` are the model's; what is computed from none of them is the same in each call. Raises NotInvariant where the
    system is not time-invariant, and NotMultilinear where it is, but of another form.
    """
    return _LtiScan(loop, coupled(loop, index), outside, inputs).rewritten()


class _LtiScan:
    def __init__(self, loop: Loop, group: Sequence[int], outside: Outside, inputs: Sequence[fx.Node]) -> None:
        self.loop, self.group, self.outside = loop, list(group), outside
        self.inputs = set(inputs)
        self.states = [loop.carries[i][1] for i in group]
        self.emit = loop.emit
        around = Terms(loop.gm, (), loop.emit.mode)
        xs = {p: x for x, p in loop.xs}
        self.terms = Terms(loop.body, (inner for _, inner in loop.carries), loop.emit.mode, around, xs)
        self.ops = Operands(outside, self.terms)

    def rewritten(self) -> Rewritten:
        mark = self.emit.mark()
        forms = [self.terms.form(self.loop.next_carries[i]) for i in self.group]
        self.labels = _single(forms[0])
        following = [self._next(form) for form in forms]
        self._require_constant(following)
        result = self._result()
        read, axes = self._read(self.terms.form(self.loop.results[result][0]))
        self._require_constant([read])
        self._name_axes(axes, following)
        sums = [*(self._in_place(s) for s in following), self._in_place(read, reads=True)]
        self._divide(axes, sums)
        if self.count == 1:
            raise NotInvariant("one state per channel")
        signal = self._signal([term for s in sums for term in s.added])
        return self._write(sums[:-1], sums[-1], signal, result, axes, mark)

    def _next(self, form: Form) -> _Sum:
        """The terms of a next state in the labels of the first."""
        form = self.terms.renewed(form)
        return self._sum(renamed(form, dict(zip(_single(form), self.labels, strict=True))))

    def _read(self, form: Form) -> tuple[_Sum, tuple[Label, ...]]:
        """The terms of the result, in the labels of the states as far as it has their axes, and the labels of its axes."""
        form = self.terms.renewed(form)
        found, axes = self._sum(form), _single(form)
        if not found.kept:
            raise NotMultilinear("the result does not read the state")
        _, _, labels = found.kept[0]
        renames = {theirs: ours for theirs, ours in zip(labels, self.labels, strict=True) if theirs in axes}
        if set(axes) != set(renames):
            raise NotMultilinear("the result has axes that the state has not")
        return self._sum(renamed(form, renames)), tuple(renames[label] for label in axes)

    def _sum(self, form: Form) -> _Sum:
        kept, added = [], []
        for term in form.terms:
            state = next((f for f in term.factors if f.node in self.terms.states), None)
            if state is None:
                added.append(term)
            elif state.node not in self.states:
                raise NotMultilinear("it reads another state")
            else:
                rest = replace(term, factors=tuple(f for f in term.factors if f is not state))
                kept.append((rest, state.node, state.labels))
        return _Sum(tuple(kept), tuple(added))

    def _result(self) -> int:
        """The one result that is computed from the states."""
        loop = self.loop
        reading = computed_from([*self.states, *(loop.next_carries[i] for i in self.group)])
        found = [i for i, (value, _) in enumerate(loop.results) if value in reading and i not in self.group]
        if any(i < len(loop.carries) for i in found):
            raise NotMultilinear("another state is computed from it")
        if len(found) != 1:
            raise NotMultilinear(f"{len(found)} results are computed from it")
        return found[0]

    def _require_constant(self, sums: Sequence[_Sum]) -> None:
        if any(not self._constant(f) for s in sums for term, _, _ in s.kept for f in term.factors):
            raise NotInvariant("a coefficient of the state is computed from the input")

    def _constant(self, factor: Factor) -> bool:
        """Whether ``factor`` is computed from weights alone, the same in each step."""
        if factor.node.graph is self.emit.graph:
            return TIME not in factor.labels and not ancestors([factor.node]) & self.inputs
        value = self.outside.value(factor.node)
        return value is not None and not value.batched and not ancestors([value.node]) & self.inputs

    def _name_axes(self, axes: Sequence[Label], following: Sequence[_Sum]) -> None:
        """Tell apart the states' axes that the result sums over: along which elements depend on each other, and others."""
        mixed = {
            place
            for s in following
            for _, _, labels in s.kept
            for place, (ours, theirs) in enumerate(zip(self.labels, labels, strict=True))
            if ours != theirs
        }
        if any(self.labels[place] in axes for place in mixed):
            raise NotMultilinear("elements are mixed that the result keeps apart")
        if len(mixed) > 1:
            raise NotMultilinear("elements are mixed along several axes")
        self.mixed = [self.labels[place] for place in mixed]
        self.before = [self.terms.label(self.terms.sizes[label]) for label in self.mixed]
        self.blocks = [label for label in self.labels if label not in axes and label not in self.mixed]
        self.count = len(self.group) * math.prod(self._size(label) for label in (*self.blocks, *self.mixed))

    def _in_place(self, s: _Sum, reads: bool = False) -> _Sum:
        """With the labels at which states are read: those of the states, but ``before`` where elements are mixed."""
        kept = []
        for term, carry, labels in s.kept:
            renames: dict[Label, Label] = {}
            for ours, theirs in zip(self.labels, labels, strict=True):
                if theirs is None or (theirs != ours and theirs in self.labels):
                    raise NotMultilinear("the state is read at another place")
                if ours in self.mixed and (reads or theirs != ours):
                    renames[theirs] = self.before[0]
                elif theirs != ours:
                    renames[theirs] = ours
            (renewed,) = renamed(Form((), (term,)), renames).terms
            kept.append((renewed, carry, tuple(renames.get(x, x) for x in labels if x is not None)))
        return _Sum(tuple(kept), s.added)

    def _divide(self, axes: Sequence[Label], sums: Sequence[_Sum]) -> None:
        """The result's axes as batch, along which all systems are the same, and channels."""
        depends: set[Label] = set()
        for s in sums:
            for term in (*(t for t, _, _ in s.kept), *(self._split(t)[0] for t in s.added)):
                depends |= term.support
        self.batch: list[Label] = []
        self.channels: list[Label] = []
        for label in self.labels:
            if label not in axes or label is None:
                continue
            shared = label not in depends and (not self.batch or not isinstance(self.terms.sizes[label], int))
            (self.batch if shared else self.channels).append(label)

    def _split(self, term: Term) -> tuple[Term, tuple[Factor, ...]]:
        """What of ``term`` is computed from weights alone, and the other factors."""
        constant = tuple(f for f in term.factors if self._constant(f))
        return replace(term, factors=constant), tuple(f for f in term.factors if f not in constant)

    def _signal(self, added: Sequence[Term]) -> Term:
        """The one input of each channel, that all ``added`` terms hold."""
        signals = [self._split(term)[1] for term in added]
        if not signals:
            raise NotMultilinear("nothing is added to the state")
        if not all(signals):
            raise NotMultilinear("a constant is added to the state")
        if not all(same_factors(signal, signals[0]) for signal in signals):
            raise NotMultilinear("several inputs are added to the state")
        signal = Term(1.0, signals[0])
        if not signal.support <= {*self.batch, *self.channels}:
            raise NotMultilinear("each of the states has an input of its own")
        return signal

    def _write(
        self, following: Sequence[_Sum], read: _Sum, signal: Term, result: int, axes: Sequence[Label], mark: int
    ) -> Rewritten:
        emit, ops, loop = self.emit, self.ops, self.loop
        rows = [self._beside([self._transition(s, carry) for carry in self.states], -1) for s in following]
        transition = self._beside(rows, -2)
        entering = self._beside([self._vector(s.added, self.mixed) for s in following], -1)
        leaving = self._beside(
            [self._vector([t for t, c, _ in read.kept if c is carry], self.before) for carry in self.states], -1
        )
        through = self._total(read.added, self.channels, [self._product(self.channels)])
        u = ops.product(signal, [self.batch, self.channels], full=True)
        groups = [self.batch, self.channels, self.blocks, self.mixed]
        state = self._beside([ops.state(loop.carries[i][0], self.labels, groups) for i in self.group], -1)
        call = emit(torch.ops.seqc.lti_scan.default, transition, entering, leaving, through, u, state, loop.reverse)
        y, final = (emit(operator.getitem, call, i) for i in (0, 1))
        results = {result: ops.restored(y, groups[:2], axes, 1)}
        width = self._product(self.mixed)
        for place, i in enumerate(self.group):
            part = emit(aten.slice.Tensor, final, -1, place * width, (place + 1) * width)
            results[i] = ops.restored(part, groups, self.labels, 0)
        size = len(self.group) * width
        why = (
            f"time-invariant: {self._product(self.channels)} channels of {self.count} states, "
            f"{'each by itself' if size == 1 else f'coupled in blocks of {size}'}, with coefficients from weights alone"
        )
        return Rewritten("lti_scan", why, results, emit.since(mark), tuple(self.group))

    def _transition(self, s: _Sum, carry: fx.Node) -> fx.Node:
        """How a next state is computed from ``carry``: [channels, m, to, from]."""
        system = [*self.channels, *self.blocks]
        width = self._product(self.mixed)
        shape = [self._product(self.channels), self._product(self.blocks), width, width]
        across = [t for t, c, labels in s.kept if c is carry and set(self.before) & set(labels)]
        along = [t for t, c, labels in s.kept if c is carry and not set(self.before) & set(labels)]
        if not self.mixed:
            return self._total(along, system, shape)
        total = self._total(across, [*system, *self.mixed, *self.before], shape)
        if along:
            diagonal = self._total(along, [*system, *self.mixed], shape[:-1])
            total = self.emit(aten.add.Tensor, total, self.emit(aten.diag_embed.default, diagonal))
        return total

    def _vector(self, terms: Sequence[Term], mixed: Sequence[Label]) -> fx.Node:
        """[channels, m, states of a block]."""
        shape = [self._product(group) for group in (self.channels, self.blocks, self.mixed)]
        return self._total(terms, [*self.channels, *self.blocks, *mixed], shape)

    def _total(self, terms: Sequence[Term], order: Sequence[Label], shape: list[int]) -> fx.Node:
        """The sum of what of ``terms`` is computed from weights alone, in ``shape``."""
        total: fx.Node | None = None
        for term in terms or (Term(0.0),):
            node = self.ops.coefficient(self._split(term)[0], order)
            total = node if total is None else self.emit(aten.add.Tensor, total, node)
        return self.emit(aten.reshape.default, total, shape)

    def _beside(self, parts: Sequence[fx.Node], axis: int) -> fx.Node:
        return parts[0] if len(parts) == 1 else self.emit(aten.cat.default, list(parts), axis)

    def _product(self, labels: Iterable[Label]) -> int:
        return math.prod(self._size(label) for label in labels)

    def _size(self, label: Label | None) -> int:
        size = None if label is None else self.terms.sizes[label]
        if not isinstance(size, int):
            raise NotMultilinear("the number of states or channels is not fixed")
        return size


def _single(form: Form) -> tuple[Label, ...]:
    if any(len(axis) != 1 for axis in form.axes):
        raise NotMultilinear("an axis of the state is of size 1 or merged")
    return tuple(label for (label,) in form.axes)
