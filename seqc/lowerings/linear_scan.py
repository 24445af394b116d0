"""Forms of ``seqc::linear_scan``."""

from __future__ import annotations

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import Lowering, trip_of
from seqc.program import named_args
from seqc.write_loop import write_loop

aten = torch.ops.aten


def sequential(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """One multiplication and one addition per step, in a loop."""
    decay, update, state, reverse = named_args(node).values()

    def step(
        inner: Emitter, carries: list[fx.Node], xs: list[fx.Node], _: list[fx.Node]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        kept = inner(aten.mul.Tensor, xs[0], carries[0])
        following = inner(aten.add.Tensor, kept, xs[1])
        return [following], [following]

    final, steps = write_loop(emit, step, trip_of(emit, update), [state], [decay, update], reverse=reverse)
    return [steps, final]


LOWERINGS = (
    Lowering(
        "seqc::linear_scan",
        "sequential",
        "a loop of one multiplication and one addition per step",
        sequential,
    ),
)
