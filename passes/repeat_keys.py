"""RepeatKeys: each head of queries gets keys and values of its own, for kernels that take as many of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from seqc.emit import Emitter, rewrite_nodes
from seqc.lowerings.base import size_of
from seqc.program import Program, named_args, place_of
from seqc.rewrite import replace_node

aten = torch.ops.aten


@dataclass(frozen=True)
class RepeatKeys:
    """Grouped attention of several steps in 16 bits takes repeated keys and values: the reverse of ``group_queries``.

        y = attention(q, k, v, enable_gqa=True)    ->    y = attention(q, repeated(k), repeated(v))

    For targets that build engines: TensorRT fuses attention in float16 and bfloat16 into one kernel, which takes as many heads
    of keys as of queries; grouped, its scores [heads, length, length] stand in memory (for a layer of four heads of 64 and
    lengths to 2048: 16 kernels and 24 MB against 21 and 76). It fuses none in float32, and one step reads its cache best where
    that is.

    ``tolerance``: the same products and sums, of matrices of other shapes.
    """

    name: ClassVar[str] = "repeat_keys"
    tolerance: ClassVar[float] = 1e-6

    def __call__(self, program: Program) -> int:
        return rewrite_nodes(program, _repeated)


def _repeated(program: Program, emit: Emitter, node: fx.Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    arg = named_args(node)
    query, key = arg["query"].meta["val"], arg["key"].meta["val"]
    if not arg["enable_gqa"] or query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-2] == 1:
        return False
    heads, own = query.shape[-3], key.shape[-3]
    if query.dim() != 4 or not isinstance(heads, int) or not isinstance(own, int) or heads == own:
        return False
    with emit.before(node):
        key, value = (_each(emit, arg[name], heads // own) for name in ("key", "value"))
        rest = arg["attn_mask"], arg["dropout_p"], arg["is_causal"]
        new = emit(node.target, arg["query"], key, value, *rest, scale=arg["scale"])
    replace_node(node, new)
    program.reasons.append(f"{place_of(new)}: keys and values are repeated for {heads // own} heads of queries each")
    return True


def _each(emit: Emitter, x: fx.Node, groups: int) -> fx.Node:
    """``x`` [batch, heads, n, size] with each head ``groups`` times."""
    batch, heads, steps, size = (size_of(emit, x, axis) for axis in range(4))
    wide = emit(aten.expand.default, emit(aten.unsqueeze.default, x, 2), [-1, -1, groups, -1, -1])
    return emit(aten.reshape.default, wide, [batch, heads * groups, steps, size])
