"""Brings a copy of a Program into the form the translator takes: no checks, every cast explicit, nothing dead."""

from __future__ import annotations

import torch
import torch.fx as fx

from seqc import _torch
from seqc.program import Program
from seqc.rewrite import remove_dead_code, replace_node

# They state facts about sizes and values, compute nothing, and have no ONNX form.
_ASSERTIONS = frozenset(
    {
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
        torch.ops.aten._assert_async.default,
        torch.ops.aten._linalg_check_errors.default,
        torch.ops.aten._assert_async.msg,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_tensor_metadata.default,
    }
)


def prepare(program: Program) -> Program:
    """A copy of ``program``, ready to be translated; the original is left as it is."""
    prepared = program.copy()
    for gm in prepared.graph_modules():
        for node in list(gm.graph.nodes):
            if node.target in _ASSERTIONS:
                gm.graph.erase_node(node)
            elif _restates_layout(node):
                replace_node(node, node.all_input_nodes[0])
        _torch.insert_type_promotions(gm)
    remove_dead_code(prepared)
    return prepared


def _restates_layout(node: fx.Node) -> bool:
    """Whether an as_strided only says again how its input lies in memory, as decompositions of pooling do."""
    if node.target is not torch.ops.aten.as_strided.default or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    if before.dim() != after.dim():
        return False
    sizes = [(_torch.size_expr(a), _torch.size_expr(b)) for a, b in zip(before.shape, after.shape, strict=True)]
    strides = [(_torch.size_expr(a), _torch.size_expr(b)) for a, b in zip(before.stride(), after.stride(), strict=True)]
    same = all(a == b and (a == 1 or s == t) for (a, b), (s, t) in zip(sizes, strides, strict=True))
    return same and _torch.size_expr(before.storage_offset()) == _torch.size_expr(after.storage_offset())
