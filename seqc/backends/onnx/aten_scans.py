"""Cumulative ops without an ONNX operator, and triangular solves: a Scan over the axis."""

from __future__ import annotations

import onnx_ir as ir
import torch

from seqc import _torch
from seqc.backends.onnx.emit import Translations, Value, ints, op, rank, shape_without, swap_last_axes, translates

TRANSLATIONS: Translations = {}
aten = torch.ops.aten


def _filled(self: Value, axis: int, value: float) -> Value:
    """One step of ``self`` along ``axis``, filled with ``value``."""
    filled = op.ConstantOfShape(shape_without(self, axis), value=ir.tensor([value], dtype=self.dtype))
    filled.dtype = self.dtype
    filled.shape = ir.Shape([d for i, d in enumerate(self.shape) if i != axis])
    return filled


@translates(TRANSLATIONS, aten.cumprod.default)
def cumprod(self: Value, dim: int, dtype: int | None = None) -> Value:
    """torch decomposes it to a masked product of [length, length]; here it is a Scan."""
    if dtype is None and not self.dtype.is_floating_point():
        dtype = ir.DataType.INT64
    if dtype is not None and dtype not in (-1, self.dtype):
        cast, shape = op.Cast(self, to=dtype), self.shape
        cast.dtype, cast.shape = ir.DataType(dtype), shape
        self = cast
    if rank(self) == 0:
        return op.Identity(self)
    axis = dim % rank(self)

    def step(product: Value, x: Value) -> list[Value]:
        new = op.Mul(product, x)
        return [new, op.Identity(new)]

    return _torch.onnx_scan(step, [_filled(self, axis, 1)], [self], [axis], False)[1]


@translates(TRANSLATIONS, aten.logcumsumexp.default)
def logcumsumexp(self: Value, dim: int) -> Value:
    """torchlib subtracts ONE maximum of the whole axis: -inf where the axis rises by more than 103, NaN for -inf.

    Here the running value itself is what is subtracted.
    """
    if rank(self) == 0:
        return op.Identity(self)
    axis = dim % rank(self)

    def step(total: Value, x: Value) -> list[Value]:
        peak = op.Max(total, x)
        rest = op.Softplus(op.Neg(op.Abs(op.Sub(total, x))))  # at most log 2
        new = op.Where(op.IsInf(peak), peak, op.Add(peak, rest))
        return [new, op.Identity(new)]

    return _torch.onnx_scan(step, [_filled(self, axis, float("-inf"))], [self], [axis], False)[1]


@translates(TRANSLATIONS, aten.cummax.default)
def cummax(self: Value, dim: int) -> tuple[Value, Value]:
    """Missing in torchlib. Of equal values the last counts, and NaN stays, as in torch."""
    return _running(self, dim, largest=True)


@translates(TRANSLATIONS, aten.cummin.default)
def cummin(self: Value, dim: int) -> tuple[Value, Value]:
    """As :func:`cummax`."""
    return _running(self, dim, largest=False)


def _running(self: Value, dim: int, largest: bool) -> tuple[Value, Value]:
    axis = dim % rank(self)
    floating = self.dtype.is_floating_point()
    start = op.Gather(self, op.Constant(value_int=0), axis=axis)
    start.dtype, start.shape = self.dtype, ir.Shape([d for i, d in enumerate(self.shape) if i != axis])
    index = op.ConstantOfShape(shape_without(self, axis), value=ir.tensor([0], dtype=ir.DataType.INT64))
    index.dtype, index.shape = ir.DataType.INT64, start.shape
    time = op.Range(
        op.Constant(value_int=0), op.Squeeze(op.Shape(self, start=axis, end=axis + 1)), op.Constant(value_int=1)
    )
    time.dtype, time.shape = ir.DataType.INT64, ir.Shape([self.shape[axis]])

    def step(best: Value, where: Value, x: Value, t: Value) -> list[Value]:
        better = op.GreaterOrEqual(x, best) if largest else op.LessOrEqual(x, best)
        if floating:
            better = op.And(op.Or(better, op.IsNaN(x)), op.Or(op.Not(op.IsNaN(best)), op.IsNaN(x)))
        value, place = op.Where(better, x, best), op.Where(better, t, where)
        return [value, place, op.Identity(value), op.Identity(place)]

    result = _torch.onnx_scan(step, [start, index], [self, time], [axis, 0], False)
    return result[2], result[3]


@translates(TRANSLATIONS, aten.linalg_solve_triangular.default)
def solve_triangular(self: Value, B: Value, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Value:
    """Missing in torchlib. Row by row substitution: rows not yet solved are zero, so a whole row of A may be used."""
    if not left:  # X A = B is A^T X^T = B^T
        return swap_last_axes(
            solve_triangular(
                swap_last_axes(self), swap_last_axes(B), upper=not upper, left=True, unitriangular=unitriangular
            )
        )
    a = op.Trilu(self, upper=int(upper))
    a.dtype, a.shape = self.dtype, self.shape
    n = rank(self)
    batch = op.Concat(op.Shape(self, start=0, end=n - 2), ints(1, 1), axis=0)
    b = op.Expand(B, batch)
    b.dtype, b.shape = B.dtype, B.shape
    size = op.Squeeze(op.Shape(self, start=n - 1), ints(0))
    row = op.Range(op.Constant(value_int=0), size, op.Constant(value_int=1))
    eye = op.Cast(
        op.Equal(op.Unsqueeze(row, ints(1)), row), to=self.dtype
    )  # TensorRT has no EyeLike of a size that varies
    eye.dtype, eye.shape = self.dtype, ir.Shape([self.shape[-1], self.shape[-1]])
    nothing = op.ConstantOfShape(op.Shape(b), value=ir.tensor([0], dtype=self.dtype))
    nothing.dtype, nothing.shape = b.dtype, b.shape

    def step(solved: Value, row: Value, right: Value, here: Value) -> list[Value]:
        known = op.Squeeze(op.MatMul(op.Unsqueeze(row, ints(-2)), solved), ints(-2))
        x = op.Sub(right, known)
        if not unitriangular:
            x = op.Div(x, op.ReduceSum(op.Mul(row, here), ints(-1), keepdims=1))
        return [op.Add(solved, op.Mul(op.Unsqueeze(here, ints(-1)), op.Unsqueeze(x, ints(-2))))]

    result = _torch.onnx_scan(step, [nothing], [a, b, eye], [n - 2, rank(B) - 2, 0], upper)[0]
    result.dtype, result.shape = b.dtype, b.shape
    return result
