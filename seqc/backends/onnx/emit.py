"""Small helpers that translations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import onnx_ir as ir
from onnxscript import opset18

op: Any = opset18
"""The ops that translations call. Untyped: onnxscript's annotations are those of eager evaluation."""

Value = Any
"""An ir.Value of the graph at hand, with dtype and shape where it is the result of an fx node."""

Translations = dict[Any, Callable[..., Any]]
Function = TypeVar("Function", bound=Callable[..., Any])


def translates(table: Translations, *targets: Any) -> Callable[[Function], Function]:
    """Enter the decorated translation into ``table`` for every one of ``targets``."""

    def enter(function: Function) -> Function:
        table.update(dict.fromkeys(targets, function))
        return function

    return enter


def constant(value: Any, like: Value) -> Value:
    """A constant of the dtype of ``like``."""
    return op.Constant(value=ir.tensor(value, dtype=like.dtype))


def ints(*values: int) -> Value:
    """A constant int64 vector."""
    return op.Constant(value=ir.tensor(list(values), dtype=ir.DataType.INT64))


def rank(value: Value) -> int:
    return len(value.shape)


def is_value(arg: Any) -> bool:
    return isinstance(arg, ir.Value)


def as_value(arg: Any, like: Value) -> Value:
    """``arg``, a number or a value, as a value of the dtype of ``like``."""
    return op.CastLike(arg, like) if is_value(arg) else constant(arg, like)


def shape_without(value: Value, axis: int) -> Value:
    """The run-time shape of ``value`` without one axis, an int64 vector."""
    parts = []
    if axis > 0:
        parts.append(op.Shape(value, start=0, end=axis))
    if axis + 1 < rank(value):
        parts.append(op.Shape(value, start=axis + 1))
    return op.Concat(*parts, axis=0) if parts else op.Constant(value=ir.tensor([], dtype=ir.DataType.INT64))


def swap_last_axes(value: Value) -> Value:
    n = rank(value)
    swapped = op.Transpose(value, perm=[*range(n - 2), n - 1, n - 2])
    swapped.dtype = value.dtype
    swapped.shape = ir.Shape([*value.shape[:-2], value.shape[-1], value.shape[-2]])
    return swapped
