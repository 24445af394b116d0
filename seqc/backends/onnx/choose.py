"""``seqc::choose`` to ONNX ``If``: each body is a branch, what it reads is captured, so no weight is held twice.

A size is compared as ``Shape`` gives it, a tensor of one element, which ``If`` takes: every node counts where steps are few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
import torch.fx as fx

from seqc.backends.onnx.recurrence import own_outputs
from seqc.ops.choose import choice, inputs_of

if TYPE_CHECKING:
    from seqc.backends.onnx.translate import Translator, Values


def lower(translator: Translator, node: fx.Node, graph: ir.Graph, values: Values) -> list[ir.Value]:
    """Append the ONNX form of a choose node to ``graph``."""
    chosen = choice(node)
    size = _size(chosen.size, values)
    most = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor([chosen.most]))])
    short = ir.Node("", "LessOrEqual", [size.outputs[0], most.outputs[0]])
    branches = []
    for name, body in zip(("short", "long"), chosen.bodies, strict=True):
        branch = ir.Graph([], [], nodes=[], name=f"{node.name}_{name}")
        known = {n.name: values[o.name] for n, o in zip(inputs_of(body), chosen.operands, strict=True)}
        branch.outputs.extend(own_outputs(branch, translator.graph(body, branch, known)))
        branches.append(branch)
    attributes = [ir.AttrGraph("then_branch", branches[0]), ir.AttrGraph("else_branch", branches[1])]
    call = ir.Node("", "If", [short.outputs[0]], attributes, num_outputs=len(branches[0].outputs))
    for added in (size, most, short, call):
        graph.append(added)
    for i, value in enumerate(call.outputs):
        value.name = f"{node.name}_{i}"
    return list(call.outputs)


def _size(node: fx.Node, values: Values) -> ir.Node:
    """The node that gives ``node``, a size of a tensor, as [1]."""
    assert node.target is torch.ops.aten.sym_size.int, f"{node} is no size of a tensor"
    source, axis = node.args
    assert isinstance(source, fx.Node) and isinstance(axis, int)
    attributes = [ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)]
    return ir.Node("", "Shape", [values[source.name]], attributes)
