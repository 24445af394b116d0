"""Writes the dialect op of a class in place of a loop's carry and its results."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from seqc.classify.affine import Affine, Readout
from seqc.classify.forms import Label, NotMultilinear, Term
from seqc.classify.logs import log_of
from seqc.classify.matrix_state import matrix_state, selective
from seqc.classify.operands import Groups, Operands
from seqc.classify.terms import Terms
from seqc.loop import Loop
from seqc.ops.linear_attention import rule_of
from seqc.outside import Outside

aten = torch.ops.aten


@dataclass(frozen=True)
class Rewritten:
    """``results`` maps the index of a loop's result to the node that replaces it; ``why`` says what was recognised.

    ``carries`` are those that the op replaces. ``fed`` maps values of the body that other carries may read to what they
    are in all steps.
    """

    name: str
    why: str
    results: dict[int, fx.Node]
    written: list[fx.Node]
    carries: tuple[int, ...]
    fed: dict[fx.Node, fx.Node] = field(default_factory=dict)


def as_linear_scan(
    loop: Loop, index: int, results: Sequence[int], update: Affine, terms: Terms, outside: Outside
) -> Rewritten:
    """A state each element of which has a decay and an update of its own."""
    if update.mixed:
        raise NotMultilinear("elements of the state are mixed")
    if not update.decay:
        raise NotMultilinear("the state is not kept from step to step")
    mark = loop.emit.mark()
    ops = Operands(outside, terms)
    groups = [[label] for label in update.labels if label is not None]
    if len(groups) != len(update.labels):
        raise NotMultilinear("an axis of size 1")
    decay, added = (_sum(ops, part, groups) for part in (update.decay, update.update))
    state = loop.carries[index][0]
    node = ops.emit(torch.ops.seqc.linear_scan.default, decay, added, state, loop.reverse)
    steps, final = (ops.emit(operator.getitem, node, i) for i in (0, 1))
    why = f"each element decays by a factor of its own; {len(update.update)} terms are added"
    return Rewritten(
        "linear_scan", why, {index: final, **dict.fromkeys(results, steps)}, loop.emit.since(mark), (index,)
    )


def _sum(ops: Operands, terms: tuple[Term, ...], groups: Groups) -> fx.Node:
    total: fx.Node | None = None
    for term in terms or (Term(0.0),):
        node = ops.product(term, groups)
        total = node if total is None else ops.emit(aten.add.Tensor, total, node)
    assert total is not None
    return total


def as_selective_scan(
    loop: Loop, index: int, result: int, update: Affine, read: Readout, terms: Terms, outside: Outside
) -> Rewritten:
    """A diagonal state read out over its last axis, with decays exp(step * rate)."""
    if update.mixed:
        raise NotMultilinear("elements of the state are mixed")
    s = selective(matrix_state(update, read), update, terms)
    mark = loop.emit.mark()
    ops = Operands(outside, terms)
    batch, channel, key = list(s.batch), [s.channel], [s.key]
    x, dt = (ops.product(t, [batch, channel], full=True) for t in (s.value_term, s.step_term))
    b, c = (ops.product(t, [batch, key], full=True) for t in (s.key_term, s.query_term))
    a = ops.fixed(s.rate_term, [s.channel, s.key])
    groups = [batch, channel, key]
    state = ops.state(loop.carries[index][0], update.labels, groups)
    node = ops.emit(torch.ops.seqc.selective_scan.default, x, dt, a, b, c, state, loop.reverse)
    y, final = (ops.emit(operator.getitem, node, i) for i in (0, 1))
    y = ops.restored(y, [batch, channel], read.axes, 1)
    final = ops.restored(final, groups, update.labels, 0)
    why = "a diagonal state with decays exp(step * rate), one input and one output vector for all channels"
    return Rewritten("selective_scan", why, {index: final, result: y}, loop.emit.since(mark), (index,))


def as_linear_attention(
    loop: Loop,
    index: int,
    result: int,
    update: Affine,
    read: Readout,
    terms: Terms,
    outside: Outside,
    weights: dict[str, torch.Tensor],
) -> Rewritten:
    """A matrix state with a rank-1 update, by one of the four rules."""
    m = matrix_state(update, read)
    mark = loop.emit.mark()
    ops = Operands(outside, terms)
    batch, heads, key, values = list(m.batch), list(m.heads), [m.key], list(m.values)
    shared = set(m.query_term.support | m.key_term.support).isdisjoint(heads)
    qk_heads: list[Label] = [] if shared else heads
    if set(m.query_term.support) & set(values):
        raise NotMultilinear("a query that differs along the values")
    query, keys = (ops.product(t, [batch, qk_heads, key], full=True) for t in (m.query_term, m.key_term))
    value = ops.product(m.value_term, [batch, heads, values], full=True)
    decay = beta = None
    if m.decay_term is not None:
        per_key = m.key in m.decay_term.support
        if per_key and not values:
            raise NotMultilinear("a diagonal state, whose decays are faster computed step by step than as a matrix's")
        plain = ops.product(m.decay_term, [batch, heads, key] if per_key else [batch, heads, []], full=True)
        decay = log_of(ops.emit, plain, weights)
        if decay is None:
            raise NotMultilinear("a decay that is not known to be at least 0")
    if m.beta_term is not None:
        beta = ops.product(m.beta_term, [batch, heads], full=True)
    groups = [batch, heads, key, values]
    state = ops.state(loop.carries[index][0], update.labels, groups)
    node = ops.emit(torch.ops.seqc.linear_attention.default, query, keys, value, state, decay, beta, loop.reverse)
    out, final = (ops.emit(operator.getitem, node, i) for i in (0, 1))
    out = ops.restored(out, [batch, heads, values], read.axes, 1)
    final = ops.restored(final, groups, update.labels, 0)
    rule = rule_of(decay, beta)
    why = f"a matrix state with a rank-1 update, rule {rule!r}"
    return Rewritten("linear_attention", why, {index: final, result: out}, loop.emit.since(mark), (index,))
