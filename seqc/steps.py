"""Operations on the values of all steps at once, taken apart into what they do to the values of one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from seqc.axes import PERMUTES, order_of
from seqc.emit import Emitter
from seqc.loop import Loop
from seqc.program import named_args
from seqc.verify import same_shape

aten = torch.ops.aten

_IDENTITIES = frozenset({aten.clone.default, aten.contiguous.default, aten.alias.default})
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})


@dataclass(frozen=True)
class Leaf:
    """A tensor from elsewhere. ``axis`` is where its steps are; ``varies`` says that it has more than one (None: no axis)."""

    node: fx.Node
    axis: int | None
    varies: bool

    def read(self, loop: Loop) -> fx.Node:
        """What it is at one step, in the loop's body; written outside where ``loop.emit`` stands."""
        if self.axis is None:
            return loop.invariant_of(self.node)
        if not self.varies:
            return loop.invariant_of(loop.emit(aten.squeeze.dim, self.node, self.axis))
        order = [self.axis, *(i for i in range(self.node.meta["val"].dim()) if i != self.axis)]
        return loop.step_of(self.node if self.axis == 0 else loop.emit(aten.permute.default, self.node, order))


@dataclass(frozen=True)
class Step:
    """One step of an operation: the axis of steps of its result, the operands from elsewhere, and what writes it."""

    axis: int
    leaves: Mapping[fx.Node, Leaf]
    write: Callable[[Emitter, Mapping[fx.Node, fx.Node]], fx.Node]


def step_of(node: fx.Node, known: Mapping[fx.Node, int]) -> Step | None:
    """One step of ``node``, where ``known`` holds the operands whose axis of steps is known; None where it mixes steps."""
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    if not isinstance(node.meta.get("val"), torch.Tensor) or len(tensors) != len(node.all_input_nodes):
        return None
    target = node.target
    if target in _PRODUCTS:
        return _product(node, known)
    if target is aten.einsum.default:
        return _einsum(node, known)
    if target is aten.linear.default:
        return _linear(node, known)
    if target not in _IDENTITIES and len(tensors) == 1 and (moved := _moved(node, known[tensors[0]])) is not None:
        return moved
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return _broadcast(node, known, 0, target) if pointwise or target in _IDENTITIES else None


def _moved(node: fx.Node, axis: int) -> Step | None:
    """A change of axes, or a sum over some."""
    target, rank = node.target, node.meta["val"].dim()
    source = node.args[0]
    inner = source.meta["val"].dim()  # type: ignore[union-attr]
    if target in PERMUTES:
        order = order_of(node)
        rest = [i - (i > axis) for i in order if i != axis]
        return _call(node, order.index(axis), aten.permute.default, rest)
    if target is aten.unsqueeze.default:
        new = int(node.args[1]) % rank  # type: ignore[arg-type]
        after = axis + (new <= axis)
        return _call(node, after, target, new - (after < new))
    if target is aten.squeeze.dim:
        gone = int(node.args[1]) % inner  # type: ignore[arg-type]
        if gone == axis or source.meta["val"].shape[gone] != 1:  # type: ignore[union-attr]
            return None
        return _call(node, axis - (gone < axis), target, gone - (gone > axis))
    if target is aten.sum.dim_IntList:
        named = named_args(node)
        dims = [int(d) % inner for d in named["dim"] or range(inner)]
        if axis in dims:
            return None
        after = axis if named["keepdim"] else axis - sum(d < axis for d in dims)
        return _call(node, after, target, [d - (d > axis) for d in dims], bool(named["keepdim"]))
    return None


def _call(node: fx.Node, axis: int, target: Any, *rest: Any) -> Step:
    """``target`` of the first operand, with other arguments."""
    return Step(axis, {}, lambda emit, values: emit(target, values[node.args[0]], *rest))  # type: ignore[index]


def _broadcast(node: fx.Node, known: Mapping[fx.Node, int], last: int, target: Any) -> Step | None:
    """An operation that broadcasts all but the ``last`` axes of its operands."""
    rank = node.meta["val"].dim()
    axes = {axis + rank - n.meta["val"].dim() for n, axis in known.items() if n in node.all_input_nodes}
    if len(axes) != 1:
        return None
    (axis,) = axes
    steps = node.meta["val"].shape[axis]
    leaves: dict[fx.Node, Leaf] = {}
    for tensor in node.all_input_nodes:
        own = axis - (rank - tensor.meta["val"].dim())
        if tensor in known:
            continue
        if own < 0:
            leaves[tensor] = Leaf(tensor, None, False)
        else:
            leaves[tensor] = Leaf(tensor, own, same_shape((tensor.meta["val"].shape[own],), (steps,)))
    if axis >= rank - last:
        return None

    def write(emit: Emitter, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return emit(target, *args, **kwargs)

    return Step(axis, leaves, write)


def _product(node: fx.Node, known: Mapping[fx.Node, int]) -> Step | None:
    """A product of matrices, a batch of which are the steps."""
    if any(n.meta["val"].dim() < 2 for n in node.all_input_nodes):
        return None
    return _broadcast(node, known, 2, aten.matmul.default)


def _linear(node: fx.Node, known: Mapping[fx.Node, int]) -> Step | None:
    x, *weights = node.args
    axis = known.get(x)  # type: ignore[arg-type]
    if axis is None or axis == node.meta["val"].dim() - 1 or any(w in known for w in weights):
        return None
    leaves = {w: Leaf(w, None, False) for w in weights if isinstance(w, fx.Node)}

    def write(emit: Emitter, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
        return emit(aten.linear.default, *fx.node.map_arg(node.args, values.__getitem__))

    return Step(axis, leaves, write)


def _einsum(node: fx.Node, known: Mapping[fx.Node, int]) -> Step | None:
    equation, operands = str(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    left, arrow, right = equation.replace(" ", "").partition("->")
    parts = left.split(",")
    letters = {parts[i][known[n]] for i, n in enumerate(operands) if n in known}
    if not arrow or "." in left or len(letters) != 1:
        return None
    (time,) = letters
    if right.count(time) != 1 or any(part.count(time) > 1 for part in parts):
        return None
    axes = [part.index(time) if time in part else None for part in parts]
    leaves = {n: Leaf(n, a, a is not None) for n, a in zip(operands, axes, strict=True) if n not in known}
    step = f"{left}->{right}".replace(time, "")

    def write(emit: Emitter, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
        return emit(aten.einsum.default, step, [values[n] for n in operands])

    return Step(right.index(time), leaves, write)
