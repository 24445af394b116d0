"""Products of exponentials compared by their exponents, as sums, so that no spelling matters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.fx as fx

from seqc.classify.forms import Factor, Form, Label, NotMultilinear, Term, renamed
from seqc.classify.running_maximum import Running
from seqc.classify.terms import Terms

aten = torch.ops.aten

Exponent = dict[frozenset[tuple[Factor, int]], float]
"""A sum: what each product of factors, by how often each occurs, is multiplied by."""


class Exponents:
    """Tells the factors exp(kept - m) and exp(score - m) of a running maximum m.

    ``terms`` are those of the loop's body with m, before and behind the step, as its states.
    """

    def __init__(self, terms: Terms, top: Running) -> None:
        self.terms, self.top = terms, top
        following = terms.form(top.following)
        self.labels = tuple(axis[0] if axis else None for axis in following.axes)
        self.kept, self.score = (self._difference(node, following) for node in (top.kept, top.score))

    def _difference(self, node: fx.Node, following: Form) -> Form:
        a, b = self.terms.aligned(following.times(-1), self.terms.form(node))
        return Form(a.axes, a.terms + b.terms)

    def of_old(self, factors: Iterable[Factor]) -> tuple[Label | None, ...] | None:
        """The labels of m's axes where the product of ``factors`` is exp(kept - m); else None."""
        factors = tuple(factors)
        exponent = self._sum(factors)
        if exponent is None:
            return None
        for product in exponent:
            for factor, _ in product:
                if factor.node is self.top.following and exponent == self._named(self.kept, factor.labels):
                    return factor.labels
        return None

    def without_new(self, term: Term, labels: tuple[Label | None, ...]) -> Term | None:
        """``term`` without factors whose product is exp(score - m), m's axes being ``labels``; else None."""
        wanted = self._named(self.score, labels)
        powers = [f for f in term.factors if f.node.target is aten.exp.default]
        for chosen in ([f for f in powers if self.terms.reads(f.node)], powers):
            rest = tuple(f for f in term.factors if f not in chosen)
            if self._sum(chosen) == wanted and not any(self.terms.reads(f.node) for f in rest):
                return replace(term, factors=rest)
        return None

    def _sum(self, factors: Iterable[Factor]) -> Exponent | None:
        """The exponent of a product of exponentials; None where a factor is none, or its exponent is no sum."""
        total: Exponent = {}
        for factor in factors:
            if factor.node.target is not aten.exp.default:
                return None
            try:
                form = self.terms.argument(factor)
            except NotMultilinear:
                return None
            for product, scale in _exponent(form).items():
                total[product] = total.get(product, 0.0) + factor.power * scale
        return {product: scale for product, scale in total.items() if scale}

    def _named(self, form: Form, labels: tuple[Label | None, ...]) -> Exponent:
        names = {a: b for a, b in zip(self.labels, labels, strict=True) if a is not None and b is not None}
        return {product: scale for product, scale in _exponent(renamed(form, names)).items() if scale}


def _exponent(form: Form) -> Exponent:
    total: Exponent = {}
    for term in form.terms:
        product = frozenset((f, term.factors.count(f)) for f in term.factors)
        total[product] = total.get(product, 0.0) + term.scale
    return total
