"""What a value with an axis of steps and an axis of what they read holds where a step reads a later one, or one long ago."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from seqc.program import named_args
from seqc.streaming.concrete import Concrete
from seqc.streaming.derivation import Derivation
from seqc.streaming.positions import enough_steps

aten = torch.ops.aten

# As good as minus infinity in a softmax: exp of it, relative to any finite score, is 0.
_HUGE = -1e30

_LONGEST = 4099
"""The longest sequence whose masks are looked at as a whole."""


def beyond(d: Derivation, node: fx.Node, window: int | None = None) -> float | bool | None:
    """The constant at all places [step, read] with read > step (axes of ``node`` over time); None where there is none.

    With ``window``, the one at all places with read <= step - window instead.
    """
    memo = d.shared("beyond", dict)
    if (node, window) not in memo:
        memo[node, window] = _beyond(d, node, window)
    found: float | bool | None = memo[node, window]
    return found


def is_zero(value: float | bool | None) -> bool:
    """Whether a weight of that value lets nothing through a sum."""
    return value is not None and not isinstance(value, bool) and value == 0


def window_of(d: Derivation, node: fx.Node, excludes: Callable[[float | bool | None], bool]) -> int | None:
    """How many of the newest steps, itself among them, a step reads at most; None where that has no bound.

    ``node`` has an axis of steps and one of what they read; ``excludes`` tells from a value in it that nothing is read there.
    """
    windows = sorted(_candidates(d, node))
    return next((window for window in windows if excludes(beyond(d, node, window))), None)


def _candidates(d: Derivation, node: fx.Node) -> set[int]:
    """The windows of the masks that ``node`` is computed with."""
    found, pending, seen = set(), [node], {node}
    while pending:
        here = pending.pop()
        if here not in d.timed:
            found.add(_band(d, here))
            continue
        if here.target is aten.triu.default:
            found.add(1 - int(named_args(here)["diagonal"]))
        new = [n for n in here.all_input_nodes if n not in seen and len(d.axes(n)) == 2]
        seen.update(new)
        pending += new
    return {window for window in found if window is not None and window > 1}


def _band(d: Derivation, mask: fx.Node) -> int | None:
    """From how many steps back on a mask that depends on positions alone is constant, at two lengths alike."""
    length = enough_steps(mask)
    if length is None or length > 2 * _LONGEST:
        return None
    found = set()
    # Of a mask as wide as the longest that are looked at as a whole, a little more than its window is.
    lengths = (length, 2 * length) if 2 * length <= _LONGEST else (min(length, length // 2 + 64),)
    for n in map(d.within, lengths):
        try:
            value = _fresh(d, n).value(mask).movedim(d.axes(mask), (-2, -1))
        except Exception:  # what cannot be computed from positions alone is no mask
            return None
        value = value.reshape(-1, *value.shape[-2:])
        step, read = ((value != value[:1, -1:, :1]).any(0)).nonzero(as_tuple=True)
        found.add(int((step - read).max()) + 1 if len(step) else 0)
        if max(found) > n - 8:
            return None
    return found.pop() if len(found) == 1 else None


def is_nothing(value: float | bool | None) -> bool:
    """Whether a score, or a mask, of that value lets nothing through a softmax."""
    if isinstance(value, bool):
        return not value
    return value is not None and value <= _HUGE


def _fresh(d: Derivation, length: int) -> Concrete:
    """As ``d.concrete``, but what it computes is not kept: masks are large."""
    return Concrete(d.source.weights, d.at(length))


def _beyond(d: Derivation, node: fx.Node, window: int | None) -> float | bool | None:
    if not isinstance(node, fx.Node) or len(d.axes(node)) != 2:
        return None
    if node not in d.timed:
        return _looked_at(d, node, window)
    return _by_rule(d, node, window)


def _looked_at(d: Derivation, node: fx.Node, window: int | None) -> float | bool | None:
    length = enough_steps(node)
    if length is None:
        return None
    try:
        looked = (
            d.concrete(d.within(min(length, _LONGEST)))
            if window is None
            else _fresh(d, d.within(max(length // 2, window) + 64))
        )
        value = looked.value(node)
    except Exception:  # what cannot be computed from positions alone is no mask
        return None
    rows, columns = d.axes(node)
    moved = value.movedim((rows, columns), (-2, -1))
    places = torch.ones(moved.shape[-2:], dtype=torch.bool)
    found = moved[..., places.triu(1) if window is None else places.tril(-window)]
    if not bool((found == found.flatten()[0]).all()):
        return None
    number: float | bool = found.flatten()[0].item()
    return number


def _by_rule(d: Derivation, node: fx.Node, window: int | None) -> float | bool | None:
    target, args = node.target, node.args
    if target in (aten.bitwise_and.Tensor, aten.logical_and.default):
        return False if any(_of(d, a, window) is False for a in args) else None
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        chosen = _of(d, args[0], window)
        return None if chosen is None else _of(d, args[1] if chosen else args[2], window)
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        chosen = _of(d, args[1], window)
        return None if chosen is None else _of(d, args[2] if chosen else args[0], window)
    if target is aten.add.Tensor and any(is_nothing(_number(_of(d, a, window))) for a in args[:2]):
        return -math.inf
    if target is aten.sub.Tensor and is_nothing(_number(_of(d, args[0], window))):
        return -math.inf
    if target is aten.div.Tensor and _of(d, args[0], window) == 0:
        return 0.0
    if target is aten.mul.Tensor and any(_of(d, a, window) == 0 for a in args[:2]):
        return 0.0
    if target in (aten.tril.default, aten.triu.default):
        return _triangle(d, node, window)
    if target in (aten.softmax.int, aten._softmax.default):
        return 0.0 if is_nothing(_of(d, args[0], window)) else None
    return _mapped(d, node, window)


def _triangle(d: Derivation, node: fx.Node, window: int | None) -> float | bool | None:
    source, diagonal = named_args(node).values()
    value = beyond(d, source, window)
    if value == 0:
        return value
    # read - step of the places in question is at least ``low`` and at most ``high``; a triangle keeps a side of ``diagonal``
    low, high = (1, math.inf) if window is None else (-math.inf, -window)
    below = node.target is aten.tril.default
    if (low > diagonal) if below else (high < diagonal):
        return 0.0
    return value if ((high <= diagonal) if below else (low >= diagonal)) else None


def _number(value: Any) -> float | None:
    return None if value is None or isinstance(value, bool) else float(value)


def _of(d: Derivation, arg: Any, window: int | None) -> float | bool | None:
    """The constant of an operand there; a number stands for itself."""
    if isinstance(arg, (int, float, bool)):
        return arg
    if not isinstance(arg, fx.Node):
        return None
    if len(d.axes(arg)) == 2:
        return beyond(d, arg, window)
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
}


def _mapped(d: Derivation, node: fx.Node, window: int | None) -> float | bool | None:
    """Through an operation on each element."""
    source = node.args[0] if node.args else None
    same = node.target in _SAME or _in_order(d, node)
    if same and isinstance(source, fx.Node) and d.axes(source):
        value = beyond(d, source, window)
        whole = len(d.axes(source)) == len(d.axes(node))
        if not whole or value is None or node.target is not aten._to_copy.default:
            return value if whole else None
        return torch.tensor(value).to(node.meta["val"].dtype).item()
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        operands = [a if not isinstance(a, fx.Node) else _of(d, a, window) for a in node.args]
        if any(a is None for a in operands) or node.kwargs:
            return None
        tensors = [torch.tensor(a) if isinstance(b, fx.Node) else a for a, b in zip(operands, node.args, strict=True)]
        result: float | bool = node.target(*tensors).item()
        return result
    return None


def _in_order(d: Derivation, node: fx.Node) -> bool:
    """Whether an operation leaves the steps in front of what they read, and both from the first on."""
    if node.target is aten.permute.default:
        source, order = named_args(node).values()
        rank = len(order)
        places = [[a % rank for a in order].index(axis) for axis in d.axes(source)]
        return places == sorted(places)
    if node.target is aten.slice.Tensor:
        arg = named_args(node)
        along = arg["dim"] % node.meta["val"].dim() in d.axes(node)
        return not along or (arg["start"] in (None, 0) and arg["step"] == 1)
    return False
