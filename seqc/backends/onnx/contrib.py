"""Operators of ONNX Runtime's own domain, com.microsoft, two of which became standard in ONNX 27."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
import torch.fx as fx

import seqc.ops  # noqa: F401
from seqc.program import named_args

if TYPE_CHECKING:
    from seqc.backends.onnx.translate import Translator, Values

DOMAIN = "com.microsoft"


def linear_attention(translator: Translator, node: fx.Node, graph: ir.Graph, values: Values) -> list[ir.Value]:
    """LinearAttention, com.microsoft's or the standard one, for ``seqc::ort_linear_attention``."""
    *tensors, heads, rule, standard = named_args(node).values()
    inputs = [None if n is None else values[n.name] for n in tensors]
    while inputs[-1] is None:
        inputs.pop()
    attributes = [
        ir.AttrInt64("q_num_heads", int(heads)),
        ir.AttrInt64("kv_num_heads", int(heads)),
        ir.AttrString("update_rule", str(rule)),
        ir.AttrFloat32("scale", 1.0),
    ]
    return _call("LinearAttention", inputs, attributes, bool(standard), node.name, graph)


def causal_conv(translator: Translator, node: fx.Node, graph: ir.Graph, values: Values) -> list[ir.Value]:
    """CausalConvWithState, com.microsoft's or the standard one, for ``seqc::ort_causal_conv``."""
    *tensors, dilation, standard = named_args(node).values()
    inputs = [None if n is None else values[n.name] for n in tensors]
    while inputs[-1] is None:
        inputs.pop()
    attributes = [] if standard else [ir.AttrInt64("ndim", 1), ir.AttrInt64("dilation", int(dilation))]
    return _call("CausalConvWithState", inputs, attributes, bool(standard), node.name, graph)


def _call(
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Sequence[ir.Attr],
    standard: bool,
    name: str,
    graph: ir.Graph,
) -> list[ir.Value]:
    """Append the operator, which has two results."""
    call = ir.Node(
        "" if standard else DOMAIN, operator, inputs, attributes, num_outputs=2, version=None if standard else 1
    )
    graph.append(call)
    for i, value in enumerate(call.outputs):
        value.name = f"{name}_{i}"
    return list(call.outputs)


WRITERS: dict[Any, Callable[..., list[ir.Value]]] = {
    torch.ops.seqc.ort_linear_attention.default: linear_attention,
    torch.ops.seqc.ort_causal_conv.default: causal_conv,
}
"""By dialect op, what appends its operator to the ONNX graph."""
