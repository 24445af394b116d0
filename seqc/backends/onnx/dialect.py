"""Dialect ops that are operators of standard ONNX."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch

import seqc.ops  # noqa: F401
from seqc.backends.onnx.aten_layers import reordered
from seqc.backends.onnx.emit import Translations, Value, ints, op, translates

TRANSLATIONS: Translations = {}

# ONNX's gates in ours, its operator, and what else it is told.
_OPERATORS: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "lstm": ((0, 3, 1, 2), op.LSTM, {}),
    "gru": ((1, 0, 2), op.GRU, {"linear_before_reset": 1}),
    "gru_reset_before": ((1, 0, 2), op.GRU, {"linear_before_reset": 0}),
    "rnn_tanh": ((0,), op.RNN, {"activations": ["Tanh"]}),
    "rnn_relu": ((0,), op.RNN, {"activations": ["Relu"]}),
}


@translates(TRANSLATIONS, torch.ops.seqc.onnx_rnn.default)
def onnx_rnn(
    x: Value,
    weight: Value,
    recurrent: Value,
    bias: Value,
    recurrent_bias: Value,
    state: Value,
    cell: Value,
    kind: str,
    reverse: bool = False,
) -> tuple[Value, ...]:
    """LSTM, GRU or RNN with one direction; the axis of directions is put in and taken out."""
    order, operator, attributes = _OPERATORS[kind]
    parts = [reordered(part, len(order), order) for part in (weight, recurrent, bias, recurrent_bias)]
    w, r, b = parts[0], parts[1], op.Concat(parts[2], parts[3], axis=0)
    initial = [state, cell] if kind == "lstm" else [state]
    steps, *finals = operator(
        x,
        *(op.Unsqueeze(part, ints(0)) for part in (w, r, b)),
        None,
        *(op.Unsqueeze(part, ints(0)) for part in initial),
        direction="reverse" if reverse else "forward",
        hidden_size=state.shape[-1],
        **attributes,
    )
    h, *c = (op.Squeeze(final, ints(0)) for final in finals)
    return op.Squeeze(steps, ints(1)), h, *(c or [op.Identity(cell)])


@translates(TRANSLATIONS, torch.ops.seqc.fft_conv.default)
def fft_conv(x: Value, kernel: Value) -> Value:
    """The inverse transform of the product of two; the runtime's are fast where the size is a power of two."""
    length = op.Shape(x, start=2, end=3)
    doublings = op.Log(op.Mul(op.Cast(length, to=ir.DataType.DOUBLE), _double(2.0)))
    rounded = op.Ceil(op.Sub(op.Div(doublings, _double(math.log(2.0))), _double(1e-9)))
    size = op.Squeeze(op.Cast(op.Pow(_double(2.0), rounded), to=ir.DataType.INT64))
    a, b = _transform(x, size, 2)
    c, d = _transform(op.Slice(kernel, ints(0), length, ints(1)), size, 1)
    real = op.Sub(op.Mul(a, c), op.Mul(b, d))
    imaginary = op.Add(op.Mul(a, d), op.Mul(b, c))
    found = op.DFT(op.Concat(real, imaginary, axis=3), size, axis=2, inverse=1)
    return op.Squeeze(op.Slice(found, ints(0, 0), op.Concat(length, ints(1), axis=0), ints(2, 3)), ints(3))


def _double(value: float) -> Value:
    return op.Constant(value=ir.tensor([value], dtype=ir.DataType.DOUBLE))


def _transform(x: Value, size: Value, axis: int) -> tuple[Value, Value]:
    """Real and imaginary parts [..., size, 1] of the transform along the last axis, ``axis``."""
    found = op.DFT(op.Unsqueeze(x, ints(-1)), size, axis=axis)
    return op.Slice(found, ints(0), ints(1), ints(-1)), op.Slice(found, ints(1), ints(2), ints(-1))
