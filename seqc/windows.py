"""Tensors that hold a stretch of another one along an axis: padded, sliced, put behind a state, in any layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from seqc import _torch
from seqc.axes import PERMUTES, order_of
from seqc.program import named_args

aten = torch.ops.aten

_ZEROS = frozenset({aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default})
_FILLS = frozenset({aten.full.default, aten.new_full.default, aten.full_like.default})
IDENTITIES = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default})

Order = tuple[int | None, ...]


@dataclass(frozen=True)
class Window:
    """A tensor of ``length`` steps, of which step i is step ``start + i`` of a line.

    The line is zeros, or ``state`` with zeros before it, then ``source``, whose first step is step 0 of the line, then
    zeros. ``start`` is at most 0. ``order`` holds for each axis of the tensor that of ``source``, ``state_order`` that of
    ``state`` (None: an axis of size 1 which it does not have). ``axis`` is where ``source`` has its steps. ``path`` are the
    nodes from the tensor up to, and without, ``source``.
    """

    source: fx.Node
    order: Order
    axis: int
    length: Any
    start: int = 0
    state: fx.Node | None = None
    state_order: Order = ()
    path: tuple[fx.Node, ...] = ()

    @property
    def steps(self) -> Any:
        """How many steps ``source`` has."""
        return size(self.source, self.axis)

    @property
    def whole(self) -> bool:
        """Whether it reaches to the end of ``source`` or beyond."""
        return at_least_zero(self.start + self.length - self.steps)

    def through(self, node: fx.Node, **changes: Any) -> Window:
        """What ``node``, computed from this window, is."""
        return replace(self, path=(node, *self.path), **changes)


def size(node: fx.Node, axis: int) -> Any:
    """A size of ``node`` as an expression."""
    return _torch.size_expr(node.meta["val"].shape[axis])


def at_least_zero(expr: Any) -> bool:
    """Whether it is proved; a number, as differences of sizes mostly are."""
    return bool(expr.is_Integer and expr >= 0)


def itself(node: fx.Node, axis: int) -> Window:
    """``node`` as a window of itself."""
    return Window(node, tuple(range(node.meta["val"].dim())), axis, size(node, axis))


def window(node: fx.Node, axis: int) -> Window:
    """The longest way back from ``node`` along ``axis``; of itself where nothing is known."""
    rule = _RULES.get(node.target)
    found = rule(node, axis) if rule is not None else None
    return found if found is not None else itself(node, axis)


def slice_start(node: fx.Node, axis: int) -> Any | None:
    """Where a slice along ``axis`` starts, as an expression of at least 0; None where it is no plain slice of that axis."""
    if node.target is not aten.slice.Tensor:
        return None
    arguments = named_args(node)
    inner = arguments["self"]
    if arguments["dim"] % inner.meta["val"].dim() != axis or arguments["step"] != 1:
        return None
    start = arguments["start"]
    value = start.meta["val"] if isinstance(start, fx.Node) else start or 0
    expr = _torch.size_expr(value)
    return expr + size(inner, axis) if _torch.hint(value) < 0 else expr


def _slice(node: fx.Node, axis: int) -> Window | None:
    start = slice_start(node, axis)
    if start is None:
        return None
    found = window(node.args[0], axis)  # type: ignore[arg-type]
    first = found.start + start
    if not at_least_zero(start) or not at_least_zero(-first):
        return None
    return found.through(node, start=int(first), length=size(node, axis))


def _pad(node: fx.Node, axis: int) -> Window | None:
    arguments = named_args(node)
    pads, rank = arguments["pad"], node.meta["val"].dim()
    if arguments.get("mode", "constant") != "constant" or arguments["value"] not in (None, 0):
        return None
    if not all(isinstance(p, int) for p in pads):
        return None
    at = 2 * (rank - 1 - axis)
    left, right = (*pads, *[0] * 2 * rank)[at : at + 2]
    if any(p for i, p in enumerate(pads) if i not in (at, at + 1)):
        return None
    return _padded(node, window(arguments["self"], axis), left, right, axis)


def _padded(node: fx.Node, inner: Window, left: int, right: Any, axis: int) -> Window | None:
    """``inner`` with zeros (where negative, without so many steps) on both sides."""
    start = inner.start - left
    if start > 0 or (left > 0 and inner.state is not None) or (right > 0 and not inner.whole):
        return None
    return inner.through(node, start=start, length=size(node, axis))


def _cat(node: fx.Node, axis: int) -> Window | None:
    parts, rank = list(node.args[0]), node.meta["val"].dim()  # type: ignore[arg-type]
    if named_args(node)["dim"] % rank != axis:
        return None
    left, right = 0, 0
    while len(parts) > 1 and is_zeros(parts[0]) and size(parts[0], axis).is_Integer:
        left += int(size(parts.pop(0), axis))
    while len(parts) > 1 and is_zeros(parts[-1]):
        parts.pop()
        right = 1
    inner = window(parts[-1], axis)
    if len(parts) == 1:
        return _padded(node, inner, left, right, axis)
    count = size(parts[0], axis)
    if len(parts) > 2 or left or not count.is_Integer:
        return None
    if inner.state is not None or inner.start or inner.length != inner.steps:
        inner = itself(parts[-1], axis)
    own = tuple(range(rank))
    return inner.through(node, start=-int(count), length=size(node, axis), state=parts[0], state_order=own)


def is_zeros(node: fx.Node) -> bool:
    """Whether a node writes a tensor of zeros."""
    return node.target in _ZEROS or (node.target in _FILLS and named_args(node)["fill_value"] == 0)


def _permute(node: fx.Node, axis: int) -> Window | None:
    order = order_of(node)
    inner = window(node.args[0], order[axis])  # type: ignore[arg-type]
    return _moved(node, inner, lambda own: tuple(own[i] for i in order))


def _unsqueeze(node: fx.Node, axis: int) -> Window | None:
    new = int(node.args[1]) % node.meta["val"].dim()  # type: ignore[arg-type]
    if new == axis:
        return None
    inner = window(node.args[0], axis - (new < axis))  # type: ignore[arg-type]
    state_order = (*inner.state_order[:new], None, *inner.state_order[new:]) if inner.state is not None else ()
    return inner.through(node, order=(*inner.order[:new], None, *inner.order[new:]), state_order=state_order)


def _squeeze(node: fx.Node, axis: int) -> Window | None:
    rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    gone = int(node.args[1]) % rank  # type: ignore[arg-type]
    if node.meta["val"].dim() == rank:
        return None
    inner = window(node.args[0], axis + (gone <= axis))  # type: ignore[arg-type]
    if any(own and own[gone] is not None for own in (inner.order, inner.state_order)):
        return None
    return _moved(node, inner, lambda own: (*own[:gone], *own[gone + 1 :]))


def _moved(node: fx.Node, inner: Window, move: Callable[[Order], Order]) -> Window | None:
    """Another layout; of a tensor that is no window of another it is best left where it is."""
    if not inner.path:
        return None
    return inner.through(
        node, order=move(inner.order), state_order=move(inner.state_order) if inner.state is not None else ()
    )


def _same(node: fx.Node, axis: int) -> Window | None:
    inner = window(node.args[0], axis)  # type: ignore[arg-type]
    return inner.through(node) if inner.path else None


_RULES: dict[Any, Callable[[fx.Node, int], Window | None]] = {
    aten.slice.Tensor: _slice,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.cat.default: _cat,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    **dict.fromkeys(PERMUTES, _permute),
    **dict.fromkeys(IDENTITIES, _same),
}
