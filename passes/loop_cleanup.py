"""Cleanups of a loop's boundary that Hoist applies: what is unused, there twice, or no real carry goes."""

from __future__ import annotations

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.loop import Loop
from seqc.passes.parts import read_through
from seqc.rewrite import replace_node

aten = torch.ops.aten
_NEW = {
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
}
_LIKE = {
    aten.zeros_like.default: aten.zeros.default,
    aten.ones_like.default: aten.ones.default,
    aten.full_like.default: aten.full.default,
}
Pairs = list[tuple[fx.Node, fx.Node]]


def clean(loop: Loop) -> int:
    """Apply every cleanup until none applies; the number of things removed."""
    total = 0
    while True:
        changes = loop.erase_unused()
        changes += read_through(loop) + _fills(loop) + _rebase_sizes(loop) + _unread_results(loop)
        changes += _merge(loop, loop.xs) + _merge(loop, loop.invariants)
        changes += _unchanging_carries(loop) + _plain_results(loop) + _dead_carries(loop)
        changes += _unused(loop, loop.xs) + _unused(loop, loop.invariants)
        if not changes:
            return total
        total += changes


def _fills(loop: Loop) -> int:
    """new_zeros and its like read no values, only sizes: written as zeros, ones or full they depend on no carry."""
    count = 0
    emit = Emitter(loop.body, loop.emit.mode)
    for node in loop.operations():
        if node.target not in _NEW and node.target not in _LIKE:
            continue
        value, like = node.meta["val"], node.args[0]
        assert isinstance(like, fx.Node)
        with emit.before(node):
            if node.target in _NEW:
                target, rest = _NEW[node.target], node.args[1:]
            else:
                sizes = [
                    s if isinstance(s, int) else emit(aten.sym_size.int, like, i)
                    for i, s in enumerate(like.meta["val"].shape)
                ]
                target, rest = _LIKE[node.target], (sizes, *node.args[1:])
            replace_node(node, emit(target, *rest, dtype=value.dtype, device=value.device))
        loop.reload()
        count += 1
    return count


def _unread_results(loop: Loop) -> int:
    """A getitem that nobody uses goes."""
    count = 0
    for i, (value, reader) in enumerate(loop.results):
        if reader is not None and not reader.users:
            loop.gm.graph.erase_node(reader)
            loop.results[i] = (value, None)
            count += 1
    return count


def _rebase_sizes(loop: Loop) -> int:
    """Sizes are read from carries and invariants where these have them, so that no x is kept for its shape only."""
    count = 0
    inputs = [inner for _, inner in (*loop.carries, *loop.invariants)]
    for node in loop.operations():
        if node.target is not aten.sym_size.int or node.args[0] in inputs:
            continue
        wanted = node.meta["val"]
        for inner in inputs:
            sizes = [str(s) for s in getattr(inner.meta["val"], "shape", ())]
            if str(wanted) in sizes:
                node.args = (inner, sizes.index(str(wanted)))
                count += 1
                break
    return count


def _merge(loop: Loop, pairs: Pairs) -> int:
    """An input given twice is given once."""
    first: dict[fx.Node, fx.Node] = {}
    before = len(pairs)
    for outer, inner in list(pairs):
        if outer in first:
            inner.replace_all_uses_with(first[outer])
            loop.reload()
            loop.drop_input(pairs, inner)
        first.setdefault(outer, inner)
    return before - len(pairs)


def _unused(loop: Loop, pairs: Pairs) -> int:
    unread = [inner for _, inner in pairs if not inner.users]
    for inner in unread:
        loop.drop_input(pairs, inner)
    return len(unread)


def _unchanging_carries(loop: Loop) -> int:
    """A carry that each step passes on unchanged is an invariant, and its final value its initial one."""
    for i, (outer, inner) in enumerate(loop.carries):
        if loop.results[i][0] is inner:
            reader = loop.results[i][1]
            if reader is not None:
                reader.replace_all_uses_with(outer)
                loop.gm.graph.erase_node(reader)
            loop.drop_carry(i)
            loop.invariants.append((outer, inner))
            return 1
    return 0


def _plain_results(loop: Loop) -> int:
    """A y that nobody reads goes; one that is an x, an invariant or another y is read from there."""
    outside = {inner: (outer, True) for outer, inner in loop.xs}
    outside |= {inner: (outer, False) for outer, inner in loop.invariants}
    first: dict[fx.Node, fx.Node] = {}
    for i in range(len(loop.carries), len(loop.results)):
        value, reader = loop.results[i]
        source: fx.Node | None = None
        if reader is not None and value in outside:
            source, batched = outside[value]
            if not batched:
                with loop.emit.before(loop.node):
                    rank = source.meta["val"].dim()
                    lead = loop.emit(aten.unsqueeze.default, source, 0)
                    source = loop.emit(aten.expand.default, lead, [loop.trip, *([-1] * rank)])
        elif reader is not None:
            source = first.setdefault(value, reader)
            if source is reader:
                continue
        if reader is not None and source is not None:
            reader.replace_all_uses_with(source)
            loop.gm.graph.erase_node(reader)
        loop.drop_result(i)
        return 1
    return 0


def _dead_carries(loop: Loop) -> int:
    """A carry whose final value nobody reads, and that feeds no y and no living carry, goes."""
    inner = {placeholder: i for i, (_, placeholder) in enumerate(loop.carries)}
    count = len(loop.carries)
    living: set[int] = set()
    stack = [v for i, (v, reader) in enumerate(loop.results) if i >= count or reader is not None]
    living |= {i for i in range(count) if loop.results[i][1] is not None}
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack += node.all_input_nodes
        if node in inner and inner[node] not in living:
            living.add(inner[node])
            stack.append(loop.results[inner[node]][0])
        elif node in inner:
            stack.append(loop.results[inner[node]][0])
    for i in range(count):
        if i not in living:
            placeholder = loop.carries[i][1]
            start = loop.carries[i][0]
            loop.drop_carry(i)
            # Its own update may still read it: an invariant in its place, until the dead operations are erased.
            loop.invariants.append((start, placeholder))
            return 1
    return 0


def delay(loop: Loop) -> int:
    """A carry whose next value is an x (or an invariant) is that x one step late: an x of its own, no carry.

    In walking order its values are the initial one, then those of all steps; a step sees all but the last of these, and
    the last is the final value.
    """
    steps = {inner: outer for outer, inner in loop.xs}
    fixed = {inner: outer for outer, inner in loop.invariants}
    for i, (start, inner) in enumerate(loop.carries):
        value, reader = loop.results[i]
        if value not in steps and value not in fixed:
            continue
        emit = loop.emit
        with emit.before(loop.node):
            if value in steps:
                source = steps[value]
            else:
                rank = fixed[value].meta["val"].dim()
                lead = emit(aten.unsqueeze.default, fixed[value], 0)
                source = emit(aten.expand.default, lead, [loop.trip, *([-1] * rank)])
            first = emit(aten.unsqueeze.default, start, 0)
            both = [source, first] if loop.reverse else [first, source]
            walked = emit(aten.cat.default, both, 0)
            late = emit(aten.slice.Tensor, walked, 0, *((1, 2**63 - 1) if loop.reverse else (0, loop.trip)))
            if reader is not None:
                final = emit(aten.select.int, walked, 0, 0 if loop.reverse else -1)
                reader.replace_all_uses_with(final)
                loop.gm.graph.erase_node(reader)
        loop.drop_carry(i)
        loop.xs.append((late, inner))
        return 1
    return 0
