"""Builds the ``seqc::recurrence`` node, its body and its reads and results from an alignment."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.errors import UnsupportedModelError
from seqc.frontend.align import Alignment
from seqc.frontend.columns import Carry, Column, Index, Invariant, Op, Read, Result, walk
from seqc.frontend.normalize import insert
from seqc.frontend.step_numbers import arithmetic, as_tensor, is_arithmetic
from seqc.ops.recurrence import recurrence, recurrence_shapes
from seqc.program import Program, source_line
from seqc.rewrite import copy_meta, sort_topologically

aten = torch.ops.aten

SinkSpec = tuple[fx.Node, Column, int, int]


class _Builder:
    """The state of building one loop: the body graph, its inputs by kind, and the node of each column."""

    def __init__(
        self, program: Program, alignment: Alignment, like: fx.Node, before: fx.Node, replaced: dict[fx.Node, fx.Node]
    ) -> None:
        self.program = program
        self.graph = program.graph
        self.alignment = alignment
        self.like = like
        self.before = before
        self.replaced = replaced
        self.body = fx.Graph()
        self.done: dict[int, fx.Node] = {}
        self.carries: list[Carry] = []
        self.inits: list[fx.Node] = []
        self.xs: dict[Any, tuple[fx.Node, fx.Node]] = {}
        self.invariants: dict[fx.Node, fx.Node] = {}
        self.numbers: set[int] = set()  # the columns that are numbers in the trace and tensors in the body

    def placeholder(self, prefix: str, value: Any) -> fx.Node:
        node = self.body.placeholder(f"{prefix}_{len(self.body.nodes)}")
        node.meta["val"] = value
        return node

    def outer(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert(self.graph, self.before, self.like, target, args, kwargs, self.program.fake_mode)

    def now(self, node: fx.Node) -> fx.Node:
        """The node that stands for ``node`` since the loops before this one were built."""
        return self.replaced.get(node, node)

    # -- reads ---------------------------------------------------------------------------------------------------------

    def read(self, read: Read) -> fx.Node:
        """x with the steps of the loop as axis 0."""
        last = read.start + read.stride * (self.alignment.k - 1)
        if read.width is None:
            steps = self.strided(
                self.now(read.x), read.dim, min(read.start, last), max(read.start, last) + 1, abs(read.stride)
            )
        elif read.width == read.stride:
            # Not even where it is all of x in this trace: at another length a ragged chunk may follow.
            whole = self.outer(aten.slice.Tensor, self.now(read.x), read.dim, read.start, last + read.width)
            steps = self.outer(aten.unflatten.int, whole, read.dim, [self.alignment.k, read.width])
        else:
            low = min(read.start, last)
            windows = [
                self.strided(self.now(read.x), read.dim, low + j, max(read.start, last) + j + 1, abs(read.stride))
                for j in range(read.width)
            ]
            steps = self.outer(aten.stack.default, windows, read.dim + 1)
        if read.stride < 0:
            steps = self.outer(aten.flip.default, steps, [read.dim])
        return self.moved(steps, read.dim, 0)

    def strided(self, x: fx.Node, dim: int, low: int, high: int, stride: int) -> fx.Node:
        size = x.meta["val"].shape[dim]
        if low == 0 and high == _torch.hint(size) and stride == 1:
            return x
        return self.outer(aten.slice.Tensor, x, dim, low, high, stride)

    def moved(self, x: fx.Node, source: int, target: int) -> fx.Node:
        if source == target:
            return x
        order = list(range(x.meta["val"].dim()))
        order.insert(target, order.pop(source))
        return self.outer(aten.permute.default, x, order)

    # -- the body ------------------------------------------------------------------------------------------------------

    def add_inputs(self, columns: list[Column]) -> None:
        """Placeholders in the order of the op: carries, xs, invariants."""
        for column in columns:
            if isinstance(column, Carry):
                self.carries.append(column)
                init = self.initial(column)
                self.inits.append(init)
                self.done[id(column)] = self.placeholder("carry", init.meta["val"])
        for column in columns:
            if isinstance(column, (Read, Result, Index)):
                self.add_step_input(column)
        for column in columns:
            if isinstance(column, Invariant):
                outer = self.now(column.node)
                node = self.invariants.get(outer) or self.placeholder("inv", outer.meta["val"])
                self.invariants[outer] = self.done[id(column)] = node

    def initial(self, carry: Carry) -> fx.Node:
        """The first value of a carry: of one that is a number in the trace, such as T - t, a tensor."""
        init = self.now(carry.init)
        if isinstance(init.meta["val"], torch.Tensor):
            return init
        self.numbers.add(id(carry))
        return as_tensor(self.outer, init)

    def add_step_input(self, column: Read | Result | Index) -> None:
        key: Any = (id(column.loop), id(column.column), column.flipped) if isinstance(column, Result) else column
        if key not in self.xs:
            if isinstance(column, Read):
                outer = self.read(column)
            elif isinstance(column, Index):
                outer = self.numbered(column)
            else:
                outer = column.loop.results[id(column.column)]
                outer = self.outer(aten.flip.default, outer, [0]) if column.flipped else outer
            value = outer.meta["val"]
            self.xs[key] = (outer, self.placeholder("x", value.new_empty(value.shape[1:])))
        if isinstance(column, Index):
            self.numbers.add(id(column))
        self.done[id(column)] = self.xs[key][1]

    def numbered(self, index: Index) -> fx.Node:
        """start + stride*i for every step i, of shape [k]: int64, or float64 as Python computes."""
        dtype = torch.float64 if isinstance(index.stride, float) else torch.int64
        steps = self.outer(aten.arange.default, self.alignment.k, dtype=dtype)
        if index.stride != 1:
            steps = self.outer(aten.mul.Tensor, steps, index.stride)
        return steps if index.start == 0 else self.outer(aten.add.Tensor, steps, index.start)

    def add_op(self, op: Op) -> None:
        columns = (Invariant, Read, Result, Carry, Index, Op)
        leaves = [self.done[id(a)] if isinstance(a, columns) else a for a in op.args]
        target: Any = op.template.target
        numbers = [id(a) in self.numbers for a in op.args]
        if any(numbers) and is_arithmetic(target):
            node = arithmetic(self.body, self.program.fake_mode, target, leaves)
            self.numbers.add(id(op))
        else:
            node = self.indexed(op, target, leaves, numbers) if any(numbers) else self.called(op, target, leaves)
            node.meta["val"] = op.template.meta["val"]
        self.done[id(op)] = copy_meta(op.template, node)

    def called(self, op: Op, target: Any, leaves: list[Any]) -> fx.Node:
        args, kwargs = pytree.tree_unflatten(leaves, op.spec)
        return self.body.call_function(target, args, kwargs)

    def indexed(self, op: Op, target: Any, leaves: list[Any], numbers: list[bool]) -> fx.Node:
        """An operation with the step number, or a number made of it, as a literal takes it as a tensor instead."""
        args, kwargs = pytree.tree_unflatten(leaves, op.spec)
        if target is aten.select.int:
            at = self.body.call_function(aten.reshape.default, (args[2], [1]))
            picked = self.body.call_function(aten.index_select.default, (args[0], args[1], at))
            return self.body.call_function(aten.squeeze.dim, (picked, args[1]))
        if target is aten.scalar_tensor.default:
            return self.body.call_function(aten._to_copy.default, (args[0],), {"dtype": kwargs.get("dtype")})
        packet = getattr(target, "overloadpacket", None)
        if packet is not None and len(args) == 2 and not kwargs and "Tensor" in packet.overloads() and numbers[1]:
            return self.body.call_function(packet.Tensor, args)
        raise UnsupportedModelError(
            f"{target} takes the step number of a loop at {source_line(op.template)}; use a tensor of positions instead"
        )

    # -- results -------------------------------------------------------------------------------------------------------

    def merged(self, ys: fx.Node, sink: fx.Node, front: int, back: int) -> fx.Node:
        """The whole result of a stack or cat from the ys, with the peeled entries put back."""
        entries, dim = (*sink.args, 0)[:2]
        entries = list(entries)  # type: ignore[arg-type]
        rank = ys.meta["val"].dim()
        stacked = sink.target is aten.stack.default
        dim = dim % (rank if stacked else rank - 1)
        value = self.moved(ys, 0, dim)
        if not stacked:
            width = ys.meta["val"].shape[dim + 1]
            if isinstance(width, int) and width == 1:
                value = self.outer(aten.squeeze.dim, value, dim + 1)
            else:
                value = self.outer(aten.flatten.using_ints, value, dim, dim + 1)
        odd = [*entries[:front], *entries[len(entries) - back :]]
        if stacked:
            odd = [self.outer(aten.unsqueeze.default, e, dim) for e in odd]
        if not odd:
            return value
        return self.outer(aten.cat.default, [*odd[:front], value, *odd[front:]], dim)


def build(
    program: Program,
    alignment: Alignment,
    sinks: list[SinkSpec],
    roots: list[Column],
    replaced: dict[fx.Node, fx.Node],
) -> None:
    """Insert the recurrence and let its results serve the sinks and every other user of the loop's values.

    ``replaced`` holds what now stands for the sinks of loops built before, and takes in those of this one.
    """
    graph = program.graph
    members = {
        m: (c, i) for c in alignment.columns if isinstance(c, Op) for i, m in enumerate(c.members) if m is not None
    }
    sink_nodes = {s[0] for s in sinks}
    used = [
        (m, c, i) for m, (c, i) in members.items() if any(u not in members and u not in sink_nodes for u in m.users)
    ]
    anchor = [s[0] for s in sinks] or [m for m, _, _ in used]
    if not anchor:
        return
    like = anchor[0]
    before = graph.output_node()
    builder = _Builder(program, alignment, like, before, replaced)
    columns = list(walk(*(s[1] for s in sinks), *roots, *(c for _, c, _ in used), through_carries=True))
    builder.add_inputs(columns)
    for column in columns:
        if isinstance(column, Op):
            builder.add_op(column)
    last = 0 if alignment.backward else alignment.k - 1
    finals = {id(c.next): i for i, c in reversed(list(enumerate(builder.carries)))}
    collected: dict[int, Column] = {id(s[1]): s[1] for s in sinks}
    collected.update({id(r): r for r in roots if any(x is r for x in alignment.exported)})
    each = {id(c): c for _, c, i in used if not (i == last and id(c) in finals)}
    collected.update(each)
    ys = {key: i + len(builder.carries) for i, key in enumerate(collected)}
    outputs = [builder.done[id(c.next)] for c in builder.carries] + [builder.done[k] for k in collected]
    builder.body.output(tuple(outputs))
    node = _insert_recurrence(builder, bool(alignment.backward))
    values = {key: _getitem(builder, node, i) for key, i in ys.items()}
    alignment.results.update(values)
    for sink, column, front, back in sinks:
        replaced[sink] = builder.merged(values[id(column)], sink, front, back)
        sink.replace_all_uses_with(replaced[sink])
    for member, column, i in used:
        # where earlier steps are read too, as by a loop over them, the last one is read as they are
        if i == last and id(column) in finals and id(column) not in each:
            value = _getitem(builder, node, finals[id(column)])
        else:
            value = builder.outer(aten.select.int, values[id(column)], 0, i)
        for user in list(member.users):
            if user not in members and user not in sink_nodes:
                user.replace_input_with(member, value)
    sort_topologically(program.graph)


def _insert_recurrence(builder: _Builder, reverse: bool) -> fx.Node:
    program, graph = builder.program, builder.graph
    body = fx.GraphModule({}, builder.body)
    name = next(f"body_{i}" for i in range(10**6) if not hasattr(program.graph_module, f"body_{i}"))
    program.graph_module.add_submodule(name, body)
    carries = tuple(builder.inits)
    xs = tuple(outer for outer, _ in builder.xs.values())
    invariants = tuple(builder.invariants)
    with graph.inserting_before(builder.before):
        attr = graph.get_attr(name)
        node = graph.call_function(recurrence, (attr, builder.alignment.k, carries, xs, invariants, reverse))
    mode = program.fake_mode
    with _torch.faking(mode):
        first, steps, fixed = (tuple(n.meta["val"] for n in group) for group in (carries, xs, invariants))
        node.meta["val"] = recurrence_shapes(body, builder.alignment.k, first, steps, fixed, reverse)
    return copy_meta(builder.like, node)


def _getitem(builder: _Builder, node: fx.Node, i: int) -> fx.Node:
    with builder.graph.inserting_before(builder.before):
        item = builder.graph.call_function(operator.getitem, (node, i))
    item.meta["val"] = node.meta["val"][i]
    return copy_meta(builder.like, item)
