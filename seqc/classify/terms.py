"""The forms of a body's values, derived operation by operation."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx

from seqc.classify.forms import TIME, Factor, Form, Label, NotMultilinear, Term, renamed
from seqc.classify.rules import ADDITIVE, RULES
from seqc.dependence import computed_from
from seqc.emit import Emitter
from seqc.program import source_line

_MOST_TERMS = 32


class Terms:
    """The forms of the values of ``gm``, linear in ``states``: the carries of a body, or values computed from them.

    ``xs`` are the body's placeholders for a step, with the values in front of the loop that they are a step of; the
    products that these are get forms by ``around``, the Terms of the graph around. ``gm`` may get new nodes (masks as
    numbers); those that nothing reads are dead code. Sums of values that read no state are atoms, but for those by the
    operators ``expanded`` and those of values computed from ``opened``.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        states: Iterable[fx.Node],
        mode: Any,
        around: Terms | None = None,
        xs: Mapping[fx.Node, fx.Node] | None = None,
        expanded: frozenset[Any] = frozenset(),
        opened: Iterable[fx.Node] = (),
    ) -> None:
        self.states = frozenset(states)
        self.emit = Emitter(gm, mode)
        self.around, self.xs = around, dict(xs or {})
        self._whole = ADDITIVE - expanded
        self.sizes: dict[Label, Any] = around.sizes if around else {}
        self._count: Iterator[int] = around._count if around else itertools.count(TIME + 1)
        self._forms: dict[fx.Node, Form | NotMultilinear] = {}
        self._reading = computed_from(self.states)
        self._open = self._reading | computed_from(opened)

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
        expanded = node.target in RULES and (node in self._open or node.target not in self._whole)
        if not expanded or node in self.states:
            return []
        return node.args[0].all_input_nodes if node.target is operator.getitem else node.all_input_nodes  # type: ignore[union-attr]

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
        return renamed(form, renames)

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
            if rule is None or (node not in self._open and node.target in self._whole):
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
        return renamed(Form(form.axes[1:], form.terms), {form.axes[0][0]: TIME})

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
        return Form(tuple(axes), a.terms), Form(tuple(axes), renamed(b, renames).terms)

    def renewed(self, form: Form) -> Form:
        """``form`` with new labels throughout."""
        old = form.labels.union(*(t.support for t in form.terms))
        return renamed(form, {label: self.label(self.sizes[label]) for label in sorted(old - {TIME})})

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
