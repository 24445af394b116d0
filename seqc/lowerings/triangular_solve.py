"""Forms of ``aten::linalg_solve_triangular``: row by row, or a block of rows at a time by the inverse of its diagonal block."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import Lowering, Refused, size_of
from seqc.lowerings.blocks import padded, whole_blocks
from seqc.lowerings.triangular_inverse import inverse_masks, inverse_of
from seqc.program import named_args
from seqc.write_loop import write_loop

aten = torch.ops.aten

SIZE = 64


def rows(emit: Emitter, node: fx.Node) -> None:
    """It stays as it is: the backend has a substitution of its own."""


def blocks(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """With A = D (1 + N), and x the blocks solved so far and zeros below: x_i = (1 + N_ii)^-1 (D^-1 b_i - N_i x)."""
    arg = named_args(node)
    a, b, upper = arg["self"], arg["B"], arg["upper"]
    if a.meta["val"].shape[:-2] != b.meta["val"].shape[:-2]:
        raise Refused("the batches of the two sides are not the same")
    if a.meta["val"].dtype not in (torch.float32, torch.float64):
        raise Refused(f"an inverse loses too much in {a.meta['val'].dtype}")
    if not arg["left"]:  # x a = b is a^T x^T = b^T
        a, b, upper = emit(aten.transpose.int, a, -2, -1), emit(aten.transpose.int, b, -2, -1), not upper
    if upper:  # its rows and columns from the end are lower triangular
        a, b = emit(aten.flip.default, a, [-2, -1]), emit(aten.flip.default, b, [-2])
    if not arg["unitriangular"]:
        diagonal = emit(aten.unsqueeze.default, emit(aten.diagonal.default, a, 0, -2, -1), -1)
        a, b = emit(aten.div.Tensor, a, diagonal), emit(aten.div.Tensor, b, diagonal)
    x = _solved(emit, emit(aten.tril.default, a, -1), b)
    x = emit(aten.flip.default, x, [-2]) if upper else x
    return [x if arg["left"] else emit(aten.transpose.int, x, -2, -1)]


def _solved(emit: Emitter, a: fx.Node, b: fx.Node) -> fx.Node:
    """(1 + a)^-1 b for a strictly lower triangular ``a`` [.., n, n] and ``b`` [.., n, columns]."""
    rank = a.meta["val"].dim()
    first = [rank - 2, rank - 1, *range(rank - 2)]
    batch = [size_of(emit, a, axis) for axis in range(rank - 2)]
    n, columns = size_of(emit, a, rank - 1), size_of(emit, b, rank - 1)
    count, whole, missing = whole_blocks(emit, n, SIZE)

    def rows_first(x: fx.Node, columns: Any, fill_columns: bool) -> fx.Node:
        """[count, .., SIZE, columns] of x [.., n, columns], with zeros behind the last row."""
        x = emit(aten.permute.default, x, first)
        if missing != 0:
            x = padded(emit, x, missing)
            if fill_columns:
                x = emit(aten.transpose.int, padded(emit, emit(aten.transpose.int, x, 0, 1), missing), 0, 1)
        x = emit(aten.reshape.default, x, [count, SIZE, columns, *batch])
        return emit(aten.permute.default, x, [0, *range(3, rank + 1), 1, 2])

    left, right = rows_first(a, whole, True), rows_first(b, columns, False)
    numbers = emit(aten.arange.default, count)
    here = emit(aten.eq.Tensor, emit(aten.unsqueeze.default, numbers, 1), numbers)
    here = emit(aten._to_copy.default, here, dtype=a.meta["val"].dtype)  # [count, count]
    by_block = emit(aten.reshape.default, left, [count, *batch, SIZE, count, SIZE])
    at = emit(aten.reshape.default, here, [count, *[1] * len(batch), 1, count, 1])
    own = emit(aten.sum.dim_IntList, emit(aten.mul.Tensor, by_block, at), [-2])
    inverse = inverse_of(emit, own, inverse_masks(emit, SIZE, a.meta["val"].dtype))
    nothing = emit(aten.full.default, [*batch, whole, columns], 0.0, dtype=b.meta["val"].dtype)

    def step(
        emit: Emitter, carries: list[fx.Node], xs: list[fx.Node], _: list[fx.Node]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        (solved,), (left, right, inverse, here) = carries, xs
        known = emit(aten.matmul.default, left, solved)
        x = emit(aten.matmul.default, inverse, emit(aten.sub.Tensor, right, known))
        place = emit(aten.unsqueeze.default, emit(aten.unsqueeze.default, here, -1), -1)
        added = emit(aten.mul.Tensor, emit(aten.unsqueeze.default, x, -3), place)
        shape = [size_of(emit, solved, axis) for axis in range(rank)]
        return [emit(aten.add.Tensor, solved, emit(aten.reshape.default, added, shape))], []

    (solved,) = write_loop(emit, step, count, [nothing], [left, right, inverse, here])
    return solved if missing == 0 else emit(aten.slice.Tensor, solved, rank - 2, 0, n)


LOWERINGS = (
    Lowering("aten::linalg_solve_triangular", "rows", "substitution, a loop over rows", rows),
    Lowering(
        "aten::linalg_solve_triangular",
        "blocks",
        f"triangular inverses of all blocks of {SIZE} rows at once, matrix products in a loop over blocks",
        blocks,
    ),
)
