"""Logarithms of decays, taken apart instead of computed: log(exp(g)) is g."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx as fx

from seqc.emit import Emitter

aten = torch.ops.aten

_MOVES = frozenset({aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim,
                    aten.squeeze.dims, aten.expand.default, aten.reshape.default, aten.view.default,
                    aten.select.int, aten.slice.Tensor, aten._to_copy.default})  # fmt: skip
_NOT_NEGATIVE = frozenset({aten.abs.default, aten.relu.default, aten.softplus.default, aten.square.default})


def log_of(emit: Emitter, node: fx.Node, weights: dict[str, torch.Tensor]) -> fx.Node | None:
    """The logarithm of ``node``, written where ``emit`` stands; None where it is not known to be at least 0.

    A value of 0 has the logarithm -inf, whose exponential is 0 again. ``weights`` are the constants by node name.
    """
    target = node.target
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if node.op == "placeholder":
        weight = weights.get(node.name)
        return emit(aten.log.default, node) if weight is not None and bool((weight >= 0).all()) else None
    if first is None:
        return None
    if target is aten.exp.default:
        return first
    if target is aten.sigmoid.default:
        return emit(aten.log_sigmoid.default, first)
    if target is aten._to_copy.default and first.meta["val"].dtype == torch.bool:
        return emit(aten.log.default, node)
    if target is aten._to_copy.default and node.meta["val"].dtype != first.meta["val"].dtype:
        return None
    if target in _MOVES:
        inner = log_of(emit, first, weights)
        return None if inner is None else emit(target, inner, *node.args[1:], **node.kwargs)
    if target in _NOT_NEGATIVE:
        return emit(aten.log.default, node)
    if target in (aten.mul.Tensor, aten.mul.Scalar):
        return _sum_of_logs(emit, list(node.args), weights)
    if target in (aten.rsub.Scalar, aten.rsub.Tensor) and node.args[1] == 1:
        return _of_complement(emit, node, first)
    return None


def _sum_of_logs(emit: Emitter, factors: list[Any], weights: dict[str, torch.Tensor]) -> fx.Node | None:
    logs = []
    for factor in factors:
        if isinstance(factor, fx.Node):
            found = log_of(emit, factor, weights)
        elif isinstance(factor, (int, float)) and factor > 0:
            found = math.log(factor)  # type: ignore[assignment]
        else:
            return None
        if found is None:
            return None
        logs.append(found)
    return emit(aten.add.Tensor, *logs)


def _of_complement(emit: Emitter, node: fx.Node, first: fx.Node) -> fx.Node | None:
    """log(1 - sigmoid(x)) is log_sigmoid(-x); 1 minus a mask is a mask."""
    if first.target is aten.sigmoid.default:
        return emit(aten.log_sigmoid.default, emit(aten.neg.default, first.args[0]))
    source = first.args[0] if first.target is aten._to_copy.default else None
    if isinstance(source, fx.Node) and source.meta["val"].dtype == torch.bool:
        return emit(aten.log.default, node)
    return None
