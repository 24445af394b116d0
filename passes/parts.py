"""Reads of a part of what a loop's body has just put together: the part is read where it came from."""

from __future__ import annotations

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.loop import Loop
from seqc.program import named_args
from seqc.rewrite import replace_node

aten = torch.ops.aten


def read_through(loop: Loop) -> int:
    """Number of reads changed.

        select(stack([a, b], d), d, 1)      ->  b
        slice(cat([a, b], d), d, -n, end)   ->  slice(b, d, -n, end)      where b has n or more

    So states that a cell keeps in one tensor are carries of their own, and what only the newest input fills is no carry.
    """
    count = 0
    emit = Emitter(loop.body, loop.emit.mode)
    for node in loop.operations():
        with emit.before(node):
            part = _selected(node) if node.target is aten.select.int else _sliced(node, emit)
            if part is not None:
                replace_node(node, part)
                loop.reload()
                count += 1
    return count


def _selected(node: fx.Node) -> fx.Node | None:
    whole, axis, index = named_args(node).values()
    if not isinstance(whole, fx.Node) or whole.target is not aten.stack.default or not isinstance(index, int):
        return None
    parts, rank = list(named_args(whole)["tensors"]), whole.meta["val"].dim()
    return parts[index] if axis % rank == named_args(whole)["dim"] % rank else None


def _sliced(node: fx.Node, emit: Emitter) -> fx.Node | None:
    if node.target is not aten.slice.Tensor:
        return None
    arg = named_args(node)
    whole = arg["self"]
    if not isinstance(whole, fx.Node) or whole.target is not aten.cat.default or arg["step"] != 1:
        return None
    axis = arg["dim"] % whole.meta["val"].dim()
    if axis != named_args(whole)["dim"] % whole.meta["val"].dim():
        return None
    sizes = [part.meta["val"].shape[axis] for part in named_args(whole)["tensors"]]
    bounds = arg["start"] or 0, arg["end"]
    if not all(isinstance(n, int) for n in sizes) or not all(n is None or isinstance(n, int) for n in bounds):
        return None
    low, high, _ = slice(*bounds).indices(sum(sizes))
    start = 0
    for part, size in zip(named_args(whole)["tensors"], sizes, strict=True):
        if start <= low and high <= start + size:
            inside = (low - start, high - start)
            return part if inside == (0, size) else emit(aten.slice.Tensor, part, axis, *inside)
        start += size
    return None
