"""Forms of ``seqc::softmax_scan``."""

from __future__ import annotations

from functools import partial

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings import linear_attention
from seqc.lowerings.base import Lowering, Refused, size_of, trip_of
from seqc.lowerings.blocks import BLOCK, Blocks
from seqc.lowerings.maxima import maxima
from seqc.lowerings.reverse import flipped
from seqc.program import named_args
from seqc.rewrite import result_index
from seqc.verify import same_shape
from seqc.write_loop import write_loop

aten = torch.ops.aten

_STATES = 3

# Up to here the loop over all three is faster than the operator behind a loop (by tests.benchmarks.scans --lengths 1 2 4 ..).
SHORT = 10


def sequential(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """A loop over the maximum and, of numerator and denominator, what is read."""
    score, value, decay, *initial, reverse = named_args(node).values()
    kept_up, read = _kept_up(node)
    walked = [i for i in kept_up if i in read]
    xs = {"score": score, "value": value if 1 in kept_up else None, "decay": decay}
    constant = decay is not None and decay.meta["val"].shape[0] == 1
    invariants = [emit(aten.squeeze.dim, xs.pop("decay"), 0)] if constant else []
    xs = {name: x for name, x in xs.items() if x is not None}

    def step(
        inner: Emitter, carries: list[fx.Node], given: list[fx.Node], fixed: list[fx.Node]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        states, operands = dict(zip(kept_up, carries, strict=True)), dict(zip(xs, given, strict=True))
        late = fixed[0] if fixed else operands.get("decay")
        before = states[0] if late is None else inner(aten.add.Tensor, states[0], late)
        top, old, new = weights(inner, before, operands["score"])
        following = {0: top}
        for i in kept_up[1:]:
            added = inner(aten.mul.Tensor, new, operands["value"]) if i == 1 else new
            following[i] = inner(aten.add.Tensor, inner(aten.mul.Tensor, old, states[i]), added)
        return list(following.values()), [following[i] for i in walked]

    states = [initial[i] for i in kept_up]
    out = write_loop(emit, step, trip_of(emit, score), states, list(xs.values()), invariants, bool(reverse))
    found = dict(zip([*(i + _STATES for i in kept_up), *walked], out, strict=True))
    return [found.get(i, score) for i in range(2 * _STATES)]  # nothing reads the others


def prefix(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """A scan over the monoid of the op: of each stretch of steps the maximum, the sums, and the total of the decays."""
    score, value, decay, *initial, reverse = named_args(node).values()
    kept_up, _ = _kept_up(node)
    states = [initial[i] for i in kept_up]
    blocks = Blocks(emit, score, reverse)

    def split(x: fx.Node, state: int, fill: float) -> fx.Node:
        sizes = [size_of(emit, initial[state], axis) for axis in range(initial[state].meta["val"].dim())]
        return blocks.split(emit(aten.expand.default, x, [blocks.trip, *sizes]), fill)

    leaves = (
        lambda: split(score, 0, -torch.inf),
        lambda: split(value, 1, 0.0),
        lambda: split(emit(aten.ones_like.default, score), 2, 0.0),
    )
    steps = [leaves[i]() for i in kept_up] + ([] if decay is None else [split(decay, 0, 0.0)])
    unit = [-torch.inf, *(0.0 for _ in steps[1:])]
    each, whole = blocks.each_step(steps, partial(_after, emit, len(states)))
    behind = _after(emit, len(states), states, blocks.up_to_each(whole, partial(_after, emit, len(states)), unit))
    around = [blocks.around(x, state) for x, state in zip(behind, states, strict=True)]
    found = _after(emit, len(states), [emit(aten.unsqueeze.default, entering, 1) for entering, _ in around], each)
    out = {i: blocks.joined(x, initial[i]) for i, x in zip(kept_up, found, strict=True)}
    out |= {i + _STATES: last for i, (_, last) in zip(kept_up, around, strict=True)}
    return [out.get(i, score) for i in range(2 * _STATES)]  # nothing reads the others


def _after(emit: Emitter, states: int, earlier: list[fx.Node], later: list[fx.Node]) -> list[fx.Node]:
    """The monoid: maximum, sums, and behind these ``states`` the total decay where there is one; a state has none itself."""
    before = earlier[0] if len(later) == states else emit(aten.add.Tensor, earlier[0], later[states])
    top, old, new = weights(emit, before, later[0])
    sums = [
        emit(aten.add.Tensor, emit(aten.mul.Tensor, old, a), emit(aten.mul.Tensor, new, b))
        for a, b in zip(earlier[1:states], later[1:states], strict=True)
    ]
    totals = [emit(aten.add.Tensor, a, b) for a, b in zip(earlier[states:], later[states:], strict=False)]
    return [top, *sums, *totals]


def _kept_up(node: fx.Node) -> tuple[list[int], set[int]]:
    """The states that are needed, and the results that are read."""
    read = {result_index(user) for user in node.users if user.users}
    return [i for i in range(_STATES) if i == 0 or not read.isdisjoint((i, i + _STATES))], read


def weights(emit: Emitter, before: fx.Node, score: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The new maximum, the factor of what was summed before, and that of the value which ``score`` weighs."""
    top = emit(aten.maximum.default, before, score)
    finite = emit(aten.clamp_min.default, top, torch.finfo(top.meta["val"].dtype).min)
    old, new = (emit(aten.exp.default, emit(aten.sub.Tensor, a, finite)) for a in (before, score))
    return top, old, new


@flipped(("score", "value", "decay"), walked=_STATES)
def contrib(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """The maxima by chunks; known, they make a linear attention with one key of the rest."""
    score, value, decay, top, numerator, denominator, _ = named_args(node).values()
    sizes, values = top.meta["val"].shape, numerator.meta["val"].shape
    if len(sizes) not in (2, 3) or sizes[-1] != 1 or values[-1] in (0, 1) or not same_shape(sizes[:-1], values[:-1]):
        raise Refused("it takes one score for each head of several values")
    before, tops = maxima(emit, score, decay, top)
    finite = emit(aten.clamp_min.default, tops, torch.finfo(tops.meta["val"].dtype).min)
    kept = emit(aten.sub.Tensor, before, finite)
    key = emit(aten.exp.default, emit(aten.sub.Tensor, score, finite))
    query = emit(aten.ones_like.default, key)
    full = [-1, *(size_of(emit, numerator, axis) for axis in range(len(values)))]
    added = emit(aten.cat.default, [emit(aten.expand.default, value, full), query], -1)
    state = emit(aten.unsqueeze.default, emit(aten.cat.default, [numerator, denominator], -1), -2)
    if len(sizes) == 2:  # one head
        query, key, added, kept = (emit(aten.unsqueeze.default, x, 2) for x in (query, key, added, kept))
        state = emit(aten.unsqueeze.default, state, 1)
    attention = torch.ops.seqc.linear_attention.default
    sums, final = linear_attention.contrib(emit, emit(attention, query, key, added, state, kept, None))
    final = emit(aten.squeeze.dim, final, -2)
    if len(sizes) == 2:
        sums, final = emit(aten.squeeze.dim, sums, 2), emit(aten.squeeze.dim, final, 1)
    count = values[-1]
    u, w, u_last, w_last = (
        emit(aten.slice.Tensor, x, -1, *cut) for x in (sums, final) for cut in ((0, count), (count, count + 1))
    )
    return [tops, u, w, emit(aten.select.int, tops, 0, -1), u_last, w_last]


LOWERINGS = (
    Lowering(
        "seqc::softmax_scan",
        "contrib",
        "the maxima in a loop over chunks, the sums by ONNX Runtime's fused operator LinearAttention",
        contrib,
        frozenset({"com.microsoft"}),
        short=lambda node: {"sequential": SHORT},
        timed="score",
    ),
    Lowering(
        "seqc::softmax_scan",
        "sequential",
        "a loop over the maximum, the numerator and the denominator",
        sequential,
    ),
    Lowering(
        "seqc::softmax_scan",
        "prefix",
        f"blocks of {BLOCK} unrolled steps and a scan of logarithmic depth over the blocks: no loop",
        prefix,
    ),
)
