"""States that are the largest, or the logarithm of the summed exponentials, of what was and what comes."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from seqc.dependence import computed_from
from seqc.loop import Loop

aten = torch.ops.aten

_LARGER = frozenset({aten.gt.Tensor, aten.ge.Tensor})
_SMALLER = frozenset({aten.lt.Tensor, aten.le.Tensor})


@dataclass(frozen=True)
class Running:
    """Carry ``index`` becomes max(``kept``, ``score``), or log(exp(kept) + exp(score)) where ``smooth``.

    ``kept`` is computed from the carry, ``score`` is not.
    """

    index: int
    carry: fx.Node
    following: fx.Node
    kept: fx.Node
    score: fx.Node
    smooth: bool


def running(loop: Loop, index: int) -> Running | None:
    """How carry ``index`` is such a state; None where it is not."""
    carry, following = loop.carries[index][1], loop.next_carries[index]
    for smooth, pair in ((False, _largest(following)), (True, _summed(following))):
        if pair is None:
            continue
        reading = computed_from([carry])
        if (pair[0] in reading) != (pair[1] in reading):
            kept, score = pair if pair[0] in reading else reversed(pair)
            return Running(index, carry, following, kept, score, smooth)
    return None


def _largest(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    args: Any = node.args
    if node.target in (aten.maximum.default, aten.max.other, aten.clamp_min.Tensor):
        return _tensors(args[:2])
    if node.target is aten.clamp.Tensor and not node.kwargs:
        return _tensors(args[:2]) if len(args) == 2 or args[2] is None else None
    if node.target is aten.amax.default:
        return _stacked(node)
    if node.target is operator.getitem and args[1] == 0 and args[0].target is aten.max.dim:
        return _stacked(args[0])
    if node.target is aten.where.self and args[0].target in _LARGER | _SMALLER:
        compared, chosen = tuple(args[0].args), tuple(args[1:])
        return _tensors(chosen) if compared == (chosen if args[0].target in _LARGER else chosen[::-1]) else None
    return None


def _summed(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    if node.target is aten.logaddexp.default:
        return _tensors(node.args)
    return _stacked(node) if node.target is aten.logsumexp.default else None


def _stacked(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values over whose stack ``node`` reduces."""
    stack, dims, *keep = node.args
    if not isinstance(stack, fx.Node) or stack.target is not aten.stack.default or any(keep) or node.kwargs:
        return None
    rank = stack.meta["val"].dim()
    axis = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    (dim,) = dims if isinstance(dims, (list, tuple)) and len(dims) == 1 else (dims,)
    return _tensors(stack.args[0]) if isinstance(dim, int) and dim % rank == axis % rank else None


def _tensors(values: Any) -> tuple[fx.Node, fx.Node] | None:
    if len(values) != 2 or not all(isinstance(v, fx.Node) for v in values):
        return None
    return values[0], values[1]
