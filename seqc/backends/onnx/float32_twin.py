"""The float32 form of an ONNX model in bfloat16: what ONNX Runtime, which has no kernels for that on a CPU, can run."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

_NARROW, _WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def has_bfloat16(model: ir.Model) -> bool:
    """Whether a node of ``model``, or of a body in it, gives bfloat16."""
    return any(v.dtype is _NARROW for node in model.graph.all_nodes() for v in node.outputs)


def float32_twin(model: ir.Model) -> ir.Model:
    """A copy with float32 wherever ``model`` has bfloat16: the same nodes, the same (rounded) weights, wider arithmetic."""
    twin = model.clone()
    for graph in twin.graphs():
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            _widen(value)
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _wide(value.const_value)
        for node in graph:
            for value in node.outputs:
                _widen(value)
            for name, attribute in list(node.attributes.items()):
                if attribute.type is ir.AttributeType.TENSOR:
                    node.attributes[name] = ir.AttrTensor(name, _wide(attribute.as_tensor()))
                elif name in ("to", "dtype", "output_dtype") and attribute.value == _NARROW:
                    node.attributes[name] = ir.AttrInt64(name, _WIDE)
    return twin


def _widen(value: ir.Value) -> None:
    if value.dtype is _NARROW:
        value.type = ir.TensorType(_WIDE)  # a new one: a clone shares its types with the original


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if tensor.dtype is not _NARROW:
        return tensor
    return ir.tensor(tensor.numpy().astype(ml_dtypes.bfloat16).astype(np.float32), name=tensor.name)
