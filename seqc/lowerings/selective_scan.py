"""Forms of ``seqc::selective_scan``."""

from __future__ import annotations

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import Lowering, trip_of
from seqc.program import named_args
from seqc.write_loop import write_loop

aten = torch.ops.aten


def channels_last(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """A loop over the state as [batch, N, D]: the long axis contiguous, the exponential in the body."""
    x, dt, a, b, c, state, reverse = named_args(node).values()

    def step(
        inner: Emitter, carries: list[fx.Node], xs: list[fx.Node], invariants: list[fx.Node]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        (h,), (x_t, dt_t, b_t, c_t), (rates,) = carries, xs, invariants
        decay = inner(aten.exp.default, inner(aten.mul.Tensor, dt_t, rates))
        added = inner(aten.mul.Tensor, b_t, x_t)
        following = inner(aten.add.Tensor, inner(aten.mul.Tensor, decay, h), added)
        return [following], [inner(aten.matmul.default, c_t, following)]

    # In front of the loop a view costs nothing, in its body an operation per step.
    rows = [emit(aten.unsqueeze.default, value, 2) for value in (x, dt)]
    vectors = [emit(aten.unsqueeze.default, b, 3), emit(aten.unsqueeze.default, c, 2)]
    rates = emit(aten.permute.default, a, [1, 0])
    first = emit(aten.permute.default, state, [0, 2, 1])
    final, y = write_loop(emit, step, trip_of(emit, x), [first], [*rows, *vectors], [rates], bool(reverse))
    return [emit(aten.squeeze.dim, y, 2), emit(aten.permute.default, final, [0, 2, 1])]


LOWERINGS = (
    Lowering(
        "seqc::selective_scan",
        "channels_last",
        "a loop with the state as [N, D], its long axis contiguous, and the exponentials in the body",
        channels_last,
    ),
)
