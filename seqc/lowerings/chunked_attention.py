"""Chunked forms of ``seqc::linear_attention``, for one decay per head: matrix products over 64 steps at a time.

With the decays g of a chunk, s_ij = g_{j+1} + .. + g_i and c_i = g_1 + .. + g_i:

    out_i  = exp(c_i) q_i S + sum_{j <= i} exp(s_ij) (q_i k_j) u_j
    S_next = exp(c_Q) S + sum_j exp(s_Qj) k_j u_j^T

where u = v, or for the delta rules, whose step is S_i = exp(g_i) S_{i-1} + k_i u_i^T, the solution of

    (1 + A) u = beta (v - exp(c) k S)        A_ij = beta_i exp(s_ij) (k_i k_j) for j < i

Every exponent is a sum of decays of its own, not a difference of cumulative sums, so no digits are lost. Sources: Dao and Gu,
"Transformers are SSMs" (2024), section 6; Yang et al., "Parallelizing linear transformers with the delta rule" (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import Lowering, Refused, Step, size_of, trip_of
from seqc.lowerings.blocks import padded, whole_blocks
from seqc.lowerings.linear_attention import both_ways
from seqc.lowerings.triangular_inverse import inverse_masks, inverse_of
from seqc.program import named_args
from seqc.write_loop import write_loop

aten = torch.ops.aten

CHUNK = 64

# By tests.benchmarks.scans at 2 to 24 heads and lengths of 4 to 2000: with keys of each head's own, or states of up to this
# size, ``contrib`` takes 0.2 to 1.1 times as long as ``chunked``. With keys that all heads share, whose products are then taken
# once, it takes 1.3 to 1.5 times as long from a whole chunk on, and less for fewer steps.
SMALL = 64 * 64
FEW = 45

# The steps of a loop that take as long as a chunk.
FEW_STEPS = 7
FEW_DELTA_STEPS = 17

# Stands for log(0) where it is multiplied by 0: its exponential is 0 too, and 64 of them add up to a finite number.
_LOG_ZERO = -1e30


@both_ways
def chunked(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """The rules without an update rate."""
    if named_args(node)["beta"] is not None:
        raise Refused("the delta rules have a form of their own, chunked_delta")
    return _in_a_loop(emit, node)


@both_ways
def chunked_delta(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """The delta rules."""
    if named_args(node)["beta"] is None:
        raise Refused("it is not a delta rule")
    return _in_a_loop(emit, node)


def _in_a_loop(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """Chunks in a loop; behind the last step are steps that leave the state as it is, of no key, decay and update rate."""
    query, key, value, state, decay, beta, _ = named_args(node).values()
    if decay is not None and decay.meta["val"].shape[3] != 1:
        raise Refused("a decay for each key dimension")
    dtype = value.meta["val"].dtype
    if dtype not in (torch.float32, torch.float64):
        raise Refused(f"sums over a chunk lose too much in {dtype}")
    trip = trip_of(emit, value)
    count, whole, missing = whole_blocks(emit, trip, CHUNK)
    rate = None if beta is None else emit(aten.unsqueeze.default, beta, -1)
    given = [x for x in (query, key, value, decay, rate) if x is not None]
    if missing != 0:
        given = [padded(emit, x, missing) for x in given]
    xs = [chunks(emit, x, count) for x in given]
    body = _chunk(decay is not None, beta is not None)
    final, out = write_loop(emit, body, count, [state], xs, masks(emit, dtype, delta=beta is not None))
    sizes = [size_of(emit, value, axis) for axis in (1, 2, 3)]
    out = emit(aten.reshape.default, emit(aten.permute.default, out, [0, 3, 1, 2, 4]), [whole, *sizes])
    return [out if missing == 0 else emit(aten.slice.Tensor, out, 0, 0, trip), final]


def chunks(emit: Emitter, x: fx.Node, count: Any) -> fx.Node:
    """[count * CHUNK, batch, heads, size] as [count, batch, heads, CHUNK, size]."""
    split = emit(aten.reshape.default, x, [count, CHUNK, *(size_of(emit, x, axis) for axis in (1, 2, 3))])
    return emit(aten.permute.default, split, [0, 2, 3, 1, 4])


def triangles(emit: Emitter, dtype: torch.dtype) -> list[fx.Node]:
    """[CHUNK, CHUNK]: 1 where j <= i, and where j < i."""
    ones = emit(aten.ones.default, [CHUNK, CHUNK], dtype=dtype)
    return [emit(aten.tril.default, ones), emit(aten.tril.default, ones, -1)]


def masks(emit: Emitter, dtype: torch.dtype, delta: bool) -> list[fx.Node]:
    """[CHUNK, CHUNK]: j <= i, and j < i; for delta rules also what :func:`inverse_of` reads."""
    lower, below = triangles(emit, dtype)
    if not delta:
        return [lower, below]
    return [lower, below, *inverse_masks(emit, CHUNK, dtype)]


@dataclass(frozen=True)
class Decays:
    """What the decays of a chunk multiply, None for no decay: ``factors`` [.., CHUNK, CHUNK] are exp(s_ij) for j <= i and 0
    above, ``since`` [.., CHUNK, 1] exp(c_i), ``until`` [.., 1, CHUNK] exp(s_Qj), ``total`` [.., 1, 1] exp(c_Q)."""

    factors: fx.Node
    since: fx.Node | None = None
    until: fx.Node | None = None
    total: fx.Node | None = None

    @classmethod
    def of(cls, emit: Emitter, logs: fx.Node | None, lower: fx.Node, below: fx.Node) -> Decays:
        """Of the logarithms [.., CHUNK, 1]."""
        if logs is None:
            return cls(lower)
        log = emit(aten.clamp_min.default, logs, _LOG_ZERO)
        spread = emit(aten.cumsum.default, emit(aten.mul.Tensor, log, below), -2)
        factors = emit(aten.mul.Tensor, emit(aten.exp.default, spread), lower)
        since = emit(aten.exp.default, emit(aten.cumsum.default, log, -2))
        until = emit(aten.slice.Tensor, factors, -2, CHUNK - 1, CHUNK)
        return cls(factors, since, until, emit(aten.slice.Tensor, since, -2, CHUNK - 1, CHUNK))


def times(emit: Emitter, x: fx.Node, factor: fx.Node | None) -> fx.Node:
    return x if factor is None else emit(aten.mul.Tensor, x, factor)


def _chunk(decayed: bool, delta: bool) -> Step:
    def step(
        emit: Emitter, carries: list[fx.Node], xs: list[fx.Node], fixed: list[fx.Node]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        (state,), (q, k, u, *rest), (lower, below, *inverting) = carries, xs, fixed
        keys = emit(aten.transpose.int, k, -2, -1)
        decays = Decays.of(emit, rest.pop(0) if decayed else None, lower, below)
        factors, since = decays.factors, decays.since
        if delta:
            (rate,) = rest
            alike = emit(aten.mul.Tensor, emit(aten.matmul.default, k, keys), emit(aten.mul.Tensor, factors, below))
            seen = times(emit, emit(aten.matmul.default, k, state), since)
            wanted = emit(aten.mul.Tensor, rate, emit(aten.sub.Tensor, u, seen))
            u = emit(aten.matmul.default, inverse_of(emit, emit(aten.mul.Tensor, rate, alike), inverting), wanted)
        scores = emit(aten.mul.Tensor, emit(aten.matmul.default, q, keys), factors)
        within = emit(aten.matmul.default, scores, u)
        across = times(emit, emit(aten.matmul.default, q, state), since)
        added = emit(aten.matmul.default, times(emit, keys, decays.until), u)
        return [emit(aten.add.Tensor, times(emit, state, decays.total), added)], [emit(aten.add.Tensor, across, within)]

    return step


def _faster(node: fx.Node) -> dict[str, float]:
    operands = named_args(node)
    _, heads, keys, values = operands["state"].meta["val"].shape
    own = operands["key"].meta["val"].shape[2] == heads
    return {"contrib": math.inf if own or keys * values <= SMALL else FEW, "sequential": FEW_STEPS}


def _faster_delta(node: fx.Node) -> dict[str, float]:
    return {"contrib": math.inf, "sequential": FEW_DELTA_STEPS}


LOWERINGS = (
    Lowering(
        "seqc::linear_attention",
        "chunked",
        f"matrix products over chunks of {CHUNK} steps in a loop over chunks",
        chunked,
        short=_faster,
        timed="value",
    ),
    Lowering(
        "seqc::linear_attention",
        "chunked_delta",
        f"matrix products and a triangular inverse over chunks of {CHUNK} steps in a loop over chunks",
        chunked_delta,
        short=_faster_delta,
        timed="value",
    ),
)
