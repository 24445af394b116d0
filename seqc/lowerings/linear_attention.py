"""Forms of ``seqc::linear_attention``."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import STANDARD_DTYPES, Lowering, Refused, size_of, trip_of
from seqc.lowerings.reverse import flipped
from seqc.ops.linear_attention import rule_of
from seqc.program import named_args
from seqc.write_loop import write_loop

aten = torch.ops.aten


both_ways = flipped(("query", "key", "value", "decay", "beta"), walked=1)


def sequential(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """A loop over the state [batch, heads, K, V]."""
    return list(steps(emit, *named_args(node).values()))


def steps(
    emit: Emitter, query: Any, key: Any, value: Any, state: Any, decay: Any, beta: Any, reverse: bool
) -> tuple[fx.Node, fx.Node]:
    """(out, final state) of a loop over steps."""
    xs = [x for x in (query, key, value, decay, beta) if x is not None]

    def step(
        inner: Emitter, carries: list[fx.Node], given: list[fx.Node], _: list[fx.Node]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        (kept,), (q, k, v, *rest) = carries, given
        rows, columns = inner(aten.unsqueeze.default, v, -2), inner(aten.unsqueeze.default, k, -1)
        if decay is not None:
            factor = inner(aten.exp.default, rest.pop(0))
            kept = inner(aten.mul.Tensor, inner(aten.unsqueeze.default, factor, -1), kept)
        if beta is not None:
            rate = inner(aten.unsqueeze.default, inner(aten.unsqueeze.default, rest.pop(0), -1), -1)
            seen = inner(aten.matmul.default, inner(aten.unsqueeze.default, k, -2), kept)
            rows = inner(aten.mul.Tensor, rate, inner(aten.sub.Tensor, rows, seen))
        following = inner(aten.add.Tensor, kept, inner(aten.mul.Tensor, columns, rows))
        out = inner(aten.matmul.default, inner(aten.unsqueeze.default, q, -2), following)
        return [following], [inner(aten.squeeze.dim, out, -2)]

    final, out = write_loop(emit, step, trip_of(emit, value), [state], xs, reverse=reverse)
    return out, final


@both_ways
def contrib(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """ONNX Runtime's LinearAttention."""
    dtype = named_args(node)["value"].meta["val"].dtype
    if dtype != torch.float32:
        raise Refused(f"com.microsoft.LinearAttention has no {dtype} kernel on the CPU")
    return _operator(emit, node, False)


@both_ways
def standard(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """ONNX's LinearAttention."""
    dtype = named_args(node)["value"].meta["val"].dtype
    if dtype not in STANDARD_DTYPES:
        raise Refused(f"the operator of ONNX 27 does not take {dtype}")
    return _operator(emit, node, True)


def _operator(emit: Emitter, node: fx.Node, of_onnx: bool) -> list[fx.Node]:
    """The operator LinearAttention, which takes [batch, trip, heads * size]."""
    query, key, value, state, decay, beta, _ = named_args(node).values()
    assert isinstance(value, fx.Node) and isinstance(state, fx.Node)
    heads = state.meta["val"].shape[1]
    if not all(isinstance(size, int) for size in state.meta["val"].shape[1:]):
        raise Refused("LinearAttention needs fixed head counts and sizes")
    trip, batch = trip_of(emit, value), size_of(emit, value, 1)

    def packed(x: object, width: int) -> fx.Node | None:
        if x is None:
            return None
        assert isinstance(x, fx.Node)
        if x.meta["val"].shape[2] != heads:
            x = emit(aten.expand.default, x, [-1, -1, heads, *([-1] * (x.meta["val"].dim() - 3))])
        swapped = emit(aten.permute.default, x, [1, 0, *range(2, x.meta["val"].dim())])
        return emit(aten.reshape.default, swapped, [batch, trip, heads * width])

    keys, values = state.meta["val"].shape[2:]
    per_key = decay is not None and decay.meta["val"].shape[3] != 1
    call = emit(
        torch.ops.seqc.ort_linear_attention.default,
        packed(query, keys),
        packed(key, keys),
        packed(value, values),
        state,
        packed(decay, keys if per_key else 1),
        packed(beta, 1),
        heads,
        rule_of(decay, beta),
        of_onnx,
    )
    out, final = (emit(operator.getitem, call, i) for i in (0, 1))
    unpacked = emit(aten.reshape.default, out, [batch, trip, heads, values])
    return [emit(aten.permute.default, unpacked, [1, 0, 2, 3]), final]


LOWERINGS = (
    Lowering(
        "seqc::linear_attention",
        "contrib",
        "ONNX Runtime's fused operator LinearAttention",
        contrib,
        frozenset({"com.microsoft"}),
    ),
    Lowering(
        "seqc::linear_attention",
        "standard",
        "the operator LinearAttention of ONNX 27",
        standard,
        opset=27,
    ),
    Lowering(
        "seqc::linear_attention",
        "sequential",
        "a loop over steps, in standard operators",
        sequential,
    ),
)
