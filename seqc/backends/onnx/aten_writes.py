"""Writes into tensors, and views of their memory."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch
from onnxscript.function_libs.torch_lib.ops.core import aten_view

from seqc.backends.onnx.emit import Translations, Value, constant, ints, op, rank, translates
from seqc.backends.onnx.refusal import Unsupported

TRANSLATIONS: Translations = {}
aten = torch.ops.aten


@translates(TRANSLATIONS, aten.copy.default)
def copy(self: Value, src: Value, non_blocking: bool = False) -> Value:
    """torchlib returns ``src`` as it is; ATen broadcasts it to the shape of ``self``."""
    cast = op.Cast(src, to=self.dtype) if src.dtype != self.dtype else src
    return op.Identity(cast) if src.shape == self.shape else op.Expand(cast, op.Shape(self))


@translates(TRANSLATIONS, aten.reshape.default)
def reshape(self: Value, shape: Sequence[Value | int]) -> Value:
    """torchlib takes an axis that is empty at run time for one to be copied from the input; not so in its view."""
    return aten_view(self, shape)


@translates(TRANSLATIONS, aten.squeeze.dims)
def squeeze_dims(self: Value, dim: Sequence[int]) -> Value:
    """Missing in torchlib, where torch decomposes it; passes write it too. Axes of another size than 1 stay."""
    axes = sorted({d % rank(self) for d in dim if self.shape[d] == 1}) if rank(self) else []
    return op.Squeeze(self, ints(*axes)) if axes else op.Identity(self)


@translates(TRANSLATIONS, aten.as_strided.default)
def as_strided(self: Value, *settings: object) -> Value:
    """torchlib takes the memory for contiguous, which a transposed or sliced tensor's is not."""
    raise Unsupported(
        "it reads memory by strides, and an ONNX tensor has no memory layout: use reshape, unfold or slices"
    )


def _fitted(index: Value, src: Value) -> tuple[Value, Value]:
    """Index and source of one shape, as ONNX asks: ATen lets the source be larger, and both be scalars."""
    if rank(index) == 0:
        index = op.Unsqueeze(index, ints(0))
    if rank(src) == 0:
        return index, op.Unsqueeze(src, ints(0))
    if src.shape != index.shape and index.shape is not None:
        n = rank(src)
        src = op.Slice(src, ints(*[0] * n), op.Shape(index), ints(*range(n)))
    return index, src


@translates(TRANSLATIONS, aten.scatter.src)
def scatter_src(self: Value, dim: int, index: Value, src: Value) -> Value:
    """torchlib passes a source that is larger than the index, which ONNX does not take."""
    index, src = _fitted(index, src)
    return op.ScatterElements(self, index, src, axis=dim)


@translates(TRANSLATIONS, aten.scatter_add.default)
def scatter_add(self: Value, dim: int, index: Value, src: Value) -> Value:
    """As :func:`scatter_src`."""
    index, src = _fitted(index, src)
    return op.ScatterElements(self, index, src, axis=dim, reduction="add")


@translates(TRANSLATIONS, aten.scatter_reduce.two)
def scatter_reduce(self: Value, dim: int, index: Value, src: Value, reduce: str, include_self: bool = True) -> Value:
    """torchlib takes ``mean`` for a plain write. Also as :func:`scatter_src`."""
    if rank(self) == 0:
        raise Unsupported("scatter_reduce on a tensor without axes")
    index, src = _fitted(index, src)
    neutral = {"sum": 0, "mean": 0, "prod": 1, "amax": _least(self.dtype), "amin": _largest(self.dtype)}[reduce]
    start = self
    if not include_self:
        blank = op.Expand(constant(neutral, self), op.Shape(index))
        start = op.ScatterElements(self, index, blank, axis=dim)
    mode = {"sum": "add", "mean": "add", "prod": "mul", "amax": "max", "amin": "min"}[reduce]
    result = op.ScatterElements(start, index, src, axis=dim, reduction=mode)
    if reduce != "mean":
        return result
    if not self.dtype.is_floating_point():
        raise Unsupported("scatter_reduce with mean on integers")
    ones = op.Expand(constant(1, self), op.Shape(index))
    counts = op.Expand(constant(1 if include_self else 0, self), op.Shape(self))
    count = op.ScatterElements(counts, index, ones, axis=dim, reduction="add")
    return op.Div(result, op.Max(count, constant(1, self)))


def _least(dtype: ir.DataType) -> float:
    return float("-inf") if dtype.is_floating_point() else int(torch.iinfo(_torch_int(dtype)).min)


def _largest(dtype: ir.DataType) -> float:
    return float("inf") if dtype.is_floating_point() else int(torch.iinfo(_torch_int(dtype)).max)


def _torch_int(dtype: ir.DataType) -> torch.dtype:
    found = getattr(torch, dtype.name.lower(), None)
    if not isinstance(found, torch.dtype) or found is torch.bool:
        raise Unsupported(f"scatter_reduce on {dtype.name.lower()}")
    return found
