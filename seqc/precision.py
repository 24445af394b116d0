"""In which precision each value of a Program is computed where a narrow floating-point type is asked for."""

from __future__ import annotations

import enum
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc.dependence import ancestors, computed_from
from seqc.ops.choose import is_choice
from seqc.ops.recurrence import is_recurrence
from seqc.program import Program

aten, ops = torch.ops.aten, torch.ops.seqc

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""The types that are exchanged for each other; float64 is what the model asked for, and stays."""


class Kind(enum.Enum):
    """How a floating-point value takes part.

    ``CONSTANT``  made of weights, positions and literals alone: float32, and as narrow as what it meets
    ``GIVEN``  an input, or parts of one: as it was given, and narrow as soon as it is computed with
    ``NARROW``  the type that was asked for
    ``WIDE``  float32, and so is what is computed elementwise with it
    """

    CONSTANT = 0
    GIVEN = 1
    NARROW = 2
    WIDE = 3


# Products of matrices, which sum in float32 inside: what the narrow type is for.
_PRODUCTS = frozenset({
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
    aten.baddbmm.default, aten.mv.default, aten.dot.default, aten.einsum.default, aten.embedding.default,
    aten.convolution.default, aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.scaled_dot_product_attention.default,
    ops.causal_conv.default, ops.left_padded_conv.default,
})  # fmt: skip

# Of each step made from the one before: errors add up, and decays near 1 are 1 in a narrow type.
_SCANS = frozenset({
    ops.linear_scan.default, ops.selective_scan.default, ops.linear_attention.default, ops.softmax_scan.default,
    ops.lti_scan.default, ops.gated_rnn.default, aten.lstm.input, aten.gru.input, aten.rnn_tanh.input,
    aten.rnn_relu.input, aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default,
})  # fmt: skip

# Elementwise, but with results that leave the range of float16, or arguments that need their digits.
_STEEP = frozenset({
    aten.exp.default, aten.exp2.default, aten.expm1.default, aten.log.default, aten.log1p.default, aten.log2.default,
    aten.log10.default, aten.softplus.default, aten.log_sigmoid.default, aten.log_sigmoid_forward.default,
    aten.logaddexp.default, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.square.default,
    aten.rsqrt.default, aten.reciprocal.default, aten.sin.default, aten.cos.default, aten.tan.default,
    aten.floor_divide.default, aten.remainder.Tensor, aten.remainder.Scalar, aten.fmod.Tensor, aten.fmod.Scalar,
})  # fmt: skip

# They compute nothing: the result has the type of what is moved.
_MOVES = frozenset({
    operator.getitem, aten.permute.default, aten.transpose.int, aten.t.default, aten.view.default,
    aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.expand.default, aten.select.int, aten.slice.Tensor, aten.flatten.using_ints,
    aten.unflatten.int, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default,
    aten.lift_fresh_copy.default, aten._to_copy.default, aten.split_with_sizes.default, aten.split.Tensor,
    aten.chunk.default, aten.unbind.int, aten.cat.default, aten.stack.default, aten.constant_pad_nd.default,
    aten.pad.default, aten.flip.default, aten.roll.default, aten.repeat.default, aten.repeat_interleave.self_int,
    aten.index_select.default, aten.index.Tensor, aten.gather.default, aten.index_put.default,
    aten.scatter.src, aten.scatter.value, aten.slice_scatter.default, aten.select_scatter.default, aten.tril.default,
    aten.triu.default, aten.unfold.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.diagonal.default, aten.amax.default,
    aten.amin.default, aten.movedim.int, aten.swapaxes.default, aten.narrow.default, aten.expand_as.default,
    aten.view_as.default,
})  # fmt: skip


def beyond(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a number in ``weight`` is finite and would be infinite in ``dtype``."""
    if weight.dtype not in FLOATS or torch.finfo(weight.dtype).max <= torch.finfo(dtype).max:
        return False
    return bool(((weight.abs() > torch.finfo(dtype).max) & weight.isfinite()).any())


def is_scan(node: fx.Node) -> bool:
    return node.target in _SCANS or is_recurrence(node) or is_choice(node)


def is_elementwise(node: fx.Node) -> bool:
    """Whether a value of the result is made of one of each operand, or is one, in whatever type these have."""
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return node.target in _MOVES or (pointwise and node.target not in _STEEP)


def kinds(program: Program, dtype: torch.dtype, narrow_states: Iterable[fx.Node]) -> dict[fx.Node, Kind]:
    """The kind of each value that has floats of a type in ``FLOATS``, where ``dtype`` is the narrow one.

    States are wide but for ``narrow_states``.
    """
    narrow, wanted = set(narrow_states), _wanted_wide(program)
    wanted |= {n for n in program.graph.nodes if n.op == "call_function" and _has_extremes(n, torch.finfo(dtype))}
    recurrent = _recurrent(program, narrow)
    found = {n: Kind.WIDE if beyond(program.weights[n.name], dtype) else Kind.CONSTANT for n in program.weight_nodes}
    first_state = len(program.given_inputs)
    for i, node in enumerate(program.input_nodes):
        state = Kind.NARROW if node in narrow else Kind.WIDE
        found[node] = Kind.GIVEN if i < first_state else state
    for node in program.graph.nodes:
        if node.op == "call_function":
            found[node] = Kind.WIDE if node in recurrent else _kind(node, found, wanted)
    return {node: kind for node, kind in found.items() if has_floats(node)}


def has_floats(node: fx.Node) -> bool:
    return any(isinstance(v, torch.Tensor) and v.dtype in FLOATS for v in pytree.tree_leaves(node.meta.get("val")))


def operand_kinds(node: fx.Node, found: Mapping[fx.Node, Kind]) -> set[Kind]:
    return {found[a] for a in node.all_input_nodes if a in found and has_floats(a)}


def computed_wide(node: fx.Node, found: Mapping[fx.Node, Kind]) -> bool:
    """Whether a node, with or without floats of its own, reads float32."""
    if node in found:
        return found[node] is not Kind.NARROW
    return Kind.NARROW not in (read := operand_kinds(node, found)) or Kind.WIDE in read or not is_elementwise(node)


def _wanted_wide(program: Program) -> set[fx.Node]:
    """What leads to a scan elementwise from the products, norms and inputs before it: its gates, decays and steps."""
    wanted: set[fx.Node] = set()
    pending = [a for n in program.graph.nodes if n.op == "call_function" and is_scan(n) for a in n.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in wanted and node.op == "call_function" and is_elementwise(node):
            wanted.add(node)
            pending += node.all_input_nodes
    return wanted


def _recurrent(program: Program, narrow_states: set[fx.Node]) -> set[fx.Node]:
    """What a state's next value is made of that is itself made of that state: the step of a loop without the loop.

    Products too: the form for one step must compute what the loop of the general form does.
    """
    first, found = len(program.given_inputs), set[fx.Node]()
    for node, following in zip(
        program.input_nodes[first:], program.output_nodes[len(program.own_outputs) :], strict=True
    ):
        if node not in narrow_states and has_floats(node):
            found |= computed_from([node]) & ancestors([following])
    return found


def _has_extremes(node: fx.Node, limits: torch.finfo) -> bool:
    """Whether a literal, such as the -1e9 of a mask or an epsilon, is infinite or nothing in a narrow type."""
    literals = [abs(a) for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, float)]
    return has_floats(node) and any((a > limits.max and math.isfinite(a)) or 0 < a < limits.tiny for a in literals)


def _kind(node: fx.Node, found: Mapping[fx.Node, Kind], wanted: set[fx.Node]) -> Kind:
    read = operand_kinds(node, found)
    if node.target is aten.embedding.default:
        return Kind.NARROW
    if read <= {Kind.CONSTANT}:
        return Kind.WIDE if node in wanted else Kind.CONSTANT
    if node.target in _PRODUCTS:
        return Kind.NARROW
    if node.target is aten._to_copy.default and (asked := _asked_type(node)) is not None:
        return asked
    if not is_elementwise(node) or node in wanted or Kind.WIDE in read:
        return Kind.WIDE
    return Kind.GIVEN if node.target in _MOVES and Kind.NARROW not in read else Kind.NARROW


def _asked_type(node: fx.Node) -> Kind | None:
    """The kind that the model itself asks for by a cast from one type to another."""
    source: Any = node.args[0]
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    if before == after or before not in FLOATS or after not in FLOATS:
        return None
    return Kind.WIDE if after is torch.float32 else Kind.NARROW
