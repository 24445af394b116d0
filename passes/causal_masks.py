"""CausalMasks: a mask that lets each step attend to itself and all before it is not computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch
import torch.fx as fx

from seqc import _torch
from seqc.emit import Emitter, rewrite_nodes
from seqc.program import Program, named_args, place_of
from seqc.rewrite import replace_node
from seqc.streaming.causal import is_nothing
from seqc.streaming.concrete import Concrete
from seqc.streaming.positions import enough_steps

aten = torch.ops.aten

_LONGEST = 2053
"""Masks of more steps, where a literal in them asks for that, are not looked at: they may be wide windows."""


@dataclass(frozen=True)
class CausalMasks:
    """Attention with a mask made of positions alone that is the causal one says so, and has no mask.

        allowed = positions[None, :] <= positions[:, None]
        y = attention(q, k, v, allowed)    ->    y = attention(q, k, v, is_causal=True)

    Masks of transformers also rule out what other documents packed into the row hold; without position ids there are none.
    The mask is looked at: at lengths beyond every literal that it is computed with, and at short ones. Backends then write
    a mask that no step finds empty, and need not ask: for that TensorRT would hold it in memory, a byte for each pair of
    steps, in two more kernels.

    ``tolerance``: the same numbers.
    """

    name: ClassVar[str] = "causal_masks"
    tolerance: ClassVar[float] = 0.0

    def __call__(self, program: Program) -> int:
        known: dict[fx.Node, bool] = {}

        def unmasked(program: Program, emit: Emitter, node: fx.Node) -> bool:
            if node.target is not aten.scaled_dot_product_attention.default or emit.gm is not program.graph_module:
                return False
            arg = named_args(node)
            mask = arg["attn_mask"]
            if not isinstance(mask, fx.Node):
                return False
            if mask not in known:
                known[mask] = _is_causal(program, mask)
            if not known[mask]:
                return False
            given = [arg[name] for name in ("query", "key", "value")]
            with emit.before(node):
                settings = {"scale": arg["scale"], "enable_gqa": arg["enable_gqa"]}
                new = emit(node.target, *given, None, arg["dropout_p"], True, **settings)
            replace_node(node, new)
            program.reasons.append(f"{place_of(new)}: its mask is the causal one at every length")
            return True

        return rewrite_nodes(program, unmasked)


def _is_causal(program: Program, mask: fx.Node) -> bool:
    shape, length = mask.meta["val"].shape, enough_steps(mask)
    if len(shape) < 2 or length is None or length > _LONGEST:
        return False
    rows, columns = (_torch.size_expr(size) for size in shape[-2:])
    if rows != columns or rows.is_Integer:
        return False
    return all(_is_causal_at(program, mask, sizes) for sizes in _sizes(program, rows, length))


def _sizes(program: Program, rows: Any, length: int) -> Iterator[dict[sympy.Symbol, int]]:
    """Sizes of all dimensions: one step, two, many, and a few of each dimension that is no length."""
    for steps in (1, 2, length // 2, length):
        for others in (1, 3):
            wanted = {dim: steps if dim.symbol in rows.free_symbols else others for dim in program.dims}
            yield {dim.symbol: max(dim.min, min(size, dim.max or size)) for dim, size in wanted.items()}


def _is_causal_at(program: Program, mask: fx.Node, sizes: dict[sympy.Symbol, int]) -> bool:
    try:
        value = Concrete(program.weights, sizes).value(mask)
    except Exception:  # what cannot be computed from positions alone is no such mask
        return False
    causal = torch.ones(value.shape[-2:], dtype=torch.bool).tril().expand_as(value)
    if value.dtype is torch.bool:
        return torch.equal(value, causal)
    later = value[~causal]
    return not bool(value[causal].any()) and (not later.numel() or is_nothing(float(later.max())))
