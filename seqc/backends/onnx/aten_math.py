"""Elementwise ops and reductions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch

from seqc.backends.onnx.emit import Translations, Value, as_value, constant, is_value, op, rank, translates
from seqc.backends.onnx.refusal import Unsupported

TRANSLATIONS: Translations = {}
aten, prims = torch.ops.aten, torch.ops.prims


@translates(TRANSLATIONS, aten.log1p.default)
def log1p(self: Value) -> Value:
    """torchlib: Log(1 + x), which loses all digits of a small x.

    log(u) * x / (u - 1) with u = fl(1 + x) is exact to a few ulp (Goldberg 1991, theorem 4).
    """
    one = constant(1, self)
    u = op.Add(self, one)
    log = op.Log(u)
    small = op.Less(op.Abs(self), constant(0.5, self))
    rounded_away = op.Equal(u, one)
    scaled = op.Mul(log, op.Div(self, op.Sub(u, one)))
    return op.Where(rounded_away, self, op.Where(small, scaled, log))


@translates(TRANSLATIONS, aten.expm1.default)
def expm1(self: Value) -> Value:
    """torchlib: Exp(x) - 1, which loses all digits of a small x.

    tanh(x / 2) (exp(x) + 1) has an error of at most 4e-7 of itself over all of float32 (measured; subnormals aside), and
    Exp is often there already.
    """
    return op.Mul(op.Tanh(op.Mul(self, constant(0.5, self))), op.Add(op.Exp(self), constant(1, self)))


@translates(TRANSLATIONS, aten.log_sigmoid.default)
def log_sigmoid(self: Value) -> Value:
    """torchlib: Log(Sigmoid(x)), -inf from x = -104 on. -softplus(-x) is exact there."""
    return op.Neg(op.Softplus(op.Neg(self)))


@translates(TRANSLATIONS, aten.logaddexp.default)
def logaddexp(self: Value, other: Value) -> Value:
    """torchlib: Log(Exp(a) + Exp(b)), infinite from 89 on."""
    peak = op.Max(self, other)
    near = op.Softplus(op.Neg(op.Abs(op.Sub(self, other))))
    return op.Where(op.Equal(self, other), op.Add(peak, constant(math.log(2), self)), op.Add(peak, near))


@translates(TRANSLATIONS, aten.amin.default)
def amin(self: Value, dim: Sequence[int] = (), keepdim: bool = False) -> Value:
    """torchlib insists on ``dim``, which ATen leaves out for all axes."""
    return _reduce(op.ReduceMin, self, dim, keepdim)


@translates(TRANSLATIONS, aten.amax.default)
def amax(self: Value, dim: Sequence[int] = (), keepdim: bool = False) -> Value:
    """As :func:`amin`."""
    return _reduce(op.ReduceMax, self, dim, keepdim)


def _reduce(reduction: Callable[..., Value], self: Value, dim: Sequence[int], keepdim: bool) -> Value:
    bools = self.dtype == ir.DataType.BOOL  # ONNX reduces bool only from opset 20 on
    x = op.Cast(self, to=ir.DataType.UINT8) if bools else self
    axes = op.Constant(value=ir.tensor(list(dim) or list(range(rank(self))), dtype=ir.DataType.INT64))
    reduced = reduction(x, axes, keepdims=int(keepdim))
    return op.Cast(reduced, to=ir.DataType.BOOL) if bools else reduced


@translates(TRANSLATIONS, aten.remainder.Scalar)
def remainder_scalar(self: Value, other: Value) -> Value:
    """torchlib cannot take a divisor that is a symbolic size."""
    return remainder(self, as_value(other, self))


@translates(TRANSLATIONS, aten.remainder.Scalar_Tensor)
def remainder_of_scalar(self: Value, other: Value) -> Value:
    """As :func:`remainder_scalar`."""
    return remainder(as_value(self, other), other)


@translates(TRANSLATIONS, aten.remainder.Tensor)
def remainder(self: Value, other: Value) -> Value:
    """The result has the sign of the divisor, as in Python."""
    if other.dtype is not None and other.dtype.is_integer():
        return op.Mod(self, other)
    rest = op.Mod(self, other, fmod=1)
    zero = op.Equal(rest, constant(0, self))
    wrong_sign = op.Xor(op.Less(rest, constant(0, self)), op.Less(other, constant(0, self)))
    return op.Where(op.And(op.Not(zero), wrong_sign), op.Add(rest, other), rest)


@translates(TRANSLATIONS, aten.add.Tensor, aten.add.Scalar)
def add(self: Value, other: Value, alpha: Value = 1) -> Value:
    """torchlib adds bools by Add, which ONNX does not define for them: their sum is Or."""
    if self.dtype == ir.DataType.BOOL:
        return op.Or(self, as_value(other, self))
    term = as_value(other, self) if not is_value(other) or other.dtype != self.dtype else other
    return op.Add(self, term if not is_value(alpha) and alpha == 1 else op.Mul(as_value(alpha, self), term))


@translates(TRANSLATIONS, aten.pow.Tensor_Scalar, aten.pow.Scalar, aten.pow.Tensor_Tensor)
def power(self: Value, exponent: Value) -> Value:
    """torchlib cannot take an exponent that is a symbolic size, and makes the base of integers an integer."""
    if not is_value(self):
        if isinstance(self, float) and exponent.dtype.is_integer():
            return op.Pow(op.Constant(value_float=self), op.Cast(exponent, to=ir.DataType.FLOAT))
        return op.Pow(constant(self, exponent), exponent)
    if isinstance(exponent, float) and self.dtype.is_integer():
        self = op.Cast(self, to=ir.DataType.FLOAT)
        return op.Pow(self, op.Constant(value_float=exponent))
    if not is_value(exponent):
        return op.Identity(self) if exponent == 1 else op.Pow(self, constant(exponent, self))
    return op.Pow(self, exponent)


@translates(TRANSLATIONS, aten.sort.stable)
def sort_stable(self: Value, *, stable: bool, dim: int = -1, descending: bool = False) -> tuple[Value, Value]:
    """Missing in torchlib. TopK gives the lower index first among equals, so it is stable."""
    axis = dim % rank(self)
    return tuple(op.TopK(self, op.Shape(self, start=axis, end=axis + 1), axis=axis, largest=int(descending), sorted=1))


@translates(TRANSLATIONS, prims.hypot.default)
def hypot(self: Value, other: Value) -> Value:
    """Missing in torchlib. Divided by the larger side, so that no square overflows."""
    a, b = op.Abs(self), op.Abs(other)
    large, small = op.Max(a, b), op.Min(a, b)
    scale = op.Where(op.Equal(large, constant(0, self)), constant(1, self), large)
    ratio = op.Div(small, scale)
    return op.Mul(large, op.Sqrt(op.Add(constant(1, self), op.Mul(ratio, ratio))))


@translates(TRANSLATIONS, prims.signbit.default, aten.signbit.default)
def signbit(self: Value) -> Value:
    """Missing in torchlib. The reciprocal tells -0.0 from 0.0."""
    zero = constant(0, self)
    negative = op.Less(self, zero)
    if self.dtype.is_integer():
        return negative
    return op.Or(negative, op.Less(op.Div(constant(1, self), op.Where(op.IsNaN(self), zero, self)), zero))


@translates(TRANSLATIONS, aten._cdist_forward.default)
def cdist(x1: Value, x2: Value, p: float, compute_mode: int | None) -> Value:
    """Missing in torchlib. Pairwise distances of rows: [..., n, d] and [..., m, d] give [..., n, m]."""
    gap = op.Abs(op.Sub(op.Unsqueeze(x1, [-2]), op.Unsqueeze(x2, [-3])))
    last = op.Constant(value_ints=[-1])
    if p == 2:
        return op.ReduceL2(gap, last, keepdims=0)
    if p == 1:
        return op.ReduceSum(gap, last, keepdims=0)
    if math.isinf(p):
        return op.ReduceMax(gap, last, keepdims=0)
    raise Unsupported(f"cdist is translated for p = 1, 2 and inf, not {p}")
