"""What is computed in float16 or bfloat16, computed in float32."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc.emit import Emitter

NARROW = (torch.float16, torch.bfloat16)


def is_narrow(values: Any) -> bool:
    """Whether a value, or one of several, is a tensor of a narrow type."""
    return any(isinstance(v, torch.Tensor) and v.dtype in NARROW for v in pytree.tree_leaves(values))


def wide_type(arg: Any) -> Any:
    """float32 in place of a narrow type; anything else as it is."""
    return torch.float32 if isinstance(arg, torch.dtype) and arg in NARROW else arg


def wide(emit: Emitter, arg: Any) -> Any:
    """An argument in float32 where it was narrower: a value, or a type that is asked for."""
    if isinstance(arg, fx.Node) and is_narrow(arg.meta["val"]):
        return emit(torch.ops.aten._to_copy.default, arg, dtype=torch.float32)
    return wide_type(arg)


def wide_body(body: fx.GraphModule) -> fx.GraphModule:
    """A copy of the body of a loop that asks for no narrow type."""
    changed = copy.deepcopy(body)
    for gm in (m for m in changed.modules() if isinstance(m, fx.GraphModule)):
        for node in gm.graph.nodes:
            node.args, node.kwargs = pytree.tree_map(wide_type, (node.args, node.kwargs), is_leaf=lambda a: a is None)
        gm.recompile()
    return changed
