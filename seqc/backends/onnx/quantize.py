"""Weights of products and convolutions in int8 or int4: made floats again, by DequantizeLinear, where they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]

INT4_OPSET = 21
"""The first opset with int4 and with scales of blocks."""

_QUANTIZED = ".quantized"
_BLOCKS = (128, 64, 32, 16)
_LEAST = 16
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_LARGEST = {"int8": 127, "int4": 7}


@dataclass
class Quantized:
    """What became of the weights of a model: bytes before and after, and why some stayed (by name)."""

    count: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    stayed: dict[str, str] = field(default_factory=dict)


def quantize(model: ir.Model, bits: str) -> tuple[ir.Model, Quantized]:
    """A copy of ``model`` with its matrices in ``bits`` (``int8`` or ``int4``), rounded to nearest, symmetric around 0.

    In int8 the kernels of convolutions are matrices too: what is summed into an output channel is a row.

    int8: one scale, max|w| / 127, for each output channel. int4: max|w| / 7 for each block of 128 weights (fewer where 128 does
    not divide the inner size) that are summed into one output. Scales have the type of the weight.
    """

    def stored(weight: _Weight, q: Array, scale: Array, attributes: dict[str, int]) -> ir.Value:
        name, value = weight.value.name, weight.value
        graph = weight.graph
        kind = ir.DataType.INT8 if bits == "int8" else ir.DataType.INT4
        parts = [
            ir.Value(name=f"{name}.{part}", const_value=ir.tensor(array, dtype=dtype, name=f"{name}.{part}"))
            for part, array, dtype in ((_QUANTIZED[1:], q, kind), ("scale", scale, value.dtype))
        ]
        for part in parts:
            assert part.const_value is not None, "given above"
            part.type, part.shape = ir.TensorType(part.const_value.dtype), part.const_value.shape  # type: ignore[assignment]
            graph.register_initializer(part)
        node = ir.node("DequantizeLinear", parts, attributes, name=f"{name}.dequantize")
        node.metadata_props.update(weight.readers[0].metadata_props)
        graph.insert_before(graph[0], node)
        node.outputs[0].name = f"{name}.dequantized"
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        return node.outputs[0]

    return _rewritten(model, bits, stored)


def dequantized(model: ir.Model, bits: str) -> ir.Model:
    """A copy of ``model`` with floats, as they are after :func:`quantize`: what a quantised model has to compute."""

    def rounded(weight: _Weight, q: Array, scale: Array, attributes: dict[str, int]) -> ir.Value:
        value = weight.value
        array = _floats(q, _spread(q, scale, attributes))
        name = f"{value.name}.dequantized"
        made = ir.Value(name=name, const_value=ir.tensor(array, dtype=value.dtype, name=name))
        made.type, made.shape = value.type, value.shape
        weight.graph.register_initializer(made)
        return made

    return _rewritten(model, bits, rounded)[0]


@dataclass(frozen=True)
class Stored:
    """A matrix of a quantised model by the ``name`` that it had: its ``values`` as floats, and the ``unit`` of each."""

    name: str
    values: Array
    unit: Array


def stored_matrices(model: ir.Model) -> Iterator[Stored]:
    """The matrices that :func:`quantize` put into ``model``."""
    for node in filter(dequantizes, model.graph.all_nodes()):
        named = [v for v in node.inputs if v is not None and v.const_value is not None]
        q, scale = (v.const_value.numpy() for v in named if v.const_value is not None)
        spread = _spread(q, scale, {name: a.as_int() for name, a in node.attributes.items()})
        yield Stored((named[0].name or "").removesuffix(_QUANTIZED), _floats(q, spread), spread)


def dequantizes(node: ir.Node) -> bool:
    """Whether ``node`` makes floats of a matrix that :func:`quantize` stored."""
    given = [value.name or "" for value in node.inputs if value is not None and value.const_value is not None]
    return node.op_type == "DequantizeLinear" and len(given) == 2 and given[0].endswith(_QUANTIZED)


@dataclass(frozen=True)
class _Weight:
    graph: ir.Graph
    value: ir.Value
    readers: tuple[ir.Node, ...]


_Parts = tuple[Array, Array, dict[str, int]]
"""Whole numbers, scales, and the attributes of DequantizeLinear that go with them."""


def _rewritten(
    model: ir.Model, bits: str, write: Callable[[_Weight, Array, Array, dict[str, int]], ir.Value]
) -> tuple[ir.Model, Quantized]:
    result, told = model.clone(), Quantized()
    graph = result.graph
    for name, value in list(graph.initializers.items()):
        if value.dtype not in _FLOATS or value.const_value is None or value.shape is None:
            continue
        readers = tuple(dict.fromkeys(use.node for use in value.uses()))
        array = value.const_value.numpy()
        if array.ndim == 2:
            found = _matrix(value, array, bits)
        elif array.ndim > 2 and all(use.node.op_type == "Conv" and use.idx == 1 for use in value.uses()):
            found = _kernel(array, bits)
        else:
            continue
        if isinstance(found, str):
            if found:
                told.stayed[name] = found
            continue
        q, scale, attributes = found
        made = write(_Weight(graph, value, readers), q, scale, attributes)
        ir.convenience.replace_all_uses_with(value, made)
        del graph.initializers[name]
        told.count += 1
        told.bytes_before += array.nbytes
        told.bytes_after += (q.size if bits == "int8" else q.size // 2) + scale.nbytes
    return result, told


def _matrix(value: ir.Value, array: Array, bits: str) -> _Parts | str:
    """The parts of a matrix; or why it stays, empty where none would expect otherwise."""
    summed = _summed_axis(value)
    if summed is None:
        readers = sorted({use.node.op_type for use in value.uses()})
        return f"is read by {', '.join(readers)}" if {"MatMul", "Gemm", "Transpose"} & set(readers) else ""
    block = next((b for b in _BLOCKS if array.shape[summed] % b == 0), None)
    if min(array.shape) < _LEAST:
        return f"has {' x '.join(map(str, array.shape))} numbers only"
    if bits == "int4" and block is None:
        return f"sums over {array.shape[summed]}, which is no multiple of {_BLOCKS[-1]}"
    size = array.shape[summed] if bits == "int8" or block is None else block
    q, scale = _rounded(array, summed, size, _LARGEST[bits])
    if bits == "int8":
        return q, scale.squeeze(summed), {"axis": summed ^ 1}
    return q, scale, {"axis": summed, "block_size": size}


def _kernel(array: Array, bits: str) -> _Parts | str:
    """The parts of a convolution's kernel [output channels, ...]; or why it stays."""
    if bits != "int8":
        return "is the kernel of a convolution, for which there is int8 only"
    rows = array.reshape(len(array), -1)
    if rows.shape[1] < _LEAST:
        return f"has {rows.shape[1]} numbers for an output channel only"
    q, scale = _rounded(rows, 1, rows.shape[1], _LARGEST[bits])
    return q.reshape(array.shape), scale.squeeze(1), {"axis": 0}


def _summed_axis(value: ir.Value) -> int | None:
    """The axis of a matrix that all its readers sum over; None where one is no product with it on the right."""
    axes: set[int | None] = set()
    for use in value.uses():
        node = use.node
        if node.op_type == "Transpose" and all(
            u.idx == 1 and u.node.op_type == "MatMul" for u in node.outputs[0].uses()
        ):
            axes.add(1)
        elif node.op_type in ("MatMul", "Gemm") and use.idx == 1:
            axes.add(1 if node.op_type == "Gemm" and _transposed(node) else 0)
        else:
            axes.add(None)
    return axes.pop() if len(axes) == 1 and not value.is_graph_output() else None


def _transposed(gemm: ir.Node) -> bool:
    found = gemm.attributes.get("transB")
    return found is not None and bool(found.as_int())


def _rounded(array: Array, summed: int, size: int, largest: int) -> tuple[Array, Array]:
    """(whole numbers, scale of each block of ``size`` along axis ``summed``)."""
    blocks = array.astype(np.float32)
    shape = list(blocks.shape)
    shape[summed : summed + 1] = [shape[summed] // size, size]
    blocks = blocks.reshape(shape)
    scale = (np.abs(blocks).max(summed + 1, keepdims=True) / largest).astype(array.dtype)
    scale[scale == 0] = 1
    q = np.clip(np.rint(blocks / scale.astype(np.float32)), -largest, largest).reshape(array.shape)
    return q.astype(np.int8 if largest == _LARGEST["int8"] else ml_dtypes.int4), scale.squeeze(summed + 1)


def _spread(q: Array, scale: Array, attributes: Mapping[str, int]) -> Array:
    """The scale of each number, of a shape that goes with that of ``q``."""
    axis, size = attributes["axis"], attributes.get("block_size", 0)
    return np.repeat(scale, size, axis) if size else scale.reshape([-1 if a == axis else 1 for a in range(q.ndim)])


def _floats(q: Array, spread: Array) -> Array:
    """What DequantizeLinear makes of ``q``."""
    return (q.astype(np.float32) * spread.astype(np.float32)).astype(spread.dtype)
