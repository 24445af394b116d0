"""Brings an unrolled trace into the form the loop finder reads: one spelling per read, write and list of results.

    slice(x, 0, 0, max)                           ->  x
    copy(dst, src), clone(x), detach(x), alias(x) ->  src, x, x, x
    unbind(x, d)[i]                               ->  select(x, d, i)
    split(x, c, d)[i]       (d of symbolic size)  ->  slice(x, d, c*i, c*i + c)
    slice(x, d, a, min(n, size of d)) -> slice(x, d, a, n)
    slice(x, d, i, i + 1)   (d of symbolic size)  ->  unsqueeze(select(x, d, i), d)
    select(select_scatter(x, v, d, i), d, i)      ->  v             (while the buffer is being filled)
    select_scatter chain that fills d             ->  stack([v...], d)
    slice_scatter chain that fills d              ->  cat([v...], d)
    cat([cat([a, b], d), c], d)                   ->  cat([a, b, c], d)
    cat([unsqueeze(a, d), ...], d)                ->  stack([a, ...], d)

Equal nodes are merged and dead ones dropped. Every rule keeps the value bit for bit.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.frontend.lengths import unclamped
from seqc.ops.recurrence import propagate
from seqc.program import Program
from seqc.rewrite import copy_meta, remove_dead_code

aten = torch.ops.aten
INT_MAX = 2**63 - 1

_ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_async.default,
    aten._linalg_check_errors.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
}
_IDENTITIES = {
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
    aten.detach_.default,
}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_SAME_SHAPE_IDENTITIES = {aten.expand.default, aten.reshape.default}
_SAME_DTYPE_IDENTITIES = {
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.type_as.default,
}


def normalize(program: Program) -> None:
    """Rewrite ``program`` in place to the fixed point of the rules above."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target in _VIEWS:
            node.target = aten.reshape.default  # strides mean nothing here: clone and contiguous are dropped below
    for rule in (_simplify, _written):
        for node in list(graph.nodes):
            replacement = rule(graph, node) if node.op == "call_function" else None
            if replacement is not None:
                node.replace_all_uses_with(replacement)
                graph.erase_node(node)
        remove_dead_code(program)
    # Sizes such as that of x[:, t:t+1] are plain numbers now; those computed from them follow.
    propagate(program.graph_module)
    _merge_equal(graph)
    for node in list(graph.nodes):
        if node.target is aten.select_scatter.default and not _is_extended(node):
            _collapse_writes(graph, node)
        if node.target is aten.slice_scatter.default:
            _collapse_chunks(graph, node)
    remove_dead_code(program)
    for node in list(graph.nodes):
        if node.target is aten.cat.default:
            _flatten_cat(node)
    remove_dead_code(program)
    for node in list(graph.nodes):
        if node.target is aten.cat.default:
            _cat_to_stack(graph, node)
    remove_dead_code(program)
    program.graph_module.recompile()


def _simplify(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The node that can stand for ``node``, or None."""
    target, args = node.target, node.args
    if target in _IDENTITIES:
        return args[0]  # type: ignore[return-value]
    if target in _SAME_SHAPE_IDENTITIES and _same_shape(node, args[0]):
        return args[0]  # type: ignore[return-value]
    if (
        target in _SAME_DTYPE_IDENTITIES
        and _val(node).dtype == _val(args[0]).dtype
        and not node.kwargs.get("memory_format")
    ):
        return args[0]  # type: ignore[return-value]
    if target is aten.copy.default:
        return _copied(graph, node)
    if target is aten.slice.Tensor:
        return _simplify_slice(graph, node)
    if target is aten.slice_scatter.default:
        start, end, step = (*args[3:], *(None,) * 3)[:3] if len(args) > 3 else (None, None, None)
        return args[1] if start in (None, 0) and end in (None, INT_MAX) and step in (None, 1) else None  # type: ignore[return-value]
    if target is operator.getitem:
        return _piece(graph, node)
    return None


def _val(node: Any) -> torch.Tensor:
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value


def _same_shape(a: Any, b: Any) -> bool:
    return [_torch.size_expr(s) for s in _val(a).shape] == [_torch.size_expr(s) for s in _val(b).shape]


def insert(
    graph: fx.Graph,
    before: fx.Node,
    like: fx.Node,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] = MappingProxyType({}),
    mode: Any = None,
) -> fx.Node:
    """A new node with its fake value computed, in the fake mode of its operands unless told, and the provenance of ``like``."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args, dict(kwargs))
    copy_meta(like, node)
    values = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], args)
    mode = mode or next((v.fake_mode for v in pytree.tree_leaves(values) if hasattr(v, "fake_mode")), None)
    with _torch.faking(mode) if mode is not None else contextlib.nullcontext():  # sizes need no mode
        node.meta["val"] = target(*values, **kwargs)
    return node


def _copied(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """copy(dst, src) is src with dst's dtype and shape."""
    dst, value = node.args[:2]
    if _val(value).dtype != _val(dst).dtype:
        with graph.inserting_before(node):
            cast = graph.call_function(aten._to_copy.default, (value,), {"dtype": _val(dst).dtype})
        copy_meta(node, cast).meta["val"] = _val(value).to(_val(dst).dtype)
        value = cast
    if not _same_shape(value, dst):
        return _expand_like(graph, node, value, dst)
    assert isinstance(value, fx.Node)
    return value


def _expand_like(graph: fx.Graph, node: fx.Node, value: Any, dst: Any) -> fx.Node:
    zeros = insert(graph, node, node, aten.zeros_like.default, (dst,))
    return insert(graph, node, node, aten.add.Tensor, (zeros, value))


def _simplify_slice(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    x: Any
    dim: Any
    x, dim, start, end, step = (*node.args, *(None,) * 4)[:5] if len(node.args) < 5 else node.args[:5]
    dim = dim or 0
    step = 1 if step is None else step
    if isinstance(end, fx.Node) and _is_clamped_to(end, _val(x).shape[dim]):
        return insert(graph, node, node, aten.slice.Tensor, (x, dim, start, unclamped(end), *node.args[4:]))
    if step != 1:
        return None
    if start in (None, 0) and (end is None or (isinstance(end, int) and end == INT_MAX)):
        return x  # type: ignore[no-any-return]
    if _same_shape(node, x) and start in (None, 0):
        return x  # type: ignore[no-any-return]
    if isinstance(start, int) and isinstance(end, int) and end == start + 1 and start >= 0 and _is_symbolic(x, dim):
        read = insert(graph, node, node, aten.select.int, (x, dim, start))
        return insert(graph, node, node, aten.unsqueeze.default, (read, dim))
    return None


def _is_clamped_to(bound: fx.Node, size: Any) -> bool:
    """Whether ``bound`` is ``min(n, size)``."""
    return (
        bound.target is torch.sym_min
        and {type(a) for a in bound.args} == {int, fx.Node}
        and any(
            isinstance(a, fx.Node) and _torch.size_expr(a.meta["val"]) == _torch.size_expr(size) for a in bound.args
        )
    )


def _is_symbolic(x: Any, dim: Any) -> bool:
    return isinstance(_val(x).shape[dim], torch.SymInt)


def _piece(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """unbind(x, d)[i] and split(x, c, d)[i] as reads of x."""
    source, i = node.args
    assert isinstance(source, fx.Node) and isinstance(i, int)
    if source.target is aten.unbind.int:
        x, dim = (*source.args, 0)[:2]
        return insert(graph, node, source, aten.select.int, (x, dim, i))
    if source.target is aten.split.Tensor:
        x, size, dim = (*source.args, 0)[:3]
        if not isinstance(size, fx.Node) and not _is_symbolic(x, dim):
            return None
        start, end = (_times(graph, node, size, k) for k in (i, i + 1))
        piece = insert(graph, node, source, aten.slice.Tensor, (x, dim, start, end))
        return _simplify_slice(graph, piece) or piece
    return None


def _times(graph: fx.Graph, before: fx.Node, size: Any, k: int) -> Any:
    if isinstance(size, int):
        return size * k
    return insert(graph, before, before, operator.mul, (size, k)) if k > 1 else size if k else 0


def _is_extended(node: fx.Node) -> bool:
    """Whether a later write goes on top of this one: the buffer is still being filled."""
    return any(u.target is aten.select_scatter.default and u.args[0] is node for u in node.users)


def _written(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """A read of a buffer that is being filled is the value written there, or a read of what was there before."""
    if node.target is not aten.select.int:
        return None
    x: Any
    x, dim, index = node.args
    found: Any = None
    while x.target is aten.select_scatter.default and isinstance(index, int) and _is_extended(x):
        base, value, at_dim, at = x.args
        rank = _val(x).dim()
        if at_dim % rank != dim % rank or not isinstance(at, int) or (at < 0) != (index < 0):  # type: ignore[operator]
            break
        if at == index:
            assert isinstance(value, fx.Node)
            return value
        found = x = base
    return insert(graph, node, node, aten.select.int, (found, dim, index)) if found is not None else None


def _collapse_writes(graph: fx.Graph, last: fx.Node) -> None:
    """A chain of writes ``buffer[..., i] = v_i`` along one dimension is a stack; slots not written come from the buffer."""
    dim = last.args[2]
    writes: dict[int, Any] = {}
    node: Any = last
    while node.target is aten.select_scatter.default and node.args[2] == dim and isinstance(node.args[3], int):
        if node is not last and len(node.users) > 1:
            return
        writes.setdefault(node.args[3], node.args[1])
        node = node.args[0]
    size = _val(last).shape[dim]  # type: ignore[index]
    count = _torch.hint(size)
    if len(writes) < 2 or not isinstance(dim, int) or min(writes) < 0 or 2 * len(writes) < count:
        return
    missing = {i: insert(graph, last, last, aten.select.int, (node, dim, i)) for i in range(count) if i not in writes}
    entries = [writes.get(i, missing.get(i)) for i in range(count)]
    stack = insert(graph, last, last, aten.stack.default, (entries, dim))
    last.replace_all_uses_with(stack)


def _collapse_chunks(graph: fx.Graph, last: fx.Node) -> None:
    """Writes of chunks ``buffer[..., i:i+w] = v`` one behind the other, from the first place to the last, are a cat."""
    dim: Any = last.args[2]
    node: Any = last
    written: list[tuple[int, int, Any]] = []
    while node.target is aten.slice_scatter.default and len(node.args) == 5 and node.args[2] == dim:
        start, end = node.args[3], unclamped(node.args[4])
        if type(start) is not int or type(end) is not int or (node is not last and len(node.users) > 1):
            return
        written.insert(0, (start, end, node.args[1]))
        node = node.args[0]
    width = written[0][1] if written else 0
    places = [(i * width, (i + 1) * width) for i in range(len(written))]
    covers = places[-1][1] >= _torch.hint(_val(last).shape[dim]) if written else False
    if len(written) >= 2 and covers and [w[:2] for w in written] == places:
        last.replace_all_uses_with(insert(graph, last, last, aten.cat.default, ([w[2] for w in written], dim)))


def _flatten_cat(node: fx.Node) -> None:
    pieces: Any
    dim: Any
    pieces, dim = (*node.args, 0)[:2]
    rank = _val(node).dim()
    flat: list[fx.Node] = []
    for piece in pieces:
        inner = piece.target is aten.cat.default and len(piece.users) == 1
        if inner and (*piece.args, 0)[1] % rank == dim % rank:
            flat.extend(piece.args[0])
        elif not _is_empty(piece, dim):
            flat.append(piece)
    node.args = (flat or pieces, dim)


def _cat_to_stack(graph: fx.Graph, node: fx.Node) -> None:
    pieces, dim = node.args
    dim %= _val(node).dim()  # type: ignore[operator]
    if len(pieces) >= 2 and all(  # type: ignore[arg-type]
        p.target is aten.unsqueeze.default and p.args[1] % _val(node).dim() == dim  # type: ignore[union-attr, operator]
        for p in pieces  # type: ignore[union-attr]
    ):
        values = [p.args[0] for p in pieces]  # type: ignore[union-attr]
        node.replace_all_uses_with(insert(graph, node, node, aten.stack.default, (values, dim)))


def _is_empty(piece: Any, dim: Any) -> bool:
    shape = _val(piece).shape
    return shape == (0,) or (isinstance(shape[dim], int) and shape[dim] == 0)


def _merge_equal(graph: fx.Graph) -> None:
    """Value numbering: equal operations on equal arguments become one node, and so do equal symbolic sizes."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or _is_random(node):
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            key: Any = ("size", _torch.size_expr(value))
        else:
            leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
            key = (node.target, spec, tuple((type(x), x) for x in leaves))
        try:
            first = seen.setdefault(key, node)
        except TypeError:
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
