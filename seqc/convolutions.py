"""Sums of products of steps of one tensor with weights per channel: convolutions over time, as they are spelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from seqc.axes import PERMUTES, order_of
from seqc.emit import Emitter
from seqc.program import named_args
from seqc.windows import IDENTITIES, Order, Window, at_least_zero, itself, size, slice_start, window

aten = torch.ops.aten

_CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default,
        aten.conv1d.padding,
        aten.conv2d.default,
        aten.conv2d.padding,
        aten.convolution.default,
    }
)


class NotCausal(Exception):
    """Why a convolution is no causal depthwise one."""


@dataclass(frozen=True)
class Sum:
    """Result i along time of ``node`` is bias + sum_j weight[:, j] * line step ``i + shift - (taps - 1 - j) * dilation``.

    ``axes`` are the axes of batch, channels and time in the tensor of which ``line`` is the window, ``layout`` says which
    of the three (0, 1, 2) each axis of ``node`` is. ``weight`` and ``bias`` emit tensors [D, 1, taps] and [D] or None.
    ``rest`` are further tensors that ``node`` adds.
    """

    node: fx.Node
    line: Window
    axes: tuple[int, int, int]
    layout: Order
    taps: int
    dilation: int
    shift: int
    weight: Callable[[Emitter], fx.Node]
    bias: Callable[[Emitter], fx.Node | None]
    rest: tuple[fx.Node, ...] = ()

    @property
    def reach(self) -> int:
        """How many steps before the present one are read."""
        return (self.taps - 1) * self.dilation

    def layout_of(self, part: Window) -> Order:
        """Which of batch, channels and time each axis of a window of the same source is."""
        role = {self.line.order[axis]: i for i, axis in enumerate(self.axes)}
        return tuple(role.get(axis) if axis is not None else None for axis in part.order)

    def time_of(self, node: fx.Node, line: Window) -> int | None:
        """Where ``node``, on the path of ``line``, has its steps."""
        for axis in range(node.meta["val"].dim()):
            part = window(node, axis)
            if part.source is line.source and part.axis == line.axis and part.order[axis] == line.axis:
                return axis
        return None


def convolution(node: fx.Node) -> Sum | None:
    """The depthwise convolution over one axis that ``node`` is; None where it is no convolution.

    Raises NotCausal where it is another convolution.
    """
    if node.target not in _CONVOLUTIONS:
        return None
    arguments = named_args(node)
    x, weight, bias, groups = (arguments[name] for name in ("input", "weight", "bias", "groups"))
    shape, rank = weight.meta["val"].shape, weight.meta["val"].dim()
    if arguments.get("transposed") or x.meta["val"].dim() != rank:
        raise NotCausal("a transposed convolution, or one without a batch")
    if not all(isinstance(s, int) for s in shape):
        raise NotCausal("its kernel has no fixed size")
    if shape[1] != 1 or shape[0] != groups or not size(x, 1) == groups:
        raise NotCausal(f"it is not depthwise ({groups} groups for {shape[0]} channels)")
    long = [i for i, taps in enumerate(shape[2:]) if taps > 1]
    settings = {name: _per_axis(arguments[name], rank - 2) for name in ("stride", "padding", "dilation")}
    if len(long) != 1:
        raise NotCausal("its kernel does not lie along one axis")
    (at,) = long
    beside = [i for i in range(rank - 2) if i != at]
    if any(s != 1 for s in settings["stride"]) or any(settings["padding"][i] or size(x, 2 + i) != 1 for i in beside):
        raise NotCausal("it has a stride, or axes beside batch, channels and time")
    taps, pad, dilation = int(shape[2 + at]), settings["padding"][at], settings["dilation"][at]
    reach = (taps - 1) * dilation
    line = window(x, 2 + at)
    if not line.whole or (pad and line.state is not None):
        line = itself(x, 2 + at)
    layout: list[int | None] = [None] * rank
    layout[0], layout[1], layout[2 + at] = 0, 1, 2
    return Sum(
        node,
        line,
        (0, 1, 2 + at),
        tuple(layout),
        taps,
        dilation,
        line.start - pad + reach,
        lambda emit: _three_axes(emit, weight, [2 + i for i in beside]),
        lambda emit: bias,
    )


def _per_axis(setting: int | str | Sequence[int], count: int) -> list[int]:
    if setting == "valid":
        return [0] * count
    if isinstance(setting, str):
        raise NotCausal(f"padding {setting!r}")
    values = [setting] if isinstance(setting, int) else list(setting)
    return values * count if len(values) == 1 else values


def _three_axes(emit: Emitter, weight: fx.Node, gone: list[int]) -> fx.Node:
    """A kernel [D, 1, ...] without the axes ``gone`` of size 1, and without detours over fewer axes."""
    for axis in sorted(gone, reverse=True):
        weight = _unsqueezed(weight, axis) or emit(aten.squeeze.dim, weight, axis)
    inner = _unsqueezed(weight, 1)
    if inner is not None and inner.target is aten.squeeze.dim:
        whole = inner.args[0]
        assert isinstance(whole, fx.Node)
        if tuple(whole.meta["val"].shape) == tuple(weight.meta["val"].shape):
            return whole
    return weight


def _unsqueezed(node: fx.Node, axis: int) -> fx.Node | None:
    """What ``node`` is with a new ``axis``; None where it is no such thing."""
    if node.target is not aten.unsqueeze.default or int(node.args[1]) % node.meta["val"].dim() != axis:  # type: ignore[arg-type]
        return None
    return node.args[0]  # type: ignore[return-value]


@dataclass(frozen=True)
class Kept:
    """``node`` holds the results that the causal convolution has, with the axes ``layout``.

    ``between`` are the operations, element by element, that lie between the convolution and it.
    """

    node: fx.Node
    layout: Order
    between: tuple[fx.Node, ...]


_Result = tuple[fx.Node, Order, int, tuple[fx.Node, ...]]
"""A node, its axes, which step its first one is (as ``Sum.shift``), and the operations before it."""


def kept(found: Sum) -> list[Kept]:
    """Where the results of ``found`` are cut to one for each step. Raises NotCausal where others are read too."""
    result: list[Kept] = []
    pending: list[_Result] = [(found.node, found.layout, found.shift, ())]
    while pending:
        node, layout, shift, between = pending.pop()
        if shift > 0:
            raise NotCausal(
                f"it reads {shift} steps after each result's own, or is padded by other than zeros or a state"
            )
        if shift == 0 and size(node, layout.index(2)) == found.line.steps:
            result.append(Kept(node, layout, between))
            continue
        if not node.users:
            raise NotCausal("it is an output, with results beyond the last step")
        for user in node.users:
            pending.append(_behind(user, node, layout, shift, between))
    return result


def _behind(user: fx.Node, node: fx.Node, layout: Order, shift: int, between: tuple[fx.Node, ...]) -> _Result:
    """``user`` of ``node`` in the terms of :func:`kept`."""
    if user.target in IDENTITIES:
        return user, layout, shift, between
    if user.target in PERMUTES:
        return user, tuple(layout[i] for i in order_of(user)), shift, between
    if user.target is aten.squeeze.dim:
        gone = int(user.args[1]) % len(layout)  # type: ignore[arg-type]
        if layout[gone] is None:
            return user, (*layout[:gone], *layout[gone + 1 :]), shift, between
    start = slice_start(user, layout.index(2))
    if start is not None and at_least_zero(start):
        return user, layout, shift + int(start), between
    if _elementwise(user, node):
        return user, layout, shift, (*between, user)
    raise NotCausal(f"results for more steps than there are, or for fewer, are read ({user.target} at {user.name})")


def _elementwise(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` changes each element of ``node`` by itself."""
    target = user.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.pointwise in target.tags
        and user.all_input_nodes == [node]
        and user.args[0] is node
        and all(a is not node for a in (*user.args[1:], *user.kwargs.values()))
    )
