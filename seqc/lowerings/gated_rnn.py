"""Forms of ``seqc::gated_rnn``."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import Lowering, Refused, trip_of
from seqc.lowerings.projection import projection
from seqc.ops.gated_rnn import GATES
from seqc.program import named_args
from seqc.write_loop import write_loop

aten = torch.ops.aten


def native(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """ONNX's own operator, which multiplies the inputs by their weights itself."""
    gates, recurrent, bias, state, cell, kind, reverse = named_args(node).values()
    dtype = gates.meta["val"].dtype
    if dtype not in (torch.float32, torch.float16):
        raise Refused(f"runtimes compute it in float32 and float16, not in {dtype}")
    found = projection(emit, gates)
    if found is None or found.x.meta["val"].dim() != 3:
        raise Refused("what enters the gates is not one matrix product of an input")
    size = recurrent.meta["val"].shape[0]
    own = found.bias if found.bias is not None else emit(aten.new_zeros.default, recurrent, [size])
    args = (found.x, found.weight, recurrent, own, bias, state, cell, kind, reverse)
    written = emit(torch.ops.seqc.onnx_rnn.default, *args)
    return [emit(operator.getitem, written, i) for i in range(3)]


def sequential(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """One matrix product of the state per step (two where the reset gate comes before it), in a loop."""
    gates, recurrent, bias, state, cell, kind, reverse = named_args(node).values()
    size = state.meta["val"].shape[-1]

    def part(inner: Emitter, value: fx.Node, index: int, axis: int = -1, count: int = 1) -> fx.Node:
        return inner(aten.slice.Tensor, value, axis, index * size, (index + count) * size)

    def lstm(inner: Emitter, pre: fx.Node, c: fx.Node) -> list[fx.Node]:
        i, f, g, o = (part(inner, pre, k) for k in range(4))
        added = inner(aten.mul.Tensor, inner(aten.sigmoid.default, i), inner(aten.tanh.default, g))
        c = inner(aten.add.Tensor, inner(aten.mul.Tensor, inner(aten.sigmoid.default, f), c), added)
        return [inner(aten.mul.Tensor, inner(aten.sigmoid.default, o), inner(aten.tanh.default, c)), c]

    def gru(inner: Emitter, x: fx.Node, h: fx.Node, matrix: fx.Node, added: fx.Node) -> fx.Node:
        before = kind == "gru_reset_before"
        count = 2 if before else 3
        product = inner(aten.linear.default, h, part(inner, matrix, 0, 0, count), part(inner, added, 0, 0, count))
        pre = inner(aten.add.Tensor, part(inner, x, 0, count=2), part(inner, product, 0, count=2))
        r, z = (inner(aten.sigmoid.default, part(inner, pre, k)) for k in range(2))
        if before:
            rows = (part(inner, value, 2, 0) for value in (matrix, added))
            again = inner(aten.linear.default, inner(aten.mul.Tensor, r, h), *rows)
        else:
            again = inner(aten.mul.Tensor, r, part(inner, product, 2))
        n = inner(aten.tanh.default, inner(aten.add.Tensor, part(inner, x, 2), again))
        return inner(aten.add.Tensor, n, inner(aten.mul.Tensor, z, inner(aten.sub.Tensor, h, n)))

    def step(
        inner: Emitter, carries: list[fx.Node], xs: list[fx.Node], invariants: list[fx.Node]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        following = _step(inner, carries, xs[0], invariants)
        return following, [following[0]]

    def _step(inner: Emitter, carries: list[fx.Node], x: fx.Node, invariants: list[fx.Node]) -> list[fx.Node]:
        if GATES[kind] == 3:
            return [gru(inner, x, carries[0], *invariants)]
        pre = inner(aten.add.Tensor, x, inner(aten.linear.default, carries[0], *invariants))
        if kind == "lstm":
            return lstm(inner, pre, carries[1])
        return [inner(aten.tanh.default if kind == "rnn_tanh" else aten.relu.default, pre)]

    carries = [state, cell] if kind == "lstm" else [state]
    *finals, steps = write_loop(emit, step, trip_of(emit, gates), carries, [gates], [recurrent, bias], reverse)
    last_cell: Any = finals[1] if kind == "lstm" else cell
    return [steps, finals[0], last_cell]


LOWERINGS = (
    Lowering(
        "seqc::gated_rnn",
        "native",
        "the standard operator LSTM, GRU or RNN, with the input projection inside",
        native,
    ),
    Lowering(
        "seqc::gated_rnn",
        "sequential",
        "a loop of one matrix product per step",
        sequential,
    ),
)
