"""ATen ops through the ONNX backend: traced small, run in ONNX Runtime at other sizes, compared with torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seqc.backends.onnx import export
from seqc.frontend.capture import capture
from seqc.frontend.signature import bind
from tests.helpers.onnx import assert_same, run, session

Inputs = Callable[[int, int], tuple[torch.Tensor, ...]]


def floats(*tail: int, count: int = 1) -> Inputs:
    """``count`` float inputs of shape [batch, sequence, *tail]."""
    return lambda b, n: tuple(torch.randn(b, n, *tail) for _ in range(count))


def ints(high: int = 7, low: int = 0, *tail: int, count: int = 1) -> Inputs:
    return lambda b, n: tuple(torch.randint(low, high, (b, n, *tail)) for _ in range(count))


def both(*makers: Inputs) -> Inputs:
    return lambda b, n: tuple(x for make in makers for x in make(b, n))


def mask(b: int, n: int) -> tuple[torch.Tensor, ...]:
    return (torch.rand(b, n) > 0.5,)


X, XX, IDS, XI = floats(4), floats(4, count=2), ints(), both(floats(4), ints(4))
HEADS = floats(4, 6)  # [batch, sequence, heads, size]


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def first(result: Any) -> Any:
    return result[0]


def causal(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[1]
    return torch.ones(n, n, dtype=torch.bool).tril()


OPS: dict[str, tuple[Callable[..., Any], Inputs]] = {
    # scans
    "cumsum": (lambda x: x.cumsum(1), X),
    "cumsum int32": (lambda x: x.int().cumsum(1), IDS),
    "cumsum bool": (lambda m: m.cumsum(1), mask),
    "cumsum negative axis": (lambda x: x.cumsum(-2), X),
    "cumsum to float64": (lambda x: x.cumsum(1, dtype=torch.float64), X),
    "cumprod": (lambda x: x.cumprod(1), X),
    "cumprod with zeros": (lambda x: (x * (x > -0.5)).cumprod(1), X),
    "cumprod to the left": (lambda x: x.flip(1).cumprod(1).flip(1), X),
    "cummax": (lambda x: x.cummax(1), X),
    "cummin": (lambda x: x.cummin(1).values, X),
    "logcumsumexp": (lambda x: x.logcumsumexp(1), X),
    "logcumsumexp wide": (lambda x: (x * 100).logcumsumexp(1), X),
    "logcumsumexp falling": (lambda x: (x - 200 * torch.arange(x.shape[1])[:, None]).logcumsumexp(1), X),
    "logcumsumexp rising": (lambda x: (x + 200 * torch.arange(x.shape[1])[:, None]).logcumsumexp(1), X),
    "logcumsumexp with -inf": (lambda x: x.masked_fill(x < 0, -torch.inf).logcumsumexp(1), X),
    "logcumsumexp last axis": (lambda x: x.logcumsumexp(-1), X),
    "diff": (lambda x: torch.diff(x, dim=1, prepend=x[:, :1]), X),
    # writes
    "index_put": (lambda x, i: x.index_put((i[0] % x.shape[0],), x[:1, 0] * 0 + 5.0), XI),
    "index_put rows": (lambda x: x.clone().index_put((torch.tensor([0]), torch.tensor([0])), torch.ones(1, 4)), X),
    "index_put accumulate": (
        lambda x, i: x.new_zeros(4, 4).index_put((i.flatten(),), x.flatten(0, 1), accumulate=True),
        XI,
    ),
    "index_put mask": (lambda x, i: x.index_put((i > 1,), torch.tensor(3.0)), XI),
    "index_put full mask": (lambda x: x.index_put((x > 0,), torch.tensor(3.0)), X),
    "index_put column": (lambda x, y: _assign(x, y), XX),
    "slice_scatter": (lambda x, y: torch.slice_scatter(x, y[:, 1:], 1, 1), XX),
    "slice_scatter bounded": (lambda x, y: torch.slice_scatter(x, y[..., 1:3], 2, 1, 3), XX),
    "slice_scatter step": (lambda x, y: torch.slice_scatter(x, y[:, ::2], 1, 0, None, 2), XX),
    "slice_scatter negative": (lambda x, y: torch.slice_scatter(x, y[:, -1:], 1, -1), XX),
    "select_scatter": (lambda x, y: torch.select_scatter(x, y[:, 0], 1, 0), XX),
    "select_scatter last": (lambda x, y: torch.select_scatter(x, y[:, -1], 1, -1), XX),
    "select_scatter negative axis": (lambda x, y: torch.select_scatter(x, y[..., 0], -1, 2), XX),
    "scatter src": (lambda x, i, y: x.scatter(2, i[..., None], y), both(X, ints(4), floats(4))),
    "scatter value": (lambda x, i: x.scatter(2, i[..., None], 1.5), XI),
    "scatter int": (lambda i: torch.zeros(i.shape[0], 7, dtype=torch.int64).scatter(1, i, 3), IDS),
    "scatter_add": (lambda x, i: x.new_zeros(x.shape[0], 4).scatter_add(1, i, x[..., 0]), XI),
    "scatter_reduce amax": (lambda x, i: x.new_zeros(x.shape[0], 4).scatter_reduce(1, i, x[..., 0], "amax"), XI),
    "scatter_reduce sum without self": (
        lambda x, i: x.new_ones(x.shape[0], 4).scatter_reduce(1, i, x[..., 0], "sum", include_self=False),
        XI,
    ),
    "scatter_reduce mean": (
        lambda x, i: x.new_ones(x.shape[0], 4).scatter_reduce(1, i, x[..., 0], "mean"),
        XI,
    ),
    "index_add": (lambda x, i: x.new_zeros(x.shape[0], 4, 4).index_add(1, i[0], x), XI),
    "index_copy": (lambda x, y: x.index_copy(1, torch.arange(x.shape[1]).flip(0), y), XX),
    "index_fill": (lambda x: x.index_fill(2, torch.tensor([0, 3]), 2.0), X),
    "masked_fill": (lambda x, i: x.masked_fill((i > 2)[..., None], -torch.inf), XI),
    "masked_fill tensor": (lambda x, i: x.masked_fill((i > 2)[..., None], x.sum()), XI),
    "masked_fill int": (lambda i: i.masked_fill(i > 2, -1), IDS),
    "masked_scatter": (lambda x, y: x.masked_scatter(x > 0, y), XX),
    "copy_": (lambda x, y: x.clone().copy_(y[:, :1]), XX),
    "fill_": (lambda x: x.clone().fill_(2.0), X),
    # moving
    "roll": (lambda x: x.roll(1, 1), X),
    "roll back": (lambda x: x.roll(-3, 1), X),
    "roll further than the length": (lambda x: x.roll(5, 1), X),
    "roll two axes": (lambda x: x.roll((1, -1), (1, 2)), X),
    "roll flat": (lambda x: x.roll(2), X),
    "flip": (lambda x: x.flip(1), X),
    "flip two axes": (lambda x: x.flip((1, -1)), X),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 2), X),
    "repeat_interleave time": (lambda x: x.repeat_interleave(2, 1), X),
    "repeat_interleave flat": (lambda x: x.repeat_interleave(2), X),
    "repeat_interleave tensor": (lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 1]), 2), X),
    "repeat": (lambda x: x.repeat(2, 1, 3), X),
    "repeat new axis": (lambda x: x.repeat(2, 1, 1, 2), X),
    "tile": (lambda x: x.tile(2, 2), X),
    "expand": (lambda x: x[:, :, None].expand(-1, -1, 3, -1), X),
    "unfold": (lambda x: x.unfold(2, 2, 1), X),
    "unfold time": (lambda x: F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1), X),
    "unfold stride": (lambda x: F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 2), X),
    "movedim": (lambda x: x.movedim(1, -1), X),
    "unbind": (lambda x: x.unbind(2), X),
    "split": (lambda x: x.split(3, 2), X),
    "split sizes": (lambda x: x.split([1, 3], -1), X),
    "chunk": (lambda x: x.chunk(2, -1), X),
    "tensor_split": (lambda x: x.tensor_split(3, -1), X),
    "stack": (lambda x, y: torch.stack([x, y], 1), XX),
    "cat": (lambda x, y: torch.cat([x, y[:, :1]], 1), XX),
    "cat of several types": (lambda x, i: torch.cat([x, i[..., None]], -1), XI),
    "cat with empty": (lambda x: torch.cat([x[:, :0], x], 1), X),
    "narrow": (lambda x: x.narrow(2, 1, 2), X),
    "select negative": (lambda x: x[:, -1], X),
    "slice negative": (lambda x: x[:, -3:], X),
    "slice step": (lambda x: x[:, ::3], X),
    "slice over the end": (lambda x: x[:, :100, 1:-1], X),
    "reshape": (lambda x: x.reshape(x.shape[0], -1), X),
    "reshape fold": (lambda x: x.reshape(x.shape[0] * x.shape[1], 2, 2), X),
    "unflatten": (lambda x: x.unflatten(-1, (2, 2)), X),
    "flatten": (lambda x: x.flatten(), X),
    "squeeze": (lambda x: x[:, :, :1].squeeze(-1), X),
    "tril": (lambda x: (x @ x.transpose(1, 2)).tril(), X),
    "tril diagonal": (lambda x: (x @ x.transpose(1, 2)).tril(-1), X),
    "triu": (lambda x: (x @ x.transpose(1, 2)).triu(1), X),
    "triu bool": (lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), X),
    "tril int": (lambda i: (i[:, :, None] * i[:, None]).tril(), IDS),
    "diagonal": (lambda x: (x @ x.transpose(1, 2)).diagonal(0, 1, 2), X),
    "diagonal offset": (lambda x: (x @ x.transpose(1, 2)).diagonal(-1, 1, 2), X),
    "diag_embed": (lambda x: x.diag_embed(), X),
    "meshgrid": (lambda x: torch.meshgrid(x[0, :, 0], x[0, 0], indexing="ij"), X),
    # attention
    "sdpa": (lambda q: F.scaled_dot_product_attention(heads(q), heads(q), heads(q)), HEADS),
    "sdpa causal": (lambda q: F.scaled_dot_product_attention(heads(q), heads(q), heads(q), is_causal=True), HEADS),
    "sdpa scale": (lambda q: F.scaled_dot_product_attention(heads(q), heads(q), heads(q), scale=0.3), HEADS),
    "sdpa bool mask": (lambda q: F.scaled_dot_product_attention(heads(q), heads(q), heads(q), causal(q)), HEADS),
    "sdpa mask of nothing": (
        lambda q, m: F.scaled_dot_product_attention(heads(q), heads(q), heads(q), m[:, None, :, None] & causal(q)),
        both(HEADS, mask),
    ),
    "sdpa float mask": (
        lambda q: F.scaled_dot_product_attention(
            heads(q), heads(q), heads(q), torch.zeros(q.shape[1], q.shape[1]).masked_fill(~causal(q), -torch.inf)
        ),
        HEADS,
    ),
    "sdpa grouped": (
        lambda q: F.scaled_dot_product_attention(
            heads(q), heads(q)[:, :2], heads(q)[:, :2], is_causal=True, enable_gqa=True
        ),
        HEADS,
    ),
    "sdpa grouped mask": (
        lambda q: F.scaled_dot_product_attention(
            heads(q), heads(q)[:, :1], heads(q)[:, :1], causal(q), enable_gqa=True
        ),
        HEADS,
    ),
    "sdpa of three axes": (lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), X),
    "sdpa other value size": (lambda q: F.scaled_dot_product_attention(heads(q), heads(q), heads(q)[..., :3]), HEADS),
    "sdpa cross": (
        lambda q: F.scaled_dot_product_attention(heads(q)[..., -1:, :], heads(q), heads(q)),
        HEADS,
    ),
    "sdpa cross causal": (
        lambda q: F.scaled_dot_product_attention(
            heads(q), heads(q).repeat(1, 1, 2, 1), heads(q).repeat(1, 1, 2, 1), is_causal=True
        ),
        HEADS,
    ),
    "multi-head attention": (nn.MultiheadAttention(4, 2, batch_first=True), floats(4, count=3)),
    "transformer layer": (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), X),
    # layers
    "embedding": (nn.Embedding(7, 4), IDS),
    "embedding padding": (nn.Embedding(7, 4, padding_idx=0), IDS),
    "linear": (nn.Linear(4, 3), X),
    "bilinear": (lambda x, y: F.bilinear(x, y, torch.ones(2, 4, 4)), XX),
    "conv1d groups": (lambda x: F.conv1d(x.transpose(1, 2), CONV, groups=4, padding=2), X),
    "conv1d same": (lambda x: F.conv1d(x.transpose(1, 2), CONV.expand(4, 4, 3), padding="same"), X),
    "conv1d dilation": (lambda x: F.conv1d(x.transpose(1, 2), CONV, groups=4, padding=4, dilation=2), X),
    "conv1d stride": (lambda x: F.conv1d(x.transpose(1, 2), CONV, groups=4, padding=1, stride=2), X),
    "conv1d without batch": (lambda x: F.conv1d(x[0].transpose(0, 1), CONV, groups=4, padding=2), X),
    "conv1d with computed weight": (lambda x: F.conv1d(x.transpose(1, 2), CONV * x.mean(), groups=4, padding=2), X),
    "conv_transpose1d": (lambda x: F.conv_transpose1d(x.transpose(1, 2), CONV, groups=4, stride=2), X),
    "conv2d": (lambda x: F.conv2d(x[:, None], torch.ones(2, 1, 3, 3), padding=1), X),
    "avg_pool1d": (lambda x: F.avg_pool1d(x.transpose(1, 2), 3, 1, 1), X),
    "max_pool1d": (lambda x: F.max_pool1d(x.transpose(1, 2), 3, 1, 1), X),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x.transpose(1, 2), 1), X),
    "pad constant": (lambda x: F.pad(x, (1, 0, 2, 1), value=2.5), X),
    "pad negative": (lambda x: F.pad(x, (0, 0, 3, -1)), X),
    "pad int": (lambda i: F.pad(i, (2, 0), value=-1), IDS),
    "pad bool": (lambda m: F.pad(m, (1, 0), value=True), mask),
    "pad by a size": (lambda x: F.pad(x, (0, 0, x.shape[1], 0)), X),
    "pad to a multiple": (lambda x: F.pad(x, (0, 0, 0, (-x.shape[1]) % 4)), X),
    "pad reflect": (lambda x: F.pad(x, (1, 2), mode="reflect"), X),
    "pad replicate": (lambda x: F.pad(x.transpose(1, 2), (3, 0), mode="replicate"), X),
    "pad circular": (lambda x: F.pad(x.transpose(1, 2), (1, 1), mode="circular"), X),
    "group_norm": (lambda x: F.group_norm(x.flatten(0, 1), 2, torch.tensor([1.0, 2, 3, 4]), torch.ones(4)), X),
    "group_norm over time": (lambda x: GROUP_NORM(x.transpose(1, 2)), X),
    "layer_norm": (nn.LayerNorm(4), X),
    "layer_norm without weights": (lambda x: F.layer_norm(x, (4,)), X),
    "layer_norm two axes": (lambda x: F.layer_norm(x.unflatten(-1, (2, 2)), (2, 2)), X),
    "rms_norm": (nn.RMSNorm(4, eps=1e-6), X),
    "rms_norm default eps": (lambda x: F.rms_norm(x * 1e-3, (4,)), X),
    "batch_norm": (lambda x: BATCH_NORM(x.transpose(1, 2)), X),
    "instance_norm": (lambda x: F.instance_norm(F.pad(x, (0, 0, 3, 0)).transpose(1, 2)), X),
    "normalize": (lambda x: F.normalize(x, dim=-1), X),
    "dropout in eval": (nn.Dropout(0.5), X),
    "pixel weights by where": (lambda x: torch.where(x > 0, x, 0.1 * x), X),
    # recurrent layers
    "lstm": (nn.LSTM(4, 5, batch_first=True), X),
    "lstm time first": (nn.LSTM(4, 5), X),
    "lstm stacked bidirectional": (nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True), X),
    "lstm without bias": (nn.LSTM(4, 5, bias=False, batch_first=True), X),
    "lstm with state": (lambda x: LSTM(x, (x.new_ones(1, x.shape[1], 5), x.new_zeros(1, x.shape[1], 5) + x.mean())), X),
    "gru": (nn.GRU(4, 5, batch_first=True), X),
    "gru stacked bidirectional": (nn.GRU(4, 3, num_layers=2, bidirectional=True, batch_first=True), X),
    "gru time first": (nn.GRU(4, 5), X),
    "rnn": (nn.RNN(4, 5, batch_first=True), X),
    "rnn relu": (nn.RNN(4, 5, nonlinearity="relu", bidirectional=True, batch_first=True), X),
    "lstm cell": (lambda x: LSTM_CELL(x[:, 0], (x[:, 0], x[:, -1])), X),
    "gru cell": (lambda x: GRU_CELL(x[:, 0], x[:, -1]), X),
    # activations
    "softplus": (lambda x: F.softplus(x * 30), X),
    "softplus beta": (lambda x: F.softplus(x * 30, beta=2.0, threshold=5.0), X),
    "gelu": (F.gelu, X),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), X),
    "silu": (F.silu, X),
    "elu": (lambda x: F.elu(x, 0.5), X),
    "selu": (F.selu, X),
    "celu": (lambda x: F.celu(x, 2.0), X),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), X),
    "hardtanh": (F.hardtanh, X),
    "relu6": (F.relu6, X),
    "hardswish": (F.hardswish, X),
    "hardsigmoid": (F.hardsigmoid, X),
    "mish": (F.mish, X),
    "glu": (lambda x: F.glu(x, -1), X),
    "logsigmoid": (lambda x: F.logsigmoid(x * 50), X),
    "softmax": (lambda x: x.softmax(-1), X),
    "softmax over time": (lambda x: x.softmax(1), X),
    "softmax to float64": (lambda x: x.softmax(-1, dtype=torch.float64), X),
    "log_softmax": (lambda x: x.log_softmax(1), X),
    "tanhshrink": (F.tanhshrink, X),
    "softsign": (F.softsign, X),
    "threshold": (lambda x: F.threshold(x, 0.1, 20), X),
    "prelu": (lambda x: F.prelu(x, torch.tensor([0.3])), X),
    # reductions
    "sum": (lambda x: x.sum(1), X),
    "sum all": (lambda x: x.sum(), X),
    "sum bool": (lambda m: m.sum(-1), mask),
    "sum int32": (lambda i: i.int().sum(1), IDS),
    "mean": (lambda x: x.mean((1, 2), keepdim=True), X),
    "var": (lambda x: x.var(-1), X),
    "var biased": (lambda x: x.var(1, unbiased=False), X),
    "std": (lambda x: x.std(-1, unbiased=False), X),
    "var_mean": (lambda x: torch.var_mean(x, -1), X),
    "prod": (lambda x: x.prod(1), X),
    "amax": (lambda x: x.amax(1), X),
    "amin all": (lambda x: x.amin(), X),
    "amax two axes": (lambda x: x.amax((0, 1), keepdim=True), X),
    "max with index": (lambda x: x.max(1), X),
    "min with index": (lambda x: x.min(-1, keepdim=True), X),
    "maximum": (lambda x, y: torch.maximum(x, y), XX),
    "argmax": (lambda x: x.argmax(1), X),
    "argmax all": (lambda x: x.argmax(), X),
    "argmax keepdim": (lambda x: x.argmax(-1, keepdim=True), X),
    "argmin": (lambda x: x.argmin(-1), X),
    "argmax of ties": (lambda i: i.argmax(1), ints(2)),
    "argmax bool": (lambda m: m.int().argmax(1), mask),
    "topk": (lambda x: x.topk(2, -1), X),
    "topk smallest": (lambda x: x.topk(3, largest=False).values, X),
    "sort": (lambda x: x.sort(1), X),
    "sort descending": (lambda x: x.sort(-1, descending=True).values, X),
    "argsort": (lambda x: x.argsort(1), X),
    "sort stable ties": (lambda i: i.sort(dim=1, stable=True), ints(3)),
    "logsumexp": (lambda x: (x * 100).logsumexp(1), X),
    "logsumexp of -inf": (lambda x: (x * 0 - torch.inf).logsumexp(1), X),
    "norm": (lambda x: x.norm(dim=-1), X),
    "norm 1": (lambda x: torch.linalg.vector_norm(x, 1, -1), X),
    "norm inf": (lambda x: torch.linalg.vector_norm(x, torch.inf, -1), X),
    "any": (lambda m: m.any(1), mask),
    "all": (lambda m: m.all(1), mask),
    "any float": (lambda x: (x * (x > 1)).any(-1), X),
    "all of all": (lambda m: m.all(), mask),
    "count_nonzero": (lambda m: m.count_nonzero(1), mask),
    "aminmax": (lambda x: x.aminmax(dim=1), X),
    "histc": (lambda x: torch.histc(x, 4, -1, 1), X),
    "bincount by one_hot": (lambda i: F.one_hot(i, 7).sum(1), IDS),
    "one_hot": (lambda i: F.one_hot(i, 7), IDS),
    # arithmetic
    "add alpha": (lambda x, y: torch.add(x, y, alpha=2), XX),
    "sub alpha": (lambda x, y: torch.sub(x, y, alpha=0.5), XX),
    "rsub": (lambda x: 1 - x, X),
    "rsub int": (lambda i: 1 - i, IDS),
    "int times float": (lambda i: i * 0.5, IDS),
    "int plus tensor": (lambda x, i: x + i[..., None], XI),
    "bool times float": (lambda x: (x > 0) * x, X),
    "bool plus bool": (lambda m: m + m, mask),
    "bool times bool": (lambda m: m * ~m, mask),
    "int32 plus int64": (lambda i: i.int() + i, IDS),
    "half times float": (lambda x: x.half() * x, X),
    "div of ints": (lambda i: i / 3, IDS),
    "div floor": (lambda x: torch.div(x, 0.3, rounding_mode="floor"), X),
    "div trunc": (lambda x: torch.div(x, 0.3, rounding_mode="trunc"), X),
    "div floor int": (lambda i: torch.div(i, 3, rounding_mode="floor"), ints(9, -9)),
    "div trunc int": (lambda i: torch.div(i, 3, rounding_mode="trunc"), ints(9, -9)),
    "floor_divide": (lambda i: i // 3, ints(9, -9)),
    "floor_divide negative": (lambda i: i // -3, ints(9, -9)),
    "floor_divide float": (lambda x: x // 0.3, X),
    "remainder": (lambda x: x % 0.7, X),
    "remainder negative": (lambda x: x % -0.7, X),
    "remainder int": (lambda i: i % 4, ints(9, -9)),
    "remainder int negative": (lambda i: i % -4, ints(9, -9)),
    "remainder of scalar": (lambda i: torch.remainder(7, i), ints(9, 1)),
    "remainder by a size": (lambda i: i % i.shape[1], ints(9, -9)),
    "remainder of a float by a size": (lambda x: (x * 9) % x.shape[1], X),
    "fmod": (lambda x: torch.fmod(x, 0.7), X),
    "fmod int": (lambda i: torch.fmod(i, 4), ints(9, -9)),
    "pow": (lambda x: x**3, X),
    "pow float": (lambda x: x.abs() ** 0.3, X),
    "pow negative": (lambda x: x**-1, X),
    "pow tensor": (lambda x, y: x.abs() ** y, XX),
    "pow of scalar": (lambda x: 2.0**x, X),
    "pow int": (lambda i: i**2, IDS),
    "pow int by float": (lambda i: i**0.5, IDS),
    "pow of int scalar": (lambda i: 2**i, IDS),
    "sqrt": (lambda x: x.abs().sqrt(), X),
    "rsqrt": (lambda x: x.abs().rsqrt(), X),
    "exp2": (lambda x: x.exp2(), X),
    "expm1": (lambda x: (x * 1e-4).expm1(), X),
    "expm1 large": (lambda x: (x * 5).expm1(), X),
    "log1p": (lambda x: (x.abs() * 1e-4).log1p(), X),
    "log1p large": (lambda x: (x.abs() * 100).log1p(), X),
    "log2": (lambda x: x.abs().log2(), X),
    "log10": (lambda x: x.abs().log10(), X),
    "erf": (lambda x: x.erf(), X),
    "sigmoid": (lambda x: (x * 40).sigmoid(), X),
    "tanh": (lambda x: x.tanh(), X),
    "trig": (lambda x: (x.sin(), x.cos(), x.tan(), x.atan(), x.sinh(), x.cosh(), x.asinh()), X),
    "atan2": (lambda x, y: torch.atan2(x, y), XX),
    "reciprocal": (lambda x: x.reciprocal(), X),
    "sign": (lambda x: x.sign(), X),
    "round": (lambda x: (x * 2).round(), X),
    "round decimals": (lambda x: x.round(decimals=2), X),
    "floor ceil trunc frac": (lambda x: (x.floor(), x.ceil(), x.trunc(), x.frac()), X),
    "clamp": (lambda x: x.clamp(-0.5, 0.5), X),
    "clamp min": (lambda x: x.clamp(min=0.1), X),
    "clamp int": (lambda i: i.clamp(1, 3), IDS),
    "clamp tensor": (lambda x, y: x.clamp(max=y), XX),
    "clamp int by float": (lambda i: i.clamp(min=1.5), IDS),
    "addcmul": (lambda x, y: torch.addcmul(x, x, y, value=0.5), XX),
    "addcdiv": (lambda x, y: torch.addcdiv(x, x, y.abs() + 1, value=0.5), XX),
    "lerp": (lambda x, y: torch.lerp(x, y, 0.3), XX),
    "lerp tensor": (lambda x, y: torch.lerp(x, y, x.sigmoid()), XX),
    "where scalar": (lambda x: torch.where(x > 0, 1.0, 0.0), X),
    "where scalar and int": (lambda i: torch.where(i > 2, i, 0), IDS),
    "where mixed": (lambda x, i: torch.where(i[..., None] > 2, x, i[..., None]), XI),
    "nan_to_num": (lambda x: (x / (x * 0)).nan_to_num(0.0), X),
    "isnan isinf isfinite": (lambda x: ((x / 0).isinf(), (x * torch.nan).isnan(), (x / 0).isfinite()), X),
    "comparisons": (lambda x, y: (x > y, x >= 0, x < y, x <= 1, x == x, x != y), XX),
    "comparison of int with float": (lambda i: i > 2.5, IDS),
    "equality of bools": (lambda m: (m == ~m, m != m), mask),
    "logical": (lambda x, i: (torch.logical_and(x > 0, i[..., None] > 2), torch.logical_xor(x > 0, x > 1)), XI),
    "logical of numbers": (lambda x, i: (torch.logical_not(i), torch.logical_or(x, i[..., None])), XI),
    "bitwise": (lambda i: (i & 3, i | 4, i ^ 5, ~i), IDS),
    "bitwise bool": (lambda m: (m & ~m, m | m, m ^ m), mask),
    "shifts": (lambda i: (i << 2, i >> 1), IDS),
    "shift right negative": (lambda i: i >> 1, ints(9, -9)),
    "neg abs": (lambda i: (-i, i.abs()), ints(9, -9)),
    "square": (lambda x: x.square(), X),
    "hypot": (lambda x, y: torch.hypot(x, y), XX),
    "logaddexp": (lambda x, y: torch.logaddexp(x * 50, y * 50), XX),
    "xlogy": (lambda x: torch.xlogy(x, x.abs()), X),
    "heaviside": (lambda x: torch.heaviside(x, torch.tensor(0.5)), X),
    "copysign": (lambda x, y: torch.copysign(x, y), XX),
    "logit": (lambda x: x.sigmoid().logit(), X),
    "polar by cos and sin": (lambda x: torch.stack([x.cos(), x.sin()], -1), X),
    # products
    "matmul": (lambda x, y: x @ y.transpose(1, 2), XX),
    "matmul vector": (lambda x: x @ torch.ones(4), X),
    "bmm": (lambda x, y: torch.bmm(x, y.transpose(1, 2)), XX),
    "baddbmm": (lambda x, y: torch.baddbmm(x[..., :1], x, y.transpose(1, 2), beta=0.5, alpha=2.0), XX),
    "addmm": (lambda x: torch.addmm(x[0, 0], x[0], torch.ones(4, 4), beta=2.0), X),
    "mv dot outer": (lambda x: (x[0] @ x[0, 0], x[0, 0].dot(x[0, -1]), torch.outer(x[0, 0], x[0, :, 0])), X),
    "einsum": (lambda x, y: torch.einsum("bld,bmd->blm", x, y), XX),
    "einsum outer": (lambda x, y: torch.einsum("bli,blj->blij", x, y), XX),
    "einsum three": (lambda x, y: torch.einsum("bli,blj,ij->bl", x, y, torch.ones(4, 4)), XX),
    "einsum ellipsis": (lambda x, y: torch.einsum("...i,...i->...", x, y), XX),
    "einsum diagonal": (lambda x: torch.einsum("bii->bi", x @ x.transpose(1, 2)), X),
    "tensordot": (lambda x, y: torch.tensordot(x, y, ([2], [2])), XX),
    "cdist": (lambda x, y: torch.cdist(x, y), XX),
    "cosine_similarity": (lambda x, y: F.cosine_similarity(x, y, -1), XX),
    "solve_triangular": (lambda x: torch.linalg.solve_triangular(_lower(x), x[..., :1], upper=False), floats(4, 4)),
    "solve_triangular unit": (
        lambda x: torch.linalg.solve_triangular(_lower(x), x, upper=False, unitriangular=True),
        floats(4, 4),
    ),
    "solve_triangular upper": (
        lambda x: torch.linalg.solve_triangular(_lower(x).mT, x, upper=True),
        floats(4, 4),
    ),
    "solve_triangular right": (
        lambda x: torch.linalg.solve_triangular(_lower(x), x, upper=False, left=False),
        floats(4, 4),
    ),
    "det": (lambda x: torch.linalg.det(x), floats(3, 3)),
    # making
    "arange": (lambda x: torch.arange(x.shape[1]), X),
    "arange float": (lambda x: torch.arange(0, 1, 0.25) + x, X),
    "arange of a size to float": (lambda x: torch.arange(x.shape[1], dtype=torch.float32), X),
    "arange from and by": (lambda x: torch.arange(1, 2 * x.shape[1] + 1, 2), X),
    "arange down": (lambda x: torch.arange(x.shape[1] - 1, -1, -1), X),
    "arange float end": (lambda x: torch.arange(0.0, x.shape[1] * 0.5, 0.5), X),
    "linspace": (lambda x: torch.linspace(0, 1, 5) + x[..., :1], X),
    "new_zeros": (lambda x: x.new_zeros(x.shape[1], x.shape[0]), X),
    "new_full": (lambda x: x.new_full((x.shape[1], 3), 2, dtype=torch.int64), X),
    "full": (lambda x: torch.full((x.shape[0], x.shape[1]), -torch.inf), X),
    "full of a size": (lambda x: torch.full((x.shape[0],), x.shape[1]), X),
    "ones_like": (lambda i: (torch.ones_like(i, dtype=torch.float32), torch.zeros_like(i), torch.full_like(i, 3)), IDS),
    "empty then filled": (lambda x: torch.empty(x.shape[0], x.shape[1]).fill_(1.0), X),
    "eye": (lambda x: x @ torch.eye(4), X),
    "eye of a size": (lambda x: torch.eye(x.shape[1]), X),
    "sizes in arithmetic": (
        lambda x: (x + x.shape[1], x - x.shape[1], x.shape[1] - x, x * x.shape[1], x.clamp(max=x.shape[1] - 3)),
        X,
    ),
    "sizes in integer arithmetic": (
        lambda i: (i // i.shape[1], i + i.shape[1], torch.fmod(i, i.shape[1]), i == i.shape[1] - 1, i - i.shape[1]),
        ints(9, -9),
    ),
    "size in pow": (lambda x: x.abs() ** x.shape[1], X),
    "size in masked_fill": (lambda x: x.masked_fill(x > 0, x.shape[1]), X),
    "size in where": (lambda i: torch.where(i > 2, i, i.shape[1]), IDS),
    "size as a number": (lambda x: x / x.shape[1], X),
    "root of a size": (lambda x: x * x.shape[1] ** -0.5, X),
    "square root of a size": (lambda x: x / (x.shape[1] ** 0.5), X),
    "half of a size": (lambda x: x[:, : x.shape[1] // 2 + 1], X),
    "larger of a size": (lambda x: x.new_zeros(max(x.shape[1], 3)), X),
    "position ids": (lambda i: (i != 0).cumsum(1) * (i != 0), IDS),
    "scalar tensor": (lambda x: x + torch.tensor(2), X),
    # reads
    "gather": (lambda x, i: x.gather(2, i[..., None]), XI),
    "gather time": (lambda x, i: x.gather(1, (i % x.shape[1])[..., None].expand(-1, -1, 4)), XI),
    "index": (lambda x, i: x[:, (i[0] % x.shape[1])], XI),
    "index two": (lambda x: x[torch.arange(x.shape[0]), torch.arange(x.shape[0]) * 0], X),
    "index first and last": (lambda x, i: x[i[:, 0] % x.shape[0], :, i[:, 0]], XI),
    "index broadcast": (lambda x: x[torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])], X),
    "index last rows": (lambda x, i: x[torch.arange(x.shape[0]), (i != 9).sum(1) - 1], XI),
    "index bool": (lambda x: x[:, :, torch.tensor([True, False, True, True])], X),
    "index negative": (lambda x: x[:, :, torch.tensor([-1, 0])], X),
    "index_select": (lambda x: x.index_select(2, torch.tensor([3, 1])), X),
    "nonzero": (lambda i: (i > 2).nonzero(), IDS),
    "item-free last": (lambda x: x[:, x.shape[1] - 1], X),
    "bucketize by comparison": (lambda x: (x[..., None] > torch.tensor([-1.0, 0, 1])).sum(-1), X),
    "interpolate": (lambda x: F.interpolate(x.transpose(1, 2), scale_factor=2.0, mode="nearest"), X),
    "type casts": (lambda x: (x.half(), x.double(), x.int(), x.long(), x.bool(), x.bfloat16().float()), X),
    "casts of negative floats": (lambda x: (x * 3).to(torch.int32), X),
    "cast of bool": (lambda m: (m.float(), m.long()), mask),
    "softmax in half": (lambda x: x.half().softmax(-1).float() * 0 + x, X),
}

CONV = torch.tensor([0.5, -1.0, 2.0]).expand(4, 1, 3).contiguous()
LSTM, LSTM_CELL, GRU_CELL = nn.LSTM(4, 5), nn.LSTMCell(4, 4), nn.GRUCell(4, 4)
GROUP_NORM, BATCH_NORM = nn.GroupNorm(2, 4), nn.BatchNorm1d(4).eval()


def _assign(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, 0, 1:3] = y[:, 0, :2]
    x[:, -1] += y[:, -1]
    return x


def _lower(x: torch.Tensor) -> torch.Tensor:
    return x.tril() + 3 * torch.eye(4)


class _Model(nn.Module):
    def __init__(self, ops: list[Callable[..., Any]]) -> None:
        super().__init__()
        self.ops = ops
        self.layers = nn.ModuleList([op for op in ops if isinstance(op, nn.Module)])

    def forward(self, *inputs: torch.Tensor) -> Any:
        return [op(*inputs) for op in self.ops]


def flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


def compare(names: tuple[str, ...]) -> dict[str, str]:
    """Trace and compile these ops, which take the same inputs, as one model; what is wrong with each, by name."""
    torch.manual_seed(0)
    inputs = OPS[names[0]][1]
    model = _Model([OPS[name][0] for name in names]).eval()
    signature = bind(model, inputs(2, 5), None)
    sess = session(export(capture(model, signature, signature.trace_sizes()).program))
    wrong: dict[str, str] = {}
    for batch, length in ((1, 1), (2, 13)):
        given = inputs(batch, length)
        with torch.no_grad():
            expected = [flat(result) for result in model(*(x.clone() for x in given))]
        found = run(sess, given)
        for name, results in zip(names, expected, strict=True):
            part, found = found[: len(results)], found[len(results) :]
            try:
                assert_same(part, results)
            except AssertionError as error:
                wrong.setdefault(name, f"batch {batch}, length {length}: {error}")
    return wrong


def _groups() -> dict[str, tuple[str, ...]]:
    """Ops by the group they are compiled in: tracing costs a second per model, so alike ones share one."""
    by_inputs: dict[Any, list[str]] = {}
    for name, (_, inputs) in OPS.items():
        by_inputs.setdefault(inputs, []).append(name)
    alone = {"pad reflect"}  # torch itself refuses it at length 1
    groups: dict[str, tuple[str, ...]] = {}
    for names in by_inputs.values():
        names = [name for name in names if name not in alone]
        for i in range(0, len(names), 16):
            part = tuple(names[i : i + 16])
            groups.update(dict.fromkeys(part, part))
    return groups


GROUPS = _groups()


@functools.cache
def _compared(names: tuple[str, ...]) -> dict[str, str] | Exception:
    try:
        return compare(names)
    except Exception as error:
        return error


@pytest.mark.parametrize("name", GROUPS)
def test_op_agrees_with_torch_at_sizes_not_traced(name: str) -> None:
    wrong = _compared(GROUPS[name])
    if isinstance(wrong, Exception):  # some op of the group stops all: find out whether it is this one
        wrong = compare((name,))
    assert name not in wrong, wrong[name]


def test_pad_reflect_at_lengths_torch_takes() -> None:
    model = _Model([OPS["pad reflect"][0]])
    signature = bind(model, (torch.randn(2, 5, 4),), None)
    sess = session(export(capture(model, signature, signature.trace_sizes()).program))
    x = torch.randn(3, 11, 4)
    assert_same(run(sess, (x,)), flat(model(x)))
