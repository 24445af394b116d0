"""Values that are a matrix product of a sequence's steps: x weight^T + bias, whatever was done to its rows since."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from seqc.axes import PERMUTES, order_of
from seqc.emit import Emitter
from seqc.pieces import joined, piece

aten = torch.ops.aten


@dataclass(frozen=True)
class Projection:
    """``x`` [..., D] times ``weight`` [J, D], transposed, and ``bias`` [J] or none."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def projection(emit: Emitter, node: fx.Node) -> Projection | None:
    """``node`` as a projection, its parts written where ``emit`` stands; None where it is not seen to be one.

    Seen through: slices and splits of the rows, rows put together again, biases added, leading axes permuted.
    """
    target = node.target
    if target is aten.linear.default:
        x, weight, *bias = node.args
        if not isinstance(weight, fx.Node) or weight.meta["val"].dim() != 2:
            return None
        return Projection(x, weight, bias[0] if bias else None)  # type: ignore[arg-type]
    if target in (aten.mm.default, aten.matmul.default):
        x, weight = node.args
        if weight.meta["val"].dim() != 2:  # type: ignore[union-attr]
            return None
        return Projection(x, emit(aten.permute.default, weight, [1, 0]), None)  # type: ignore[arg-type]
    if target is aten.add.Tensor:
        return _with_bias(emit, node)
    if target is aten.cat.default:
        return _together(emit, node)
    if target in PERMUTES:
        return _permuted(emit, node)
    part = piece(node)
    if part is None or part.axis != node.meta["val"].dim() - 1:
        return None
    whole = projection(emit, part.source)
    if whole is None:
        return None
    weight, bias = (
        value if value is None else emit(aten.slice.Tensor, value, 0, part.start, part.end)
        for value in (whole.weight, whole.bias)
    )
    assert weight is not None
    return Projection(whole.x, weight, bias)


def _with_bias(emit: Emitter, node: fx.Node) -> Projection | None:
    left, right = node.args[:2]
    for value, added in ((left, right), (right, left)):
        if not isinstance(value, fx.Node) or not isinstance(added, fx.Node) or len(node.args) > 2 or node.kwargs:
            return None
        shape = added.meta["val"].shape
        if len(shape) != 1 or shape != value.meta["val"].shape[-1:]:
            continue
        whole = projection(emit, value)
        if whole is not None:
            bias = added if whole.bias is None else emit(aten.add.Tensor, whole.bias, added)
            return Projection(whole.x, whole.weight, bias)
    return None


def _together(emit: Emitter, node: fx.Node) -> Projection | None:
    parts, axis = (*node.args, 0)[:2]
    if axis % node.meta["val"].dim() != node.meta["val"].dim() - 1:  # type: ignore[operator]
        return None
    found = [projection(emit, part) for part in parts]  # type: ignore[union-attr]
    wholes = [whole for whole in found if whole is not None]
    if len(wholes) < len(found) or any(whole.x is not wholes[0].x for whole in wholes):
        return None
    weight = joined(emit, [whole.weight for whole in wholes], 0)
    if all(whole.bias is None for whole in wholes):
        return Projection(wholes[0].x, weight, None)
    biases = [
        whole.bias or emit(aten.new_zeros.default, whole.weight, [whole.weight.meta["val"].shape[0]])
        for whole in wholes
    ]
    return Projection(wholes[0].x, weight, joined(emit, biases, 0))


def _permuted(emit: Emitter, node: fx.Node) -> Projection | None:
    order = order_of(node)
    if order[-1] != len(order) - 1:
        return None
    whole = projection(emit, node.args[0])  # type: ignore[arg-type]
    if whole is None or whole.x.meta["val"].dim() != len(order):
        return None
    return Projection(emit(aten.permute.default, whole.x, order), whole.weight, whole.bias)
