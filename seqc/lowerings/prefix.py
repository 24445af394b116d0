"""Linear recurrences as prefix scans: blocks of unrolled steps, and a scan of logarithmic depth over the blocks.

Nothing is divided, so decays of 0 are exact. For machines on which a loop of small operations costs a kernel each.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import Lowering
from seqc.lowerings.blocks import BLOCK, Blocks
from seqc.program import named_args

aten = torch.ops.aten


def linear_scan(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """Each element's recurrence."""
    decay, update, state, reverse = named_args(node).values()
    blocks = Blocks(emit, update, reverse)
    split = [blocks.split(decay, 1.0), blocks.split(update, 0.0)]
    (inner_a, inner_b), (total_a, total_b) = blocks.each_step(split, blocks.affine)
    entering, final = blocks.entering(total_a, total_b, state)
    steps = emit(aten.add.Tensor, emit(aten.mul.Tensor, inner_a, emit(aten.unsqueeze.default, entering, 1)), inner_b)
    return [blocks.joined(steps, state), final]


def selective_scan(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """The blocks' last states are found first; from these each block's steps are taken again, and read out at once.

    No value holds the states of all steps: the largest is that of one state per block.
    """
    x, dt, rates, b, c, state, reverse = named_args(node).values()
    blocks = Blocks(emit, x, reverse)
    xs = [blocks.split(value, 0.0) for value in (x, dt, b, c)]
    steps = [[emit(aten.select.int, value, 1, i) for value in xs] for i in range(BLOCK)]

    def after(h: fx.Node | None, i: int) -> fx.Node:
        x_i, dt_i, b_i, _ = steps[i]
        added = emit(aten.mul.Tensor, _column(emit, x_i), emit(aten.unsqueeze.default, b_i, -2))
        if h is None:
            return added
        decay = emit(aten.exp.default, emit(aten.mul.Tensor, _column(emit, dt_i), rates))
        return emit(aten.add.Tensor, emit(aten.mul.Tensor, decay, h), added)

    total: fx.Node | None = None
    for i in blocks.order:
        total = after(total, i)
    assert total is not None
    exponent = emit(aten.mul.Tensor, _column(emit, emit(aten.sum.dim_IntList, xs[1], [1])), rates)
    h, final = blocks.entering(emit(aten.exp.default, exponent), total, state)
    out: dict[int, fx.Node] = {}
    for i in blocks.order:
        h = after(h, i)
        read = emit(aten.mul.Tensor, h, emit(aten.unsqueeze.default, steps[i][3], -2))
        out[i] = emit(aten.sum.dim_IntList, read, [-1])
    y = emit(aten.stack.default, [out[i] for i in range(BLOCK)], 1)
    return [blocks.joined(y, emit(aten.select.int, state, -1, 0)), final]


def _column(emit: Emitter, x: fx.Node) -> fx.Node:
    return emit(aten.unsqueeze.default, x, -1)


LOWERINGS = (
    Lowering(
        "seqc::linear_scan",
        "prefix",
        f"blocks of {BLOCK} unrolled steps and a scan of logarithmic depth over the blocks: few kernels, no loop",
        linear_scan,
    ),
    Lowering(
        "seqc::selective_scan",
        "prefix",
        f"blocks of {BLOCK} unrolled steps, taken twice, and a scan of logarithmic depth over the blocks: no loop",
        selective_scan,
    ),
)
