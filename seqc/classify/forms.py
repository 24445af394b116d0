"""The values of a loop's body as sums of products: the einsum normal form in which recurrences are recognised.

    S * g[:, None, None] + torch.einsum("bk,bv->bkv", k, v)        is  g[b] S[b,k,v] + k[b,k] v[b,v]
    S + beta * k.unsqueeze(-1) * (v - (S * k.unsqueeze(-1)).sum(1)).unsqueeze(1)
                              is  S[b,k,v] + beta[b] k[b,k] v[b,v] - beta[b] k[b,k] k[b,c] S[b,c,v]

However it is spelled (broadcasting, matmul, einsum, sums over an axis), a multilinear value has one such form, so what is
matched on the form holds for every spelling, also where a product is computed in front of the loop for all steps at once.
Values that read no state and are not products are atoms: they are the same numbers whatever the state is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch.fx as fx

Label = int
"""Names an index that factors share; its size is that of the axes it stands for."""

TIME: Label = 0
"""The index of steps: an axis of values computed in front of the loop, and of no value in its body."""


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


def renamed(form: Form, renames: Mapping[Label, Label]) -> Form:
    """``form`` with other labels for some."""

    def factor(f: Factor) -> Factor:
        return replace(f, labels=tuple(None if label is None else renames.get(label, label) for label in f.labels))

    terms = tuple(replace(t, factors=tuple(map(factor, t.factors))) for t in form.terms)
    return Form(tuple(tuple(renames.get(label, label) for label in axis) for axis in form.axes), terms)
