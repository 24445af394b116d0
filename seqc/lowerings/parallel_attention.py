"""``seqc::linear_attention`` with all chunks at once: the formulas of ``chunked``, and a prefix scan over the states."""

from __future__ import annotations

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import Lowering, Refused, size_of
from seqc.lowerings.blocks import Blocks
from seqc.lowerings.chunked_attention import CHUNK, Decays, chunks, times, triangles
from seqc.program import named_args

aten = torch.ops.aten


def parallel_chunks(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """The rules without an update rate, for one decay per head."""
    query, key, value, state, decay, beta, reverse = named_args(node).values()
    if beta is not None:
        raise Refused("the delta rules mix the state from chunk to chunk")
    if decay is not None and decay.meta["val"].shape[3] != 1:
        raise Refused("a decay for each key dimension")
    if reverse:
        raise Refused("it walks forward only")
    if value.meta["val"].dtype not in (torch.float32, torch.float64):
        raise Refused(f"sums over a chunk lose too much in {value.meta['val'].dtype}")
    blocks = Blocks(emit, value, size=CHUNK)
    q, k, v = (_chunks(emit, blocks, x) for x in (query, key, value))
    logs = None if decay is None else _chunks(emit, blocks, decay)
    lower, below = triangles(emit, value.meta["val"].dtype)
    decays = Decays.of(emit, logs, lower, below)
    keys = emit(aten.transpose.int, k, -2, -1)
    added = emit(aten.matmul.default, times(emit, keys, decays.until), v)  # [count, batch, heads, K, V]
    kept = decays.total
    if kept is None:
        kept = emit(aten.full.default, [blocks.count, 1, 1, 1, 1], 1.0, dtype=value.meta["val"].dtype)
    entering, final = blocks.entering(kept, added, state)
    scores = emit(aten.mul.Tensor, emit(aten.matmul.default, q, keys), decays.factors)
    across = times(emit, emit(aten.matmul.default, q, entering), decays.since)
    out = emit(aten.add.Tensor, emit(aten.matmul.default, scores, v), across)
    return [blocks.joined(emit(aten.permute.default, out, [0, 3, 1, 2, 4]), emit(aten.select.int, value, 0, 0)), final]


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
)
