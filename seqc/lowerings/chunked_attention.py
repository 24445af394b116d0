"""The chunked form of ``seqc::linear_attention``, for one decay per head."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import Lowering, Refused, Step, size_of, trip_of
from seqc.lowerings.linear_attention import steps
from seqc.program import named_args
from seqc.write_loop import write_loop

aten = torch.ops.aten

CHUNK = 64

# Stands for log(0) where it is multiplied by 0: its exponential is 0 too, and 64 of them add up to a finite number.
_LOG_ZERO = -1e30


def chunked(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """Whole chunks by matrix products in a loop over chunks, what is left over step by step.

    With the decays g of a chunk, s_ij = g_{j+1} + .. + g_i and c_i = g_1 + .. + g_i:

        out_i  = exp(c_i) q_i S + sum_{j <= i} exp(s_ij) (q_i k_j) v_j
        S_next = exp(c_Q) S + sum_j exp(s_Qj) k_j v_j^T

    Every exponent is a sum of decays of its own, not a difference of cumulative sums, so no digits are lost. Source:
    Dao and Gu, "Transformers are SSMs" (2024), section 6; Yang et al., "Gated linear attention" (2023).
    """
    query, key, value, state, decay, beta, reverse = named_args(node).values()
    if beta is not None:
        raise Refused("the chunked form of the delta rules is not written yet")
    if decay is not None and decay.meta["val"].shape[3] != 1:
        raise Refused("a decay for each key dimension")
    if reverse:
        raise Refused("it walks forward only")
    trip = trip_of(emit, value)
    count = trip // CHUNK if isinstance(trip, int) else emit(operator.floordiv, trip, CHUNK)
    whole = emit(operator.mul, count, CHUNK) if isinstance(count, fx.Node) else count * CHUNK
    given = [x for x in (query, key, value, decay) if x is not None]
    xs = [_chunks(emit, x, count, whole) for x in given]
    ones = emit(aten.ones.default, [CHUNK, CHUNK], dtype=value.meta["val"].dtype)
    lower, below = emit(aten.tril.default, ones), emit(aten.tril.default, ones, -1)
    middle, head = write_loop(emit, _chunk(decay is not None), count, [state], xs, [lower, below])
    sizes = [size_of(emit, value, axis) for axis in (1, 2, 3)]
    head = emit(aten.reshape.default, emit(aten.permute.default, head, [0, 3, 1, 2, 4]), [whole, *sizes])
    rest = [emit(aten.slice.Tensor, x, 0, whole, 2**63 - 1) for x in given]
    tail, final = steps(emit, rest[0], rest[1], rest[2], middle, rest[3] if decay is not None else None, None, False)
    return [emit(aten.cat.default, [head, tail], 0), final]


def _chunks(emit: Emitter, x: fx.Node, count: Any, whole: Any) -> fx.Node:
    """[trip, batch, heads, size] as [chunks, batch, heads, CHUNK, size]."""
    first = emit(aten.slice.Tensor, x, 0, 0, whole)
    split = emit(aten.reshape.default, first, [count, CHUNK, *(size_of(emit, x, axis) for axis in (1, 2, 3))])
    return emit(aten.permute.default, split, [0, 2, 3, 1, 4])


def _chunk(decayed: bool) -> Step:
    def step(
        inner: Emitter, carries: list[fx.Node], xs: list[fx.Node], masks: list[fx.Node]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        (state,), (q, k, v, *g), (lower, below) = carries, xs, masks
        scores = inner(aten.matmul.default, q, inner(aten.transpose.int, k, -2, -1))
        if not decayed:
            within = inner(aten.matmul.default, inner(aten.mul.Tensor, scores, lower), v)
            out = inner(aten.add.Tensor, inner(aten.matmul.default, q, state), within)
            added = inner(aten.matmul.default, inner(aten.transpose.int, k, -2, -1), v)
            return [inner(aten.add.Tensor, state, added)], [out]
        log = inner(aten.clamp_min.default, g[0], _LOG_ZERO)
        spread = inner(aten.cumsum.default, inner(aten.mul.Tensor, log, below), -2)  # s_ij
        factors = inner(aten.mul.Tensor, inner(aten.exp.default, spread), lower)
        since = inner(aten.exp.default, inner(aten.cumsum.default, log, -2))  # exp(c_i), [.., CHUNK, 1]
        within = inner(aten.matmul.default, inner(aten.mul.Tensor, scores, factors), v)
        across = inner(aten.mul.Tensor, inner(aten.matmul.default, q, state), since)
        until = inner(aten.slice.Tensor, factors, -2, CHUNK - 1, CHUNK)  # exp(s_Qj), [.., 1, CHUNK]
        kept = inner(aten.mul.Tensor, inner(aten.transpose.int, k, -2, -1), until)
        total = inner(aten.slice.Tensor, since, -2, CHUNK - 1, CHUNK)
        following = inner(aten.add.Tensor, inner(aten.mul.Tensor, state, total), inner(aten.matmul.default, kept, v))
        return [following], [inner(aten.add.Tensor, across, within)]

    return step


LOWERINGS = (
    Lowering(
        "seqc::linear_attention",
        "chunked",
        f"matrix products over chunks of {CHUNK} steps in a loop over chunks, what is left over step by step",
        chunked,
    ),
)
