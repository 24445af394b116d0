"""Attention and recurrent layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch

from seqc.backends.onnx.emit import Translations, Value, constant, ints, op, rank, swap_last_axes, translates
from seqc.backends.onnx.refusal import Unsupported

TRANSLATIONS: Translations = {}
aten = torch.ops.aten


@translates(TRANSLATIONS, aten.scaled_dot_product_attention.default)
def attention(
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """softmax(q k^T * scale + mask) v, for [..., heads, length, size] of any rank, in plain ops at every opset.

    torchlib takes four axes only, repeats the keys of grouped queries in memory, and gives a row that its mask leaves
    nothing to attend to a uniform mean, where torch gives zero. Here groups are broadcast and such rows are zero. The
    softmax of narrow types is taken in float32, as torch does; TensorRT fuses that as well.
    """
    if dropout_p:
        raise Unsupported("attention with dropout: put the model in eval mode")
    size = query.shape[-1]
    if scale is None:
        if not isinstance(size, int):
            raise Unsupported("attention with a head size that is not fixed")
        scale = 1 / math.sqrt(size)
    heads, groups = query.shape[-3] if rank(query) > 2 else 1, 1
    kv_heads = key.shape[-3] if rank(key) > 2 else 1
    if enable_gqa and heads != kv_heads:
        if rank(query) != 4 or not isinstance(heads, int) or not isinstance(kv_heads, int):
            raise Unsupported("grouped attention that is not of the form [batch, heads, length, size]")
        groups = heads // kv_heads
    scaled = op.Mul(query, constant(scale, query))
    keys = swap_last_axes(key)
    if groups > 1:
        scaled = op.Reshape(scaled, ints(0, kv_heads, groups, -1, size))
        keys, value_ = op.Unsqueeze(keys, ints(2)), op.Unsqueeze(value, ints(2))
    else:
        value_ = value
    scores = op.MatMul(scaled, keys)
    narrow = query.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if narrow:
        scores = op.Cast(scores, to=ir.DataType.FLOAT)
        scores.dtype = ir.DataType.FLOAT
    like = scores if narrow else query
    alive: Value | None = None
    if is_causal:
        scores = op.Add(scores, _bias(_causal(query, key), like))
    elif attn_mask is not None:
        mask = _grouped(attn_mask, kv_heads, groups)
        if attn_mask.dtype == ir.DataType.BOOL:
            scores = op.Add(scores, _bias(mask, like))
            alive = op.Cast(
                op.ReduceMax(op.Cast(mask, to=ir.DataType.INT32), ints(-1), keepdims=1), to=ir.DataType.BOOL
            )
        else:
            scores = op.Add(scores, op.CastLike(mask, like) if attn_mask.dtype != like.dtype else mask)
            alive = op.Not(op.Equal(op.ReduceMax(mask, ints(-1), keepdims=1), constant(float("-inf"), attn_mask)))
    weights = op.Softmax(scores, axis=-1)
    result = op.MatMul(op.Cast(weights, to=query.dtype) if narrow else weights, value_)
    if alive is not None:
        result = op.Where(alive, result, constant(0, query))
    if groups > 1:
        result = op.Reshape(result, ints(0, heads, -1, _fixed(value.shape[-1], "value size")))
    return result


def _bias(mask: Value, like: Value) -> Value:
    """0 where the mask lets through, else -inf. Added to the scores, as torch does: Where on them is slower."""
    return op.Where(mask, constant(0, like), constant(float("-inf"), like))


def _causal(query: Value, key: Value) -> Value:
    """Which positions [length, source] may be attended: source <= length, counted from the start of both."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    rows, columns = (
        op.Range(zero, op.Squeeze(op.Shape(x, start=rank(x) - 2, end=rank(x) - 1)), one) for x in (query, key)
    )
    return op.GreaterOrEqual(op.Unsqueeze(rows, ints(1)), columns)


def _grouped(mask: Value, kv_heads: int, groups: int) -> Value:
    """A mask for [batch, heads, length, source] as one for [batch, kv_heads, groups, length, source]."""
    if groups == 1 or rank(mask) < 3:
        return mask
    if mask.shape[-3] == 1:
        return op.Unsqueeze(mask, ints(rank(mask) - 3))
    lead = [0] if rank(mask) == 4 else []
    source = op.Shape(mask, start=rank(mask) - 1)
    return op.Reshape(mask, op.Concat(ints(*lead, kv_heads, groups, -1), source, axis=0))


def _fixed(size: Any, what: str) -> int:
    if not isinstance(size, int):
        raise Unsupported(f"the {what} is not fixed")
    return size


@translates(TRANSLATIONS, aten.lstm.input)
def lstm(
    input: Value,
    hx: Sequence[Value],
    params: Sequence[Value],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Value, ...]:
    """torchlib's form, without its folded copies of the weights; a projection, which it ignores, is refused."""
    if hx[0].shape[-1] != hx[1].shape[-1]:
        raise Unsupported("an LSTM with proj_size has no ONNX operator")
    layers = _Layers(params, has_biases, num_layers, bidirectional, batch_first, dropout if train else 0.0)
    return layers.run(op.LSTM, input, hx, gates=4, order=(0, 3, 1, 2))


@translates(TRANSLATIONS, aten.gru.input)
def gru(
    input: Value,
    hx: Value,
    params: Sequence[Value],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Value, ...]:
    """As :func:`lstm`. torch applies the reset gate after the recurrent product: linear_before_reset."""
    layers = _Layers(params, has_biases, num_layers, bidirectional, batch_first, dropout if train else 0.0)
    return layers.run(op.GRU, input, [hx], gates=3, order=(1, 0, 2), linear_before_reset=1)


@translates(TRANSLATIONS, aten.rnn_tanh.input)
def rnn_tanh(input: Value, hx: Value, params: Sequence[Value], *settings: Any) -> tuple[Value, ...]:
    """Missing in torchlib; arguments as for :func:`gru`."""
    return _rnn("Tanh", input, hx, params, *settings)


@translates(TRANSLATIONS, aten.rnn_relu.input)
def rnn_relu(input: Value, hx: Value, params: Sequence[Value], *settings: Any) -> tuple[Value, ...]:
    """Missing in torchlib; arguments as for :func:`gru`."""
    return _rnn("Relu", input, hx, params, *settings)


def _rnn(
    activation: str,
    input: Value,
    hx: Value,
    params: Sequence[Value],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Value, ...]:
    layers = _Layers(params, has_biases, num_layers, bidirectional, batch_first, dropout if train else 0.0)
    activations = [activation] * (1 + bidirectional)
    return layers.run(op.RNN, input, [hx], gates=1, order=(0,), activations=activations)


class _Layers:
    """A stack of ONNX LSTM, GRU or RNN operators; torch's weights: w_ih, w_hh, b_ih, b_hh per layer and direction."""

    def __init__(
        self,
        params: Sequence[Value],
        has_biases: bool,
        num_layers: int,
        bidirectional: bool,
        batch_first: bool,
        dropout: float,
    ) -> None:
        if dropout and num_layers > 1:
            raise Unsupported("dropout between recurrent layers: put the model in eval mode")
        self.params, self.has_biases, self.num_layers = params, has_biases, num_layers
        self.directions = 1 + bidirectional
        self.batch_first = batch_first

    def run(
        self,
        operator: Callable[..., Any],
        x: Value,
        states: Sequence[Value],
        gates: int,
        order: tuple[int, ...],
        **attributes: Any,
    ) -> tuple[Value, ...]:
        """The outputs of the last layer [length, batch, directions * hidden], then the final states of all layers."""
        hidden = _fixed(states[0].shape[-1], "hidden size")
        if self.batch_first:
            x = op.Transpose(x, perm=[1, 0, 2])
        finals: list[list[Value]] = [[] for _ in states]
        for layer in range(self.num_layers):
            w, r, b = self._weights(layer, gates, order)
            initial = [self._part(s, layer) for s in states]
            y, *last = operator(
                x,
                w,
                r,
                b,
                None,
                *initial,
                direction="bidirectional" if self.directions == 2 else "forward",
                hidden_size=hidden,
                **attributes,
            )
            for kept, state in zip(finals, last, strict=False):
                kept.append(state)
            if self.directions == 2:  # [length, directions, batch, hidden]
                x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), ints(0, 0, -1))
            else:
                x = op.Squeeze(y, ints(1))
        if self.batch_first:
            x = op.Transpose(x, perm=[1, 0, 2])
        return (x, *(s[0] if len(s) == 1 else op.Concat(*s, axis=0) for s in finals))

    def _part(self, state: Value, layer: int) -> Value:
        if self.num_layers == 1:
            return state
        start = layer * self.directions
        return op.Slice(state, ints(start), ints(start + self.directions), ints(0))

    def _weights(self, layer: int, gates: int, order: tuple[int, ...]) -> tuple[Value, Value, Value | None]:
        per = 4 if self.has_biases else 2
        columns: list[list[Value]] = [[], [], []]
        for direction in range(self.directions):
            start = (layer * self.directions + direction) * per
            ordered = [reordered(p, gates, order) for p in self.params[start : start + per]]
            if self.has_biases:
                ordered[2:] = [op.Concat(*ordered[2:], axis=0)]
            for column, part in zip(columns, ordered, strict=False):
                column.append(op.Unsqueeze(part, ints(0)))
        w, r, b = (op.Concat(*c, axis=0) if len(c) > 1 else c[0] if c else None for c in columns)
        return w, r, b


def reordered(weight: Value, gates: int, order: tuple[int, ...]) -> Value:
    """The gates of a weight or bias, stacked on axis 0, in ONNX's order."""
    if order == tuple(range(gates)):
        return weight
    hidden = _fixed(weight.shape[0], "hidden size") // gates
    return op.Gather(weight, ints(*(gate * hidden + i for gate in order for i in range(hidden))), axis=0)
