"""Operators of ONNX Runtime's own domain, com.microsoft."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
import torch.fx as fx

import seqc.ops  # noqa: F401

if TYPE_CHECKING:
    from seqc.backends.onnx.translate import Translator, Values

DOMAIN = "com.microsoft"


def linear_attention(translator: Translator, node: fx.Node, graph: ir.Graph, values: Values) -> list[ir.Value]:
    """com.microsoft.LinearAttention for ``seqc::ort_linear_attention``."""
    *tensors, heads, rule = node.args
    inputs = [values[n.name] if isinstance(n, fx.Node) else None for n in tensors]
    while inputs[-1] is None:
        inputs.pop()
    attributes = [
        ir.AttrInt64("q_num_heads", int(heads)),  # type: ignore[arg-type]
        ir.AttrInt64("kv_num_heads", int(heads)),  # type: ignore[arg-type]
        ir.AttrString("update_rule", str(rule)),
        ir.AttrFloat32("scale", 1.0),
    ]
    call = ir.Node(DOMAIN, "LinearAttention", inputs, attributes, num_outputs=2, version=1)
    graph.append(call)
    for i, value in enumerate(call.outputs):
        value.name = f"{node.name}_{i}"
    return list(call.outputs)


def causal_conv(translator: Translator, node: fx.Node, graph: ir.Graph, values: Values) -> list[ir.Value]:
    """com.microsoft.CausalConvWithState for ``seqc::ort_causal_conv``."""
    *tensors, dilation = node.args
    inputs = [values[n.name] if isinstance(n, fx.Node) else None for n in tensors]
    while inputs[-1] is None:
        inputs.pop()
    attributes = [ir.AttrInt64("ndim", 1), ir.AttrInt64("dilation", int(dilation))]  # type: ignore[arg-type]
    call = ir.Node(DOMAIN, "CausalConvWithState", inputs, attributes, num_outputs=2, version=1)
    graph.append(call)
    for i, value in enumerate(call.outputs):
        value.name = f"{node.name}_{i}"
    return list(call.outputs)


WRITERS: dict[Any, Callable[..., list[ir.Value]]] = {
    torch.ops.seqc.ort_linear_attention.default: linear_attention,
    torch.ops.seqc.ort_causal_conv.default: causal_conv,
}
"""By dialect op, what appends its operator to the ONNX graph."""
