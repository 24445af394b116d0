"""The inverse of triangular matrices with ones on the diagonal, by matrix products: block by block, doubling.

The inverse of [[P, 0], [C, R]] is [[P', 0], [-R' C P', R']], that is X - X C X with X = diag(P', R').
"""

from __future__ import annotations

import itertools

import torch
import torch.fx as fx

from seqc.emit import Emitter

aten = torch.ops.aten

# Blocks of this size are inverted by the Neumann series, larger ones from these: for keys that are alike, the series of a
# whole chunk is wrong by any amount (measured: 3e6 at 32 steps).
_BASE = 8


def inverse_masks(emit: Emitter, size: int, dtype: torch.dtype) -> list[fx.Node]:
    """What :func:`inverse_of` reads for matrices [.., size, size], a power of two of 8 or more: the diagonal, the blocks that
    it begins with, and of each level what lies below the diagonal in its blocks but not in those of the level before."""
    ones = emit(aten.ones.default, [size, size], dtype=dtype)
    lower, below = emit(aten.tril.default, ones), emit(aten.tril.default, ones, -1)
    sizes = [_BASE]
    while sizes[-1] < size:
        sizes.append(2 * sizes[-1])
    blocks = [_same_block(emit, size, block, dtype) for block in sizes]
    levels = [
        emit(aten.mul.Tensor, below, emit(aten.sub.Tensor, large, small)) for small, large in itertools.pairwise(blocks)
    ]
    return [emit(aten.sub.Tensor, lower, below), emit(aten.mul.Tensor, below, blocks[0]), *levels]


def _same_block(emit: Emitter, size: int, block: int, dtype: torch.dtype) -> fx.Node:
    """[size, size]: 1 where row and column lie in one diagonal block of that size."""
    numbers = emit(aten.arange.default, size)
    at = emit(aten.div.Tensor_mode, numbers, block, rounding_mode="floor")
    same = emit(aten.eq.Tensor, emit(aten.unsqueeze.default, at, 1), at)
    return emit(aten._to_copy.default, same, dtype=dtype)


def inverse_of(emit: Emitter, a: fx.Node, masks: list[fx.Node]) -> fx.Node:
    """(1 + a)^-1 for a strictly lower triangular ``a`` [.., size, size]."""
    diagonal, base, *levels = masks
    power = emit(aten.mul.Tensor, a, base)
    inverse = emit(aten.sub.Tensor, diagonal, power)
    size = 2
    while size < _BASE:  # (1 - p)(1 + p^2)(1 + p^4): p^8 is 0
        power = emit(aten.matmul.default, power, power)
        inverse = emit(aten.add.Tensor, inverse, emit(aten.matmul.default, inverse, power))
        size *= 2
    for level in levels:
        corner = emit(aten.matmul.default, emit(aten.mul.Tensor, a, level), inverse)
        inverse = emit(aten.sub.Tensor, inverse, emit(aten.matmul.default, inverse, corner))
    return inverse
