"""Recurrences with a matrix state and a rank-1 update: what is a key, a value, a decay, and what class that makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seqc.classify.affine import Affine, Mixed, Readout, same_factors
from seqc.classify.forms import Factor, Label, NotMultilinear, Term
from seqc.classify.terms import Terms

aten = torch.ops.aten


@dataclass(frozen=True)
class MatrixState:
    """state[batch, heads, key, value] = exp-like decay * state + key value^T, or by the delta rule; read by query.

    ``batch``, ``heads`` and ``values`` are lists of labels (any of them may be empty), ``key`` is one. ``beta`` is None
    unless it is a delta rule. The terms hold no state.
    """

    batch: tuple[Label, ...]
    heads: tuple[Label, ...]
    key: Label
    values: tuple[Label, ...]
    query_term: Term
    key_term: Term
    value_term: Term
    decay_term: Term | None
    beta_term: Term | None


@dataclass(frozen=True)
class Selective:
    """A diagonal state [batch, channel, key] whose decay is exp(step * rate), step per channel, rate the same always."""

    batch: tuple[Label, ...]
    channel: Label
    key: Label
    query_term: Term
    key_term: Term
    value_term: Term
    step_term: Term
    rate_term: Term


def matrix_state(update: Affine, read: Readout) -> MatrixState:
    """The roles of the factors. Raises NotMultilinear, with the reason, where they do not fall into such roles."""
    labels = [label for label in update.labels if label is not None]
    summed = [label for label in labels if label not in read.axes]
    if len(summed) != 1:
        raise NotMultilinear(f"a readout that sums over {len(summed)} axes of the state instead of one")
    (key,) = summed
    if set(read.axes) - {None} != set(labels) - {key}:
        raise NotMultilinear("a readout with axes that the state has not")
    if len(update.update) != 1:
        raise NotMultilinear(f"an update of {len(update.update)} terms, which is not of rank 1")
    if len(update.decay) != 1:
        raise NotMultilinear(f"{len(update.decay)} terms that keep the state instead of one")
    (added,), (kept,) = update.update, update.decay
    keys = tuple(f for f in added.factors if key in f.support)
    rest = tuple(f for f in added.factors if key not in f.support)
    in_keys = frozenset().union(*(f.support for f in keys))
    in_rest = frozenset().union(*(f.support for f in rest))
    only_values = [label for label in labels if label != key and label not in in_keys]
    if not keys or not set(labels) <= in_keys | in_rest:
        raise NotMultilinear("an update that is the same along an axis of the state")
    beta = _beta(update, keys, rest, kept, key, only_values) if update.mixed else None
    values = [label for label in only_values if label not in kept.support]
    shared = [label for label in labels if label != key and label not in values]
    batch = tuple(label for label in shared if label == update.labels[0] and label in in_keys)
    heads = tuple(label for label in shared if label not in batch)
    value_factors = tuple(f for f in rest if beta is None or f not in beta.factors)
    return MatrixState(
        batch=batch,
        heads=heads,
        key=key,
        values=tuple(values),
        query_term=read.term,
        key_term=Term(1.0, keys),
        value_term=Term(added.scale if beta is None else 1.0, value_factors),
        decay_term=kept if kept.factors or kept.scale != 1 else None,
        beta_term=beta,
    )


def _beta(
    update: Affine, keys: tuple[Factor, ...], rest: tuple[Factor, ...], kept: Term, key: Label, values: list[Label]
) -> Term:
    """The update rate of a delta rule: the factors of k v^T that k k^T state has too, the decay's left out."""
    if len(update.mixed) != 1:
        raise NotMultilinear(f"{len(update.mixed)} terms that mix the state instead of one")
    (mixed,) = update.mixed
    inner = _summed_label(update, mixed, key)
    again = tuple(_at(f, key, inner) for f in keys)
    common = tuple(f for f in rest if f in mixed.term.factors)
    wanted = (*keys, *again, *common, *kept.factors)
    (added,) = update.update
    if not same_factors(wanted, mixed.term.factors) or mixed.term.scale != -added.scale * kept.scale:
        raise NotMultilinear("a term that mixes the state, but not as the delta rule does")
    if frozenset().union(*(f.support for f in common)) & set(values):
        raise NotMultilinear("an update rate that differs along the values")
    return Term(added.scale, common)


def _summed_label(update: Affine, mixed: Mixed, key: Label) -> Label:
    """The label at which the state is read in place of ``key``; all others must be where they are written."""
    pairs = list(zip(update.labels, mixed.state_labels, strict=True))
    changed = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
    if len(changed) != 1 or changed[0][0] != key or changed[0][1] is None:
        raise NotMultilinear("a term that mixes the state along an axis other than the one that is read out")
    return changed[0][1]


def _at(factor: Factor, old: Label, new: Label) -> Factor:
    return Factor(factor.node, tuple(new if label == old else label for label in factor.labels), factor.power)


def selective(state: MatrixState, update: Affine, terms: Terms) -> Selective:
    """As a selective scan, where each channel's states decay at rates of their own."""
    decay = state.decay_term
    channels = [label for label in state.heads if decay is not None and label in decay.support]
    if decay is None or state.key not in decay.support or len(state.heads) != 1 or len(channels) != 1 or state.values:
        raise NotMultilinear("its decay is not that of a selective scan")
    (channel,) = channels
    if len(decay.factors) != 1 or decay.scale != 1 or decay.factors[0].node.target is not aten.exp.default:
        raise NotMultilinear("a decay that is not one exponential")
    exponent = terms.argument(decay.factors[0])
    if len(exponent.terms) != 1:
        raise NotMultilinear("a decay whose exponent is a sum")
    factors = exponent.terms[0].factors
    rates = tuple(f for f in factors if state.key in f.support)
    steps = tuple(f for f in factors if state.key not in f.support)
    if not steps or frozenset().union(*(f.support for f in rates)) - {channel, state.key}:
        raise NotMultilinear("a decay that is not step size times rate")
    if channel in state.query_term.support or channel in state.key_term.support:
        raise NotMultilinear("input or output vectors that differ between channels")
    return Selective(
        state.batch, channel, state.key, state.query_term, state.key_term, state.value_term,
        Term(1.0, steps), Term(exponent.terms[0].scale, rates),
    )  # fmt: skip
