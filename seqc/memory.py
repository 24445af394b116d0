"""How much memory values take, where sizes may be symbolic."""

from __future__ import annotations

from collections.abc import Iterable

import sympy
import torch
import torch.fx as fx

from seqc import _torch

# A free size (a batch, or a sequence read as a whole) counts as this much where memory is estimated.
_FREE_SIZE = 1024


def nbytes(shape: Iterable[int | torch.SymInt], dtype: torch.dtype) -> int:
    """Bytes of a tensor; a free size counts as 1024."""
    total = sympy.Integer(dtype.itemsize)
    for size in shape:
        expr = _torch.size_expr(size)
        total *= expr.subs(dict.fromkeys(expr.free_symbols, _FREE_SIZE))
    return int(total)


def node_bytes(nodes: Iterable[fx.Node]) -> int:
    """Bytes of all tensors that ``nodes`` are."""
    return sum(nbytes(leaf.shape, leaf.dtype) for node in nodes for leaf in _leaves(node))


def _leaves(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta["val"]
    return [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, torch.Tensor)]
