"""Computes one operation for all steps of a loop at once: the same operation with time as a new leading axis.

Every rule here is written out. torch.vmap traced by make_fx was tried and is not used: its rules for convolution,
group_norm, gather and scaled_dot_product_attention turn the number of steps into a literal (measured, torch 2.13).
Whatever a rule gives is compared with the wanted shape and dtype, symbolic sizes included; else there is no result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc.emit import Emitter
from seqc.verify import same_shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Value:
    """A node outside the loop for a value of the body: of all steps (time at axis 0), or the same in each."""

    node: fx.Node
    batched: bool

    @property
    def rank(self) -> int:
        """Number of axes in one step."""
        return int(self.node.meta["val"].dim()) - self.batched


@dataclass(frozen=True)
class Call:
    """An operation of the body with its arguments as :class:`Value`; ``trip`` is the number of steps (int or node).

    ``step`` is the fake value of one step's result.
    """

    emit: Emitter
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    trip: Any
    step: Any

    @property
    def tensors(self) -> list[Value]:
        leaves = pytree.tree_leaves((self.args, self.kwargs), is_leaf=lambda a: a is None)
        return [v for v in leaves if isinstance(v, Value) and isinstance(v.node.meta["val"], torch.Tensor)]

    def write(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Emit ``target`` with Values replaced by their nodes."""
        return self.emit(target, *_nodes(args), **_nodes(kwargs))

    def aligned(self, value: Value, rank: int) -> fx.Node:
        """``value`` with axes of size 1 behind time, so that a step has ``rank`` axes and broadcasting aligns."""
        node = value.node
        if value.batched:
            for _ in range(rank - value.rank):
                node = self.emit(aten.unsqueeze.default, node, 1)
        return node

    def every_step(self, value: Value) -> fx.Node:
        """``value`` with the time axis, repeated where it is the same in each step."""
        if value.batched:
            return value.node
        lead = self.emit(aten.unsqueeze.default, value.node, 0)
        return self.emit(aten.expand.default, lead, [self.trip, *([-1] * value.rank)])

    def named(self) -> dict[str, Any]:
        """The arguments by their names in the operator's schema, defaults filled in."""
        result: dict[str, Any] = {}
        for i, argument in enumerate(self.target._schema.arguments):
            if i < len(self.args):
                result[argument.name] = self.args[i]
            elif argument.name in self.kwargs:
                result[argument.name] = self.kwargs[argument.name]
            else:
                result[argument.name] = argument.default_value if argument.has_default_value() else None
        return result


Rule = Callable[[Call], fx.Node | None]


def over_time(emit: Emitter, node: fx.Node, args: Any, kwargs: Any, trip: Any) -> fx.Node | None:
    """Write ``node`` of a loop's body for all ``trip`` steps at once; its arguments are given as :class:`Value`.

    Returns None, with nothing written, where no rule gives exactly the stack of the steps' values.
    """
    place = emit.mark()
    try:
        result = _apply(Call(emit, node.target, tuple(args), dict(kwargs), trip, node.meta["val"]))
    except (RuntimeError, TypeError, ValueError, IndexError):
        result = None
    if result is not None and not _is_stack(result.meta["val"], node.meta["val"], emit.compute(_same, trip)):
        result = None
    if result is None:
        emit.undo(place)
    return result


def _apply(call: Call) -> fx.Node | None:
    target = call.target
    if target in RULES:
        return RULES[target](call)
    if target is operator.getitem:
        return call.write(target, *call.args)
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return _pointwise(call)
    return None


def _same(value: Any) -> Any:
    return value


def _is_stack(stacked: Any, step: Any, trip: Any) -> bool:
    if isinstance(step, (tuple, list)):
        return len(stacked) == len(step) and all(_is_stack(a, b, trip) for a, b in zip(stacked, step, strict=True))
    return stacked.dtype == step.dtype and same_shape(stacked.shape, (trip, *step.shape))


def _nodes(tree: Any) -> Any:
    return pytree.tree_map(lambda a: a.node if isinstance(a, Value) else a, tree, is_leaf=lambda a: a is None)


def _pointwise(call: Call) -> fx.Node:
    """Elementwise with broadcasting: batched operands of lower rank get axes of size 1 behind time."""
    rank = max(v.rank for v in call.tensors)
    tensors = {id(v) for v in call.tensors}
    align = lambda a: call.aligned(a, rank) if isinstance(a, Value) and id(a) in tensors else a  # noqa: E731
    args, kwargs = pytree.tree_map(align, (call.args, call.kwargs), is_leaf=lambda a: a is None)
    return call.write(call.target, *args, **kwargs)


def _as_is(call: Call) -> fx.Node | None:
    """Acts on trailing axes of its first argument only; the others (weights) are the same in each step."""
    if any(v.batched for v in call.tensors[1:]):
        return None
    return call.write(call.target, *call.args, **call.kwargs)


def _shifted(dim: Any, rank: int) -> Any:
    if dim is None or (isinstance(dim, (tuple, list)) and not dim):
        return list(range(1, rank + 1))
    if isinstance(dim, (tuple, list)):
        return [_shifted(d, rank) for d in dim]
    return dim + 1 if dim >= 0 else dim


def _along(call: Call) -> fx.Node | None:
    """Acts along axes named by number: each moves one place to the right."""
    first, *others = call.tensors
    if any(v.batched for v in others) or not first.batched:
        return None
    return _with_dims(call, call.named(), first.rank)


def _along_both(call: Call) -> fx.Node | None:
    """As :func:`_along` for operators whose index has the shape of the data: all operands get the time axis."""
    named = call.named()
    for name, value in named.items():
        if isinstance(value, Value):
            named[name] = call.every_step(value)
    return _with_dims(call, named, call.tensors[0].rank)


def _with_dims(call: Call, named: dict[str, Any], rank: int) -> fx.Node:
    args, kwargs = [], {}
    for argument in call.target._schema.arguments:
        value = named[argument.name]
        if argument.name in ("dim", "dims", "dim0", "dim1", "start_dim", "end_dim"):
            value = _shifted(value, rank)
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return call.write(call.target, *args, **{k: v for k, v in kwargs.items() if v is not None})


def _permute(call: Call) -> fx.Node | None:
    value, dims = call.args
    return call.write(aten.permute.default, value, [0, *(d % max(value.rank, 1) + 1 for d in dims)])


def _transpose_matrix(call: Call) -> fx.Node | None:
    (value,) = call.args
    return call.write(aten.transpose.int, value, 1, 2) if value.rank == 2 else value.node


def _joined(call: Call) -> fx.Node:
    """cat and stack: every operand gets the time axis."""
    named = call.named()
    dim = named["dim"]
    return call.write(call.target, [call.every_step(v) for v in named["tensors"]], dim + 1 if dim >= 0 else dim)


def _reshaped(call: Call) -> fx.Node:
    """reshape, not view: the stack of all steps may be a permuted tensor. A size -1 is ambiguous with no steps."""
    value, size = call.args[:2]
    sizes = list(size)
    if -1 in sizes:
        sizes[sizes.index(-1)] = _inferred(call, value, call.step.shape[sizes.index(-1)])
    return call.write(aten.reshape.default, value, [call.trip, *sizes])


def _inferred(call: Call, value: Value, size: int | torch.SymInt) -> Any:
    if isinstance(size, int):
        return size
    axes = enumerate(value.node.meta["val"].shape)
    axis = next((i for i, s in axes if i and same_shape((s,), (size,))), None)
    return -1 if axis is None else call.emit(aten.sym_size.int, value.node, axis)


def _expanded(call: Call) -> fx.Node:
    value, size = call.args[:2]
    return call.write(aten.expand.default, call.aligned(value, len(size)), [call.trip, *size])


def _expanded_as(call: Call) -> fx.Node | None:
    value, like = call.args
    return call.write(call.target, call.aligned(value, like.rank), like) if like.batched else None


def _repeated(call: Call) -> fx.Node:
    value, repeats = call.args[:2]
    return call.write(aten.repeat.default, call.aligned(value, len(repeats)), [1, *repeats])


def _reduced(target: Any) -> Rule:
    def rule(call: Call) -> fx.Node | None:
        value = call.args[0]
        if value.rank == 0:
            return None
        return call.write(target, value, list(range(1, value.rank + 1)), False, **call.kwargs)

    return rule


def _product(call: Call) -> fx.Node | None:
    """A matrix product of two operands as matmul, which broadcasts over leading axes."""
    left, right = call.args[:2]
    if left.rank == 1 and right.rank <= 2 and left.batched and not right.batched:
        return call.write(aten.matmul.default, left, right)
    if min(left.rank, right.rank) < 2:
        return _vector_product(call, left, right)
    rank = max(left.rank, right.rank)
    return call.write(aten.matmul.default, call.aligned(left, rank), call.aligned(right, rank))


def _vector_product(call: Call, left: Value, right: Value) -> fx.Node | None:
    """A matrix or batch of matrices times a vector: the vector becomes a matrix of one column."""
    if right.rank != 1 or left.rank < 2:
        return None
    column = call.write(aten.unsqueeze.default, right, -1)
    wide = call.aligned(left, left.rank)
    for _ in range(left.rank - 2 if right.batched else 0):
        column = call.emit(aten.unsqueeze.default, column, 1)
    return call.write(aten.squeeze.dim, call.write(aten.matmul.default, wide, column), -1)


def _added_product(call: Call) -> fx.Node | None:
    """beta * bias + alpha * product, with both factors 1."""
    named = call.named()
    if named["beta"] != 1 or named["alpha"] != 1:
        return None
    bias, left, right = call.args[:3]
    product = _product(Call(call.emit, aten.matmul.default, (left, right), {}, call.trip, call.step))
    if product is None:
        return None
    return _pointwise(Call(call.emit, aten.add.Tensor, (bias, Value(product, True)), {}, call.trip, call.step))


def _einsum(call: Call) -> fx.Node | None:
    equation, operands = call.args[:2]
    letter = next((c for c in "tTzZ" if c not in equation), None)
    if letter is None or "->" not in equation:
        return None
    terms, result = equation.replace(" ", "").split("->")
    marked = [letter + t if v.batched else t for t, v in zip(terms.split(","), operands, strict=True)]
    return call.write(aten.einsum.default, f"{','.join(marked)}->{letter}{result}", list(operands))


def _indexed(call: Call) -> fx.Node | None:
    value, indices = call.args[:2]
    if value.batched and not any(i is not None and i.batched for i in indices):
        return call.write(aten.index.Tensor, value, [None, *indices])
    if not value.batched and len(indices) == 1:
        return call.write(aten.index.Tensor, value, list(indices))
    return None


def _looked_up(call: Call) -> fx.Node | None:
    weight, index = call.args[:2]
    return None if weight.batched else call.write(call.target, weight, index, *call.args[2:], **call.kwargs)


def _rows(call: Call) -> fx.Node | None:
    """Axis 0 of a step holds independent rows: the steps become more rows, and are told apart again afterwards."""
    data = [v for v in call.tensors if v.batched]
    if not data or data[0].rank < 2 or call.args[0] is not data[0]:
        return None
    if call.target is aten.scaled_dot_product_attention.default:
        if len(call.tensors) != 3 or len({v.rank for v in call.tensors}) != 1:
            return None
    elif len(data) != 1:
        return None
    emit = call.emit
    batch = emit(aten.sym_size.int, data[0].node, 1)
    total = emit(operator.mul, call.trip, batch)

    def flat(value: Any) -> Any:
        if not isinstance(value, Value):
            return value
        if not value.batched and call.target is not aten.scaled_dot_product_attention.default:
            return value
        full = call.every_step(value)
        sizes = [_size(emit, full, i) for i in range(2, value.rank + 1)]
        return emit(aten.reshape.default, full, [total, *sizes])

    args, kwargs = pytree.tree_map(flat, (call.args, call.kwargs), is_leaf=lambda a: a is None)
    result = call.write(call.target, *args, **kwargs)
    rest = [_size(emit, result, i) for i in range(1, result.meta["val"].dim())]
    return emit(aten.reshape.default, result, [call.trip, batch, *rest])


def _size(emit: Emitter, node: fx.Node, axis: int) -> Any:
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else emit(aten.sym_size.int, node, axis)


def _table(rule: Rule, names: str) -> dict[Any, Rule]:
    """``rule`` for each ATen operator in ``names``; those that this torch does not have are left out."""
    result: dict[Any, Rule] = {}
    for name in names.split():
        packet, _, overload = name.partition(".")
        found = getattr(getattr(aten, packet, None), overload or "default", None)
        if found is not None:
            result[found] = rule
    return result


_ALONG = """
    sum.dim_IntList mean.dim amax amin logsumexp softmax.int _softmax log_softmax.int _log_softmax cumsum cumprod
    select.int slice.Tensor squeeze.dim squeeze.dims unsqueeze transpose.int flip split.Tensor split_with_sizes
    unsafe_split.Tensor chunk unbind.int narrow argmax argmin max.dim min.dim var.correction std.correction var.dim
    linalg_vector_norm index_select glu topk any.dim all.dim prod.dim_int roll flatten.using_ints cummax argsort sort
"""
_ELEMENTWISE = """
    clone _to_copy alias detach lift_fresh_copy contiguous to.dtype square softplus silu gelu relu dropout
    zeros_like ones_like full_like complex polar log_sigmoid where.ScalarSelf where.ScalarOther
"""

RULES: dict[Any, Rule] = {
    **_table(_along, _ALONG),
    **_table(_along_both, "gather scatter.src scatter_add"),
    **_table(_as_is, "linear layer_norm rms_norm tril triu constant_pad_nd"),
    **_table(_pointwise, _ELEMENTWISE),
    **_table(_permute, "permute"),
    **_table(_transpose_matrix, "t"),
    **_table(_joined, "cat stack"),
    **_table(_reshaped, "view reshape _unsafe_view"),
    **_table(_expanded, "expand"),
    **_table(_expanded_as, "expand_as"),
    **_table(_repeated, "repeat"),
    **_table(_reduced(aten.sum.dim_IntList), "sum"),
    **_table(_reduced(aten.mean.dim), "mean"),
    **_table(_product, "mm bmm matmul mv"),
    **_table(_added_product, "addmm baddbmm"),
    **_table(_einsum, "einsum"),
    **_table(_indexed, "index.Tensor"),
    **_table(_looked_up, "embedding"),
    **_table(_rows, "conv1d conv2d convolution group_norm scaled_dot_product_attention"),
}
"""Operators whose form over all steps is not just elementwise."""


def is_projection(call_args: tuple[Any, ...], target: Any) -> bool:
    """Whether an operation multiplies per-step rows by a matrix that is the same in each step, or looks rows up in it.

    Computed for all steps at once it is one GEMM over [trip * batch, ...]; the same as any layer outside a loop.
    """
    if target is aten.embedding.default:
        return not call_args[0].batched
    if target is aten.linear.default or target in (aten.mm.default, aten.matmul.default, aten.mv.default):
        return call_args[0].batched and not call_args[1].batched
    if target is aten.addmm.default:
        return call_args[1].batched and not call_args[2].batched
    return False
