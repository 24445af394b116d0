"""GroupQueries: keys and values that are repeated for several heads of queries are read where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from seqc.emit import Emitter, rewrite_nodes
from seqc.program import Program, named_args, place_of
from seqc.rewrite import replace_node

aten = torch.ops.aten

_MERGES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_COPIES = (aten.clone.default, aten.contiguous.default)


@dataclass(frozen=True)
class GroupQueries:
    """Attention whose keys and values are repeated, each head for a group of queries' heads, takes them as they are.

        k, v = (x[:, :, None].expand(b, heads, groups, n, size).reshape(b, heads * groups, n, size) for x in (k, v))
        y = attention(q, k, v)    ->    y = attention(q, k, v, enable_gqa=True)    grouped-query attention, Ainslie et al. 2023

    Decoding then reads a cache once instead of writing and reading a larger copy of it in each step.

    ``tolerance``: the same products and sums, of matrices of other shapes.
    """

    name: ClassVar[str] = "group_queries"
    tolerance: ClassVar[float] = 1e-6

    def __call__(self, program: Program) -> int:
        return rewrite_nodes(program, _grouped)


def _grouped(program: Program, emit: Emitter, node: fx.Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    arg = named_args(node)
    repeated = [_repeated(arg[name]) for name in ("key", "value")]
    if arg["enable_gqa"] or arg["query"].meta["val"].dim() != 4 or None in repeated:
        return False
    (key, groups), (value, others) = repeated  # type: ignore[misc]
    if groups != others:
        return False
    with emit.before(node):
        own = [emit(aten.squeeze.dims, x, [2]) if x.meta["val"].dim() == 5 else x for x in (key, value)]
        settings = {"scale": arg["scale"], "enable_gqa": True}
        new = emit(node.target, arg["query"], *own, arg["attn_mask"], arg["dropout_p"], arg["is_causal"], **settings)
    replace_node(node, new)
    program.reasons.append(f"{place_of(new)}: {groups} heads of queries read each head of keys and values")
    return True


def _repeated(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, groups) where ``node`` [b, heads * groups, n, size] has each head of x [b, heads, (1,) n, size] so often."""
    merged = _without_copies(node)
    if merged.target is aten.repeat_interleave.self_int:
        source, repeats, axis, _ = named_args(merged).values()
        return (source, repeats) if axis in (1, -3) and isinstance(repeats, int) else None
    if merged.target not in _MERGES:
        return None
    expanded = _without_copies(merged.args[0])
    if expanded.target is not aten.expand.default:
        return None
    source = expanded.args[0]
    assert isinstance(source, fx.Node)
    small, large = source.meta["val"].shape, expanded.meta["val"].shape
    if len(small) != 5 or len(large) != 5 or not isinstance(large[2], int) or small[2] != 1:
        return None
    whole = (*large[:1], large[1] * large[2], *large[3:])
    kept = all(a is b or a == b for a, b in zip((*small[:2], *small[3:]), (*large[:2], *large[3:]), strict=True))
    same = tuple(map(str, whole)) == tuple(map(str, node.meta["val"].shape))
    return (source, large[2]) if kept and same else None


def _without_copies(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return _without_copies(value.args[0]) if value.target in _COPIES else value
