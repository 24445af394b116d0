"""Dialect ops that are operators of standard ONNX."""

from __future__ import annotations

from typing import Any

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
