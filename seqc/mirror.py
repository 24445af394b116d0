"""Where the reversed axis of an operand is in the result: what makes of reversed steps the reversed steps of its result."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx

from seqc.axes import PERMUTES, order_of
from seqc.ops.recurrence import recurrence
from seqc.program import named_args
from seqc.rewrite import result_index
from seqc.verify import same_shape

aten = torch.ops.aten

SCANS: dict[Any, tuple[tuple[str, ...], int]] = {
    torch.ops.seqc.linear_scan.default: (("decay", "update"), 1),
    torch.ops.seqc.selective_scan.default: (("x", "dt", "b", "c"), 1),
    torch.ops.seqc.softmax_scan.default: (("score", "value", "decay"), 3),
    torch.ops.seqc.linear_attention.default: (("query", "key", "value", "decay", "beta"), 1),
    torch.ops.seqc.gated_rnn.default: (("gates",), 1),
}
"""The operands of a scan that have time as axis 0, and how many of its results have (the first ones)."""

SHAPES = frozenset(
    {aten.sym_size.int, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.new_zeros.default,
     aten.new_ones.default, aten.new_full.default, aten.new_empty.default, aten.empty_like.default}
)  # fmt: skip
"""What reads only the shape of its operand."""

Mirrored = Mapping[fx.Node, int]


class Mixed(Exception):
    """The result is no reversed one of what it would be without reversals."""


def mirrored_axis(node: fx.Node, mirrored: Mirrored) -> int | None:
    """The axis of the result of ``node`` along which it is reversed where the operands in ``mirrored`` are along theirs.

    None where no result is (a final state). Raises Mixed where the operation does not commute with reversals.
    """
    if is_scan(node):
        timed, _ = timed_of(node)
        if any((x not in mirrored and x.meta["val"].shape[0] != 1) or mirrored.get(x, 0) != 0 for x in timed):
            raise Mixed("reads other steps in their order")
        if any(x in mirrored and x not in timed for x in node.all_input_nodes):
            raise Mixed("reads all steps at once")
        return 0
    source = node.args[0]
    if node.target is operator.getitem:
        assert isinstance(source, fx.Node)
        return mirrored[source] if not is_scan(source) or is_walked(source, result_index(node)) else None
    rule = _RULES.get(node.target)
    if rule is not None:
        if list(filter(mirrored.__contains__, node.all_input_nodes)) != [source]:
            raise Mixed("reads steps beside its operand")
        assert isinstance(source, fx.Node)
        return rule(node, source, mirrored[source])
    if isinstance(node.target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in node.target.tags or node.target in _ELEMENTWISE
    ):
        return _pointwise(node, mirrored)
    if node.target is aten.cat.default:
        return _cat(node, mirrored)
    raise Mixed("has no rule")


def is_scan(node: fx.Node) -> bool:
    """Whether ``node`` walks steps, and can walk them from the end."""
    return node.target is recurrence or node.target in SCANS


def timed_of(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """(the operands of a scan with time as axis 0, the others)."""
    if node.target is recurrence:
        timed = list(node.args[3])  # type: ignore[arg-type]
    else:
        operands = named_args(node)
        timed = [operands[name] for name in SCANS[node.target][0] if operands[name] is not None]
    return timed, [x for x in node.all_input_nodes if x not in timed]


def is_walked(scan: fx.Node, result: int) -> bool:
    """Whether a result of a scan holds all steps; the others are final states."""
    return result >= len(scan.args[2]) if scan.target is recurrence else result < SCANS[scan.target][1]  # type: ignore[arg-type]


def turned(scan: fx.Node) -> tuple[Any, ...]:
    """The arguments of a scan that walks the other way."""
    if scan.target is recurrence:
        reverse = len(scan.args) > 5 and bool(scan.args[5])
        return (*scan.args[:5], not reverse)
    return tuple((named_args(scan) | {"reverse": not named_args(scan)["reverse"]}).values())


def _pointwise(node: fx.Node, mirrored: Mirrored) -> int:
    rank = node.meta["val"].dim()
    axes: set[int] = {mirrored[x] + rank - int(x.meta["val"].dim()) for x in node.all_input_nodes if x in mirrored}
    if len(axes) > 1:
        raise Mixed("reads steps along two axes")
    (axis,) = axes
    for x in node.all_input_nodes:
        value = x.meta["val"]
        if x in mirrored or not isinstance(value, torch.Tensor):
            continue
        place = axis - (rank - value.dim())
        if place >= 0 and value.shape[place] != 1:
            raise Mixed("reads other steps in their order")
    return axis


def _cat(node: fx.Node, mirrored: Mirrored) -> int:
    axes = {mirrored.get(x) for x in node.all_input_nodes if isinstance(x.meta["val"], torch.Tensor)}
    rank = node.meta["val"].dim()
    axis = axes.pop()
    if axes or axis is None or int(named_args(node)["dim"]) % rank == axis:
        raise Mixed("joins steps with others")
    return axis


def _of_rows(node: fx.Node, source: fx.Node, axis: int) -> int:
    """A matrix product with weights, on the last axis."""
    if axis == source.meta["val"].dim() - 1:
        raise Mixed("mixes the steps")
    return axis


def _product(node: fx.Node, source: fx.Node, axis: int) -> int:
    right = node.args[1]
    assert isinstance(right, fx.Node)
    if right.meta["val"].dim() != 2 or source.meta["val"].dim() < 2:
        raise Mixed("is a product of other than rows with a matrix")
    return _of_rows(node, source, axis)


def _normalized(node: fx.Node, source: fx.Node, axis: int) -> int:
    sizes = named_args(node)["normalized_shape"]
    if axis >= source.meta["val"].dim() - len(sizes):
        raise Mixed("mixes the steps")
    return axis


def _along_others(node: fx.Node, source: fx.Node, axis: int) -> int:
    """Acts along axes given by number: none of them is that of the steps; those that are taken away shift it."""
    rank, operands = source.meta["val"].dim(), named_args(node)
    dims = operands["dim"]
    if dims is None or dims == []:
        raise Mixed("mixes the steps")
    acted = {int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    if axis in acted:
        raise Mixed("acts along the steps")
    value = node.meta["val"]
    kept = not isinstance(value, torch.Tensor) or value.dim() == rank
    return axis if kept else axis - sum(d < axis for d in acted)


def _inserted(node: fx.Node, source: fx.Node, axis: int) -> int:
    place = int(named_args(node)["dim"]) % (int(source.meta["val"].dim()) + 1)
    return axis + int(place <= axis)


def _permuted(node: fx.Node, source: fx.Node, axis: int) -> int:
    return order_of(node).index(axis)


def _reshaped(node: fx.Node, source: fx.Node, axis: int) -> int:
    """The axes up to that of the steps are the same, or all from it on are."""
    old, new = source.meta["val"].shape, node.meta["val"].shape
    if same_shape(old[: axis + 1], new[: axis + 1]):
        return axis
    behind = len(old) - axis
    if len(new) >= behind and same_shape(old[axis:], new[-behind:]):
        return len(new) - behind
    raise Mixed("is a reshape in which the steps are no axis")


def _table(rule: Callable[[fx.Node, fx.Node, int], int], names: str) -> Iterator[tuple[Any, Callable[..., int]]]:
    for name in names.split():
        packet, _, overload = name.partition(".")
        yield getattr(getattr(aten, packet), overload or "default"), rule


_RULES: dict[Any, Callable[[fx.Node, fx.Node, int], int]] = {
    **dict(_table(_of_rows, "linear")),
    **dict(_table(_product, "matmul mm")),
    **dict(_table(_normalized, "layer_norm rms_norm")),
    **dict(_table(_inserted, "unsqueeze")),
    **dict(_table(_reshaped, "view reshape _unsafe_view")),
    **dict.fromkeys(PERMUTES, _permuted),
    **dict(
        _table(
            _along_others,
            "sum.dim_IntList mean.dim amax amin softmax.int _softmax log_softmax.int _log_softmax cumsum select.int "
            "slice.Tensor squeeze.dim split.Tensor split_with_sizes chunk unbind.int glu",
        )
    ),
}
_ELEMENTWISE = frozenset(
    target
    for target, _ in _table(
        _of_rows, "clone _to_copy alias detach contiguous square softplus silu gelu relu log_sigmoid"
    )
)
"""Of each element alone, without torch's tag that says so."""
