"""Affine recurrences: next state = decay * state + update, with the readouts of the state, as sums of products."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.fx as fx

from seqc.axes import PERMUTES, order_of
from seqc.classify.forms import TIME, Factor, Form, Label, NotMultilinear, Term
from seqc.classify.terms import Terms
from seqc.loop import Loop


@dataclass(frozen=True)
class Mixed:
    """A term in which the state is read at other places than it is written: ``term`` without the state's factor."""

    term: Term
    state_labels: tuple[Label | None, ...]


@dataclass(frozen=True)
class Affine:
    """The update of one carry. The terms hold no state; ``labels`` are those of the state's axes."""

    carry: fx.Node
    labels: tuple[Label | None, ...]
    decay: tuple[Term, ...]
    mixed: tuple[Mixed, ...]
    update: tuple[Term, ...]


@dataclass(frozen=True)
class Readout:
    """A result that is linear in the new state: ``term`` without the state's factor, in the labels of the update.

    ``axes`` are the labels of the result's axes; the state's other labels are summed over.
    """

    value: fx.Node
    axes: tuple[Label | None, ...]
    term: Term


def affine(loop: Loop, index: int, mode: object) -> tuple[Affine, Terms]:
    """The update of carry ``index``. Raises NotMultilinear where it is not affine, or reads another carry."""
    carry = loop.carries[index][1]
    around = Terms(loop.gm, (), mode)
    terms = Terms(loop.body, (inner for _, inner in loop.carries), mode, around, {p: x for x, p in loop.xs})
    form = terms.form(loop.next_carries[index])
    labels = single(form)
    decay, mixed, update = [], [], []
    for term in form.terms:
        state = next((f for f in term.factors if f.node in terms.states), None)
        if state is None:
            update.append(term)
            continue
        if state.node is not carry:
            raise NotMultilinear("it reads another state")
        rest = Term(term.scale, tuple(f for f in term.factors if f is not state))
        if state.labels == labels:
            decay.append(rest)
        else:
            mixed.append(Mixed(rest, state.labels))
    return Affine(carry, labels, tuple(decay), tuple(mixed), tuple(update)), terms


def readout(loop: Loop, index: int, value: fx.Node, update: Affine, terms: Terms) -> Readout:
    """How ``value`` is computed from the new state. Raises NotMultilinear where it is not one term linear in it."""
    following = loop.next_carries[index]
    states = {following, *(inner for _, inner in loop.carries), *loop.next_carries}
    own = Terms(loop.body, states | _views(following), terms.emit.mode, terms.around, terms.xs)
    _name_views(own, following)
    form = own.form(value)
    axes = single(form)
    if len(form.terms) != 1:
        raise NotMultilinear("a result is a sum of several terms")
    (term,) = form.terms
    state = next((f for f in term.factors if f.node in own.states), None)
    if state is None or state.node is not following:
        raise NotMultilinear("a result does not read the new state alone")
    renames: dict[Label, Label] = {TIME: TIME}
    for ours, theirs in zip(state.labels, update.labels, strict=True):
        if ours is not None and theirs is not None:
            renames[ours] = theirs
    for label in sorted(term.support.union(label for label in axes if label is not None)):
        renames.setdefault(label, terms.label(own.sizes[label]))

    def renamed(labels: tuple[Label | None, ...]) -> tuple[Label | None, ...]:
        return tuple(None if label is None else renames[label] for label in labels)

    factors = tuple(replace(f, labels=renamed(f.labels)) for f in term.factors if f is not state)
    return Readout(value, renamed(axes), Term(term.scale, factors))


def single(form: Form) -> tuple[Label | None, ...]:
    """The label of each axis, None for size 1. Raises NotMultilinear where axes are merged."""
    if any(len(axis) > 1 for axis in form.axes):
        raise NotMultilinear("axes of the state are merged")
    return tuple(axis[0] if axis else None for axis in form.axes)


def _views(node: fx.Node) -> set[fx.Node]:
    """What ``node`` is a permutation of."""
    found = set()
    while node.target in PERMUTES:
        node = node.args[0]  # type: ignore[assignment]
        found.add(node)
    return found


def _name_views(terms: Terms, following: fx.Node) -> None:
    """Let what ``following`` is a permutation of be read as ``following``."""
    node, form = following, terms.form(following)
    while node.target in PERMUTES:
        axes = list(form.axes)
        for place, axis in zip(order_of(node), form.axes, strict=True):
            axes[place] = axis
        node, form = node.args[0], replace(form, axes=tuple(axes))  # type: ignore[assignment]
        terms.name(node, form)


def same_factors(a: tuple[Factor, ...], b: tuple[Factor, ...]) -> bool:
    """Whether two products are of the same factors, in any order."""
    return sorted(map(_key, a)) == sorted(map(_key, b))


def _key(factor: Factor) -> tuple[str, str, int]:
    return factor.node.name, str(factor.labels), factor.power
