"""Parts of a tensor along one axis: slices, and the results of a split."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.program import named_args
from seqc.rewrite import result_index

aten = torch.ops.aten

_SPLITS = frozenset({aten.split.Tensor, aten.unsafe_split.Tensor, aten.split_with_sizes.default,
                     aten.unsafe_split_with_sizes.default})  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """``source`` from ``start`` to before ``end`` along ``axis``."""

    source: fx.Node
    axis: int
    start: int
    end: int


def piece(node: fx.Node) -> Piece | None:
    """What ``node`` is a part of; None where it is none, has a stride, or has a place that is not fixed."""
    if node.target is aten.slice.Tensor:
        source, axis, start, end, step = named_args(node).values()
        start, end = start or 0, node.meta["val"].shape[axis] + (start or 0)
        fixed = isinstance(start, int) and isinstance(end, int) and start >= 0 and step == 1
        return Piece(source, axis % source.meta["val"].dim(), start, end) if fixed else None
    split = node.args[0] if node.target is operator.getitem else None
    if not isinstance(split, fx.Node) or split.target not in _SPLITS:
        return None
    source, sizes, axis = list(named_args(split).values())[:3]
    index = result_index(node)
    widths = list(sizes) if isinstance(sizes, (tuple, list)) else [sizes] * index
    width, start = node.meta["val"].shape[axis], sum(widths[:index])
    if not isinstance(width, int) or not isinstance(start, int):
        return None
    return Piece(source, axis % source.meta["val"].dim(), start, start + width)


def joined(emit: Emitter, parts: Sequence[fx.Node], axis: int) -> fx.Node:
    """``parts`` one behind the other along ``axis``; what they are all of, and in order, a piece of is not copied."""
    if len(parts) == 1:
        return parts[0]
    axis %= parts[0].meta["val"].dim()
    pieces = [piece(part) for part in parts]
    first = pieces[0]
    if first is not None and first.axis == axis:
        end = 0
        for p in pieces:
            if p is None or (p.source, p.axis, p.start) != (first.source, axis, end):
                break
            end = p.end
        else:
            if end == first.source.meta["val"].shape[axis]:
                return first.source
    return emit(aten.cat.default, list(parts), axis)
