"""``seqc::linear_attention`` with all chunks at once: the formulas of ``chunked``, and a prefix scan over the states.

For the delta rules a chunk makes P S + Q of the state S in front of it, with a matrix P [K, K]: as u = U - W S,

    U = (1 + A)^-1 (beta v)        W = (1 + A)^-1 (beta exp(c) k)
    P = exp(c_Q) - sum_j exp(s_Qj) k_j w_j^T        Q = sum_j exp(s_Qj) k_j u_j^T

and two chunks in a row make (P2 P1, P2 Q1 + Q2). The P of all chunks take K / 64 times the memory of the keys, and there are
about log2(T / 64) products of them for each.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import Lowering, Refused, size_of
from seqc.lowerings.blocks import Blocks
from seqc.lowerings.chunked_attention import CHUNK, Decays, chunks, masks, times
from seqc.lowerings.linear_attention import both_ways
from seqc.lowerings.triangular_inverse import inverse_of
from seqc.program import named_args

aten = torch.ops.aten


@both_ways
def parallel_chunks(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """The rules without an update rate, for one decay per head."""
    if named_args(node)["beta"] is not None:
        raise Refused("the delta rules have a form of their own, parallel_delta")
    return _all_chunks(emit, node)


@both_ways
def parallel_delta(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """The delta rules, for one decay per head."""
    if named_args(node)["beta"] is None:
        raise Refused("it is not a delta rule")
    return _all_chunks(emit, node)


def _all_chunks(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    query, key, value, state, decay, beta, _ = named_args(node).values()
    dtype = value.meta["val"].dtype
    if decay is not None and decay.meta["val"].shape[3] != 1:
        raise Refused("a decay for each key dimension")
    if dtype not in (torch.float32, torch.float64):
        raise Refused(f"sums over a chunk lose too much in {dtype}")
    blocks = Blocks(emit, value, size=CHUNK)
    q, k, v = (_chunks(emit, blocks, x) for x in (query, key, value))
    logs = None if decay is None else _chunks(emit, blocks, decay)
    lower, below, *inverting = masks(emit, dtype, delta=beta is not None)
    decays = Decays.of(emit, logs, lower, below)
    keys = emit(aten.transpose.int, k, -2, -1)
    scores = emit(aten.mul.Tensor, emit(aten.matmul.default, q, keys), decays.factors)
    late = times(emit, keys, decays.until)
    if beta is None:
        added = emit(aten.matmul.default, late, v)  # [count, batch, heads, K, V]
        kept = decays.total
        if kept is None:
            kept = emit(aten.full.default, [blocks.count, 1, 1, 1, 1], 1.0, dtype=dtype)
        entering, final = blocks.entering(kept, added, state)
    else:
        rate = _chunks(emit, blocks, emit(aten.unsqueeze.default, beta, -1))
        alike = emit(aten.mul.Tensor, emit(aten.matmul.default, k, keys), emit(aten.mul.Tensor, decays.factors, below))
        inverse = inverse_of(emit, emit(aten.mul.Tensor, rate, alike), inverting)
        own = emit(aten.matmul.default, inverse, emit(aten.mul.Tensor, rate, v))
        seen = emit(aten.matmul.default, inverse, emit(aten.mul.Tensor, rate, times(emit, k, decays.since)))
        size = key.meta["val"].shape[-1]
        ones = emit(aten.ones.default, [size, size], dtype=dtype)
        unit = emit(aten.tril.default, emit(aten.triu.default, ones))
        taken = emit(aten.matmul.default, late, seen)
        kept = emit(aten.sub.Tensor, times(emit, unit, decays.total), taken)
        entering, final = _entering(emit, blocks, [kept, emit(aten.matmul.default, late, own)], unit, state)
        v = emit(aten.sub.Tensor, own, emit(aten.matmul.default, seen, entering))
    across = times(emit, emit(aten.matmul.default, q, entering), decays.since)
    out = emit(aten.add.Tensor, emit(aten.matmul.default, scores, v), across)
    return [blocks.joined(emit(aten.permute.default, out, [0, 3, 1, 2, 4]), emit(aten.select.int, value, 0, 0)), final]


def _entering(
    emit: Emitter, blocks: Blocks, maps: list[fx.Node], unit: fx.Node, state: fx.Node
) -> tuple[fx.Node, fx.Node]:
    """(the state in front of each chunk, the final one), where a chunk makes P S + Q of S."""

    def after(earlier: list[fx.Node], later: list[fx.Node]) -> list[fx.Node]:
        (p1, q1), (p2, q2) = earlier, later
        return [
            emit(aten.matmul.default, p2, p1),
            emit(aten.add.Tensor, emit(aten.matmul.default, p2, q1), q2),
        ]

    p, q = blocks.up_to_each(maps, after, [unit, 0.0])
    return blocks.around(emit(aten.add.Tensor, emit(aten.matmul.default, p, state), q), state)


def _chunks(emit: Emitter, blocks: Blocks, x: fx.Node) -> fx.Node:
    split = blocks.split(x, 0.0)
    whole = emit(aten.reshape.default, split, [-1, *(size_of(emit, x, axis) for axis in (1, 2, 3))])
    return chunks(emit, whole, blocks.count)


LOWERINGS = (
    Lowering(
        "seqc::linear_attention",
        "parallel_chunks",
        f"matrix products over all chunks of {CHUNK} steps at once, a scan of logarithmic depth over their states: no loop",
        parallel_chunks,
    ),
    Lowering(
        "seqc::linear_attention",
        "parallel_delta",
        f"a triangular inverse and matrix products in all chunks of {CHUNK} steps at once, a scan of logarithmic depth "
        "over the matrices that take each chunk's state to the next one's: no loop",
        parallel_delta,
    ),
)
