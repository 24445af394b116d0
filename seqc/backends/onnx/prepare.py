"""Brings a copy of a Program into the form the translator takes: no checks, every cast explicit, nothing dead."""

from __future__ import annotations

import torch

from seqc import _torch
from seqc.program import Program
from seqc.rewrite import remove_dead_code

# They state facts about sizes and values, compute nothing, and have no ONNX form.
_ASSERTIONS = frozenset(
    {
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
        torch.ops.aten._assert_async.default,
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
        _torch.insert_type_promotions(gm)
    remove_dead_code(prepared)
    return prepared
