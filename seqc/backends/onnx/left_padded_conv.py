"""``seqc::left_padded_conv`` to ONNX ``Conv`` with padding in front only.

A single step, as in streaming, is a product with the taps: ONNX Runtime's Conv does as many small matrix products as there
are channels (measured on its CPU provider at 1536 channels, 4 taps, one step: 238 µs against 10 µs). Where the number of
steps is known at run time only, an ``If`` chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
import torch.fx as fx

from seqc import _torch
from seqc.ops.causal_conv import reach
from seqc.program import named_args

if TYPE_CHECKING:
    from seqc.backends.onnx.translate import Translator, Values


def lower(translator: Translator, node: fx.Node, graph: ir.Graph, values: Values) -> ir.Value:
    """Append the ONNX form of a left_padded_conv node to ``graph``."""
    arguments = named_args(node)
    x, weight, bias, left, dilation = arguments.values()
    inputs = [values[n.name] for n in (x, weight, bias) if n is not None]
    steps = reach(weight.meta["val"], dilation)
    length = _torch.size_expr(node.meta["val"].shape[2])
    # With zeros in front one step meets the last tap only, with a state in front all of them; between are no such forms.
    single = left == steps or (left == 0 and dilation == 1)
    if single and length == 1:
        return _single(graph, inputs, left)
    if not single or length.is_Integer:
        return _conv(graph, inputs, weight.meta["val"], left, dilation)
    branches = [ir.Graph([], [], nodes=[], name=f"{node.name}_{which}") for which in ("step", "steps")]
    results = [_single(branches[0], inputs, left), _conv(branches[1], inputs, weight.meta["val"], left, dilation)]
    for branch, result in zip(branches, results, strict=True):
        translator.describe(result, node.meta["val"])
        branch.outputs.append(result)
    size = _append(graph, "Shape", inputs[:1], ir.AttrInt64("start", 2), ir.AttrInt64("end", 3))
    one = _append(graph, "Equal", [size, _ints(graph, steps + 1 - left)])
    attributes = [ir.AttrGraph("then_branch", branches[0]), ir.AttrGraph("else_branch", branches[1])]
    result = _append(graph, "If", [one], *attributes)
    result.name = node.name
    return result


def _single(graph: ir.Graph, inputs: Sequence[ir.Value], left: int) -> ir.Value:
    x, weight, *bias = inputs
    if left:
        last = _append(graph, "Gather", [weight, _ints(graph, -1)], ir.AttrInt64("axis", 2))
        y = _append(graph, "Mul", [x, _append(graph, "Squeeze", [last, _ints(graph, 1)])])
    else:
        products = _append(graph, "Mul", [x, _append(graph, "Squeeze", [weight, _ints(graph, 1)])])
        y = _append(graph, "ReduceSum", [products, _ints(graph, 2)], ir.AttrInt64("keepdims", 1))
    return _append(graph, "Add", [y, _append(graph, "Unsqueeze", [bias[0], _ints(graph, 1)])]) if bias else y


def _conv(graph: ir.Graph, inputs: Sequence[ir.Value], weight: torch.Tensor, left: int, dilation: int) -> ir.Value:
    return _append(
        graph,
        "Conv",
        inputs,
        ir.AttrInt64("group", int(weight.shape[0])),
        ir.AttrInt64s("kernel_shape", [int(weight.shape[2])]),
        ir.AttrInt64s("dilations", [dilation]),
        ir.AttrInt64s("pads", [left, 0]),
    )


def _append(graph: ir.Graph, op: str, inputs: Sequence[ir.Value], *attributes: ir.Attr) -> ir.Value:
    node = ir.Node("", op, inputs, attributes)
    graph.append(node)
    return node.outputs[0]


def _ints(graph: ir.Graph, value: int) -> Any:
    return _append(graph, "Constant", [], ir.AttrTensor("value", ir.tensor([value], dtype=ir.DataType.INT64)))
