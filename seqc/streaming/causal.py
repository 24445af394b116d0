"""What a value with an axis of steps and an axis of what they read holds where a step would read a later one."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx as fx

from seqc.program import named_args
from seqc.streaming.derivation import Derivation
from seqc.streaming.positions import enough_steps

aten = torch.ops.aten

# As good as minus infinity in a softmax: exp of it, relative to any finite score, is 0.
_HUGE = -1e30


def beyond(d: Derivation, node: fx.Node) -> float | bool | None:
    """The constant at all places [step, read] with read > step (axes of ``node`` over time); None where there is none."""
    memo = d.shared("beyond", dict)
    if node not in memo:
        memo[node] = _beyond(d, node)
    found: float | bool | None = memo[node]
    return found


def is_nothing(value: float | bool | None) -> bool:
    """Whether a score, or a mask, of that value lets nothing through a softmax."""
    if isinstance(value, bool):
        return not value
    return value is not None and value <= _HUGE


def _beyond(d: Derivation, node: fx.Node) -> float | bool | None:
    if not isinstance(node, fx.Node) or len(d.axes(node)) != 2:
        return None
    if node not in d.timed:
        return _looked_at(d, node)
    return _by_rule(d, node)


def _looked_at(d: Derivation, node: fx.Node) -> float | bool | None:
    length = enough_steps(node)
    if length is None:
        return None
    try:
        value = d.concrete(min(length, 4099)).value(node)
    except Exception:  # what cannot be computed from positions alone is no mask
        return None
    rows, columns = d.axes(node)
    moved = value.movedim((rows, columns), (-2, -1))
    later = torch.ones(moved.shape[-2:], dtype=torch.bool).triu(1)
    found = moved[..., later]
    if not bool((found == found.flatten()[0]).all()):
        return None
    number: float | bool = found.flatten()[0].item()
    return number


def _by_rule(d: Derivation, node: fx.Node) -> float | bool | None:
    target, args = node.target, node.args
    if target in (aten.bitwise_and.Tensor, aten.logical_and.default):
        return False if any(_of(d, a, node) is False for a in args) else None
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        chosen = _of(d, args[0], node)
        return None if chosen is None else _of(d, args[1] if chosen else args[2], node)
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        chosen = _of(d, args[1], node)
        return None if chosen is None else _of(d, args[2] if chosen else args[0], node)
    if target is aten.add.Tensor and any(is_nothing(_number(_of(d, a, node))) for a in args[:2]):
        return -math.inf
    if target is aten.mul.Tensor and any(_number(_of(d, a, node)) == 0 for a in args[:2]):
        return 0.0
    if target is aten.tril.default:
        return 0.0 if named_args(node)["diagonal"] <= 0 else None
    if target is aten.triu.default:
        return None
    if target in (aten.softmax.int, aten._softmax.default):
        return 0.0 if is_nothing(_of(d, args[0], node)) else None
    return _mapped(d, node)


def _number(value: Any) -> float | None:
    return None if value is None or isinstance(value, bool) else float(value)


def _of(d: Derivation, arg: Any, node: fx.Node) -> float | bool | None:
    """The constant of an operand there; a number stands for itself."""
    if isinstance(arg, (int, float, bool)):
        return arg
    if not isinstance(arg, fx.Node):
        return None
    if len(d.axes(arg)) == 2:
        return beyond(d, arg)
    if d.is_fixed(arg) and arg.meta["val"].numel() == 1:
        number: float | bool = d.concrete(8).value(arg).flatten()[0].item()
        return number
    return None


_SAME = {
    aten.unsqueeze.default,
    aten.expand.default,
    aten.squeeze.dim,
    aten._to_copy.default,
    aten.clone.default,
    aten.reshape.default,
    aten.view.default,
    aten.slice.Tensor,
    aten.permute.default,
}


def _mapped(d: Derivation, node: fx.Node) -> float | bool | None:
    """Through an operation on each element."""
    source = node.args[0] if node.args else None
    if node.target in _SAME and isinstance(source, fx.Node) and d.axes(source):
        value = beyond(d, source)
        whole = [d.has_time(s) for s in source.meta["val"].shape] and len(d.axes(source)) == len(d.axes(node))
        if not whole or value is None or node.target is not aten._to_copy.default:
            return value if whole else None
        return torch.tensor(value).to(node.meta["val"].dtype).item()
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        operands = [a if not isinstance(a, fx.Node) else _of(d, a, node) for a in node.args]
        if any(a is None for a in operands) or node.kwargs:
            return None
        tensors = [torch.tensor(a) if isinstance(b, fx.Node) else a for a, b in zip(operands, node.args, strict=True)]
        result: float | bool = node.target(*tensors).item()
        return result
    return None
