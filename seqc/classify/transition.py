"""What one step makes of a group of states, apart from what it adds to them: the matrix of an affine update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from seqc.classify.affine import single
from seqc.classify.forms import Form, Label, NotMultilinear, Term
from seqc.classify.operands import ordered
from seqc.classify.terms import Terms
from seqc.loop import Loop
from seqc.verify import same_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Transition:
    """``entries[i][j]``, a node of the body: what state j contributes to the next state i; None for nothing.

    ``axis`` None: element by element, an entry has an axis for each of the state's (of size 1 where it is constant). Else
    the elements along ``axis`` are mixed: an entry is a matrix [the state's other axes, to, from].
    """

    carries: tuple[int, ...]
    entries: tuple[tuple[fx.Node | None, ...], ...]
    axis: int | None

    @property
    def nodes(self) -> list[fx.Node]:
        return [entry for row in self.entries for entry in row if entry is not None]

    @property
    def in_words(self) -> str:
        several = f"{len(self.carries)} coupled states, " if len(self.carries) > 1 else ""
        return several + ("each element by itself" if self.axis is None else f"mixed along axis {self.axis}")


def transition(loop: Loop, group: Sequence[int], terms: Terms) -> Transition:
    """The transition of the carries ``group``, whose Terms are linear in them; its entries are added to the body.

    Raises NotMultilinear where the update is not affine in them, or mixes their elements along several axes.
    """
    inner = [loop.carries[i][1] for i in group]
    forms = [terms.form(loop.next_carries[i]) for i in group]
    axis = _mixed_axis(terms, forms, group)
    shapes = [list(node.meta["val"].shape) for node in inner]
    for shape in shapes:
        if axis is not None and not isinstance(shape.pop(axis), int):
            raise NotMultilinear("an axis of free size is mixed")
        if not same_shape(shape, shapes[0]):
            raise NotMultilinear("coupled states of several shapes")
    writer = _Writer(terms, axis, inner[0].meta["val"].dtype)
    with terms.emit.before(loop.body.graph.output_node()):
        entries = tuple(tuple(writer.entry(form, state) for state in inner) for form in forms)
    return Transition(tuple(group), entries, axis)


def _mixed_axis(terms: Terms, forms: Sequence[Form], group: Sequence[int]) -> int | None:
    """The axis of the states along which some term reads another element than it writes; None for no such axis."""
    axes: set[int] = set()
    for form in forms:
        labels = single(form)
        for term in form.terms:
            state = next((f for f in term.factors if f.node in terms.states), None)
            if state is None:
                continue
            if len(state.labels) != len(labels) or len(state.support) != sum(x is not None for x in state.labels):
                raise NotMultilinear("a state is read along other axes than it is written")
            mixed = [i for i, (a, b) in enumerate(zip(labels, state.labels, strict=True)) if a != b]
            if any(state.labels[i] in labels for i in mixed if state.labels[i] is not None):
                raise NotMultilinear("a state's axes change places")
            axes.update(mixed)
    if len(axes) > 1:
        raise NotMultilinear(f"elements are mixed along {len(axes)} axes of the state")
    return axes.pop() if axes else None


class _Writer:
    """Writes entries of a transition into the body."""

    def __init__(self, terms: Terms, axis: int | None, dtype: torch.dtype) -> None:
        self.terms, self.emit, self.axis, self.dtype = terms, terms.emit, axis, dtype

    def entry(self, form: Form, state: fx.Node) -> fx.Node | None:
        """The terms of ``form`` that read ``state``, without it."""
        labels = [self.terms.label(1) if label is None else label for label in single(form)]
        total: fx.Node | None = None
        for term in form.terms:
            factor = next((f for f in term.factors if f.node is state), None)
            if factor is None:
                continue
            rest = Term(term.scale, tuple(f for f in term.factors if f is not factor))
            read = None if self.axis is None else factor.labels[self.axis]
            value = self._contribution(rest, labels, read, state)
            total = value if total is None else self.emit(aten.add.Tensor, total, value)
        return total

    def _contribution(self, term: Term, labels: list[Label], read: Label | None, state: fx.Node) -> fx.Node:
        if self.axis is None:
            return self._product(term, labels)
        written = labels[self.axis]
        others = [label for i, label in enumerate(labels) if i != self.axis]
        size = int(state.meta["val"].shape[self.axis])
        if read == written:
            rows = self._product(term, [*others, written, self.terms.label(1)])
            return self.emit(aten.mul.Tensor, rows, self._diagonal(size))
        matrix = self._product(term, [*others, written, self.terms.label(1) if read is None else read])
        sizes = [-1] * len(others) + [int(self.terms.sizes[written]), size]
        return self.emit(aten.expand.default, matrix, sizes)

    def _diagonal(self, size: int) -> fx.Node:
        """Ones on the diagonal."""
        lower = self.emit(aten.tril.default, self.emit(aten.ones.default, [size, size], dtype=self.dtype))
        return self.emit(aten.sub.Tensor, lower, self.emit(aten.tril.default, lower, -1))

    def _product(self, term: Term, order: list[Label]) -> fx.Node:
        """``term`` with an axis for each label of ``order``; summed over the labels that are none of them."""
        summed = sorted(term.support - set(order))
        node: fx.Node | None = None
        for factor in sorted(term.factors, key=lambda f: len(f.support)):
            if len(factor.support) != sum(label is not None for label in factor.labels):
                raise NotMultilinear("a diagonal of a factor")
            value = ordered(self.emit, factor.node, factor.labels, [*order, *summed])
            if factor.power < 0:
                value = self.emit(aten.reciprocal.default, value)
            node = value if node is None else self.emit(aten.mul.Tensor, node, value)
        if node is None:
            return self.emit(aten.full.default, [1] * len(order), term.scale, dtype=self.dtype)
        if summed:
            node = self.emit(aten.sum.dim_IntList, node, list(range(len(order), len(order) + len(summed))))
        return node if term.scale == 1 else self.emit(aten.mul.Tensor, node, term.scale)
