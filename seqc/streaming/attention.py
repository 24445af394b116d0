"""Operations in which each step reads those before it: what is read is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.fx as fx

from seqc import _torch
from seqc.program import named_args
from seqc.streaming.causal import beyond, is_nothing, is_zero, window_of
from seqc.streaming.demand import ALL, NEW, Demand, Everything, Mode, Plan, Recent, Window, refuse
from seqc.streaming.derivation import END, MOVES, Derivation

aten = torch.ops.aten

_LATER = "a causal mask has to rule later steps out"


def kept(d: Derivation, node: fx.Node, demand: Demand, axis: int) -> Plan:
    """Everything of a computed value: a state that grows; or the newest of it: one of fixed size."""
    value, mode = node.meta["val"], demand.modes[axis]
    if _torch.size_expr(value.shape[axis]) != d.time:
        raise refuse(node, "everything is read of an axis that is not the sequence alone")
    exprs = [_torch.size_expr(s) for s in value.shape]
    recent = isinstance(mode, Recent)
    exprs[axis] = sympy.Integer(mode.count) if isinstance(mode, Recent) else d.capacity
    slot = d.slot(d.role(node), node, exprs, value.dtype, 0.0, grows=None if recent else axis)
    slot.window = axis if recent else None

    def write(new: fx.Node) -> fx.Node:
        if not isinstance(mode, Recent):
            slot.following = d.emit(aten.scatter.src, slot.placeholder, axis, d.places(new, axis), new)
            return slot.following
        line = d.emit(aten.cat.default, [slot.placeholder, new], axis)
        slot.following = d.emit(aten.slice.Tensor, line, axis, -mode.count, END)
        return line

    return Plan(((node, Demand(tuple(NEW if m is not None else None for m in demand.modes))),), write)


def whole(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """torch's scaled_dot_product_attention: keys and values are kept."""
    arg = named_args(node)
    query, key, value, mask = arg["query"], arg["key"], arg["value"], arg["attn_mask"]
    rank = query.meta["val"].dim()
    if d.axes(query) != (rank - 2,) or any(d.axes(n) != (rank - 2,) for n in (key, value)):
        return None
    if not arg["is_causal"] and mask is None:
        raise refuse(node, "each step attends to later ones", _LATER)
    if mask is not None and not is_nothing(beyond(d, mask)):
        raise refuse(node, "each step attends to later ones", _LATER)
    read = ALL if mask is None else read_by(d, mask, is_nothing)
    needs = [(query, d.newest(query)), *((n, _along(n, rank - 2, read)) for n in (key, value))]
    if mask is not None:
        needs.append((mask, _rows(d, mask, read)))
    d.roles.setdefault(key, "key")
    d.roles.setdefault(value, "value")

    def write(q: fx.Node, k: fx.Node, v: fx.Node, *given: fx.Node) -> fx.Node:
        allowed = steps_only(d, given[0], -1, read, -math.inf, causal=True) if given else _before(d)
        return d.emit(
            node.target, q, k, v, allowed, arg["dropout_p"], False, scale=arg["scale"], enable_gqa=arg["enable_gqa"]
        )

    return Plan(tuple(needs), write)


def read_by(d: Derivation, node: fx.Node, excludes: Callable[[Any], bool]) -> Everything | Recent:
    """What the steps read, by a mask or by weights [step, read]."""
    window = window_of(d, node, excludes)
    return ALL if window is None else Recent(window - 1)


def steps_only(d: Derivation, node: fx.Node, axis: int, read: Mode, nothing: float, causal: bool) -> fx.Node:
    """``node`` with ``nothing`` (False in a mask) at places that are no steps: in front of the first, or behind the newest.

    ``causal``: it has that already where a step reads later ones, as places behind the newest are.
    """
    if not isinstance(read, (Recent, Everything)) or (causal and isinstance(read, Everything)):
        return node
    value = node.meta["val"]
    if math.isinf(nothing) and not value.dtype.is_floating_point and value.dtype != torch.bool:
        nothing = extreme(value.dtype, nothing)
    shape = [-1 if a == axis % value.dim() else 1 for a in range(value.dim())]
    steps = d.emit(aten.reshape.default, d.are_steps(read), shape)
    if value.dtype == torch.bool:
        return d.emit(aten.logical_and.default, node, steps)
    return d.emit(aten.where.self, steps, node, d.emit(aten.full.default, [], nothing, dtype=value.dtype))


def extreme(dtype: torch.dtype, infinity: float) -> int:
    """The least or the largest integer, for one of the infinities."""
    bounds = torch.iinfo(dtype)
    return bounds.min if infinity < 0 else bounds.max


def _along(node: fx.Node, axis: int, mode: Mode) -> Demand:
    rank = node.meta["val"].dim()
    return Demand(tuple(mode if a == axis else None for a in range(rank)))


def _rows(d: Derivation, node: fx.Node, read: Mode) -> Demand:
    rows, columns = d.axes(node)
    return Demand(tuple(NEW if a == rows else read if a == columns else None for a in range(node.meta["val"].dim())))


def _before(d: Derivation, steps: Mode = NEW, read: Mode = ALL, offset: int = 0) -> fx.Node:
    """bool [steps, read]: whether what is read is no later than the step, ``offset`` added to that."""
    rows = d.emit(aten.unsqueeze.default, d.positions(steps), 1)
    if offset:
        rows = d.emit(aten.add.Tensor, rows, offset)
    return d.emit(aten.le.Tensor, d.emit(aten.unsqueeze.default, d.positions(read), 0), rows)


def softmax(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """A softmax over what each step reads."""
    source, axis, *_ = named_args(node).values()
    axis %= node.meta["val"].dim()
    if axis not in d.axes(source):
        return None
    read = demand.modes[axis]
    if not isinstance(read, (Everything, Recent)):
        raise refuse(node, "a softmax over the sequence reads later steps", _LATER)
    per_step = any(isinstance(m, Window) for m in demand.modes)
    if per_step and not is_nothing(beyond(d, source)):
        raise refuse(node, "each step attends to later ones", _LATER)

    def write(new: fx.Node) -> fx.Node:
        scores = steps_only(d, new, axis, read, -math.inf, per_step)
        return d.emit(node.target, scores, *node.args[1:], **node.kwargs)

    return Plan(((source, demand),), write)


def product(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """A matrix product: over what each step reads, or of steps with what they read."""
    a, b = node.args[:2]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    ranks = [n.meta["val"].dim() for n in (a, b)]
    if min(ranks) < 2:
        return None
    rank = node.meta["val"].dim()
    read: Mode = read_by(d, a, is_zero) if len(d.axes(a)) == 2 else ALL

    def modes(n: fx.Node, own: int, contracted: int) -> list[Any]:
        """``own``: the axis, from the end, that the result has at the same place."""
        r = n.meta["val"].dim()
        found: list[Any] = [demand.modes[rank - r + x] if x in d.axes(n) and x < r - 2 else None for x in range(r)]
        if r + own in d.axes(n):
            found[own] = demand.modes[own]
        if r + contracted in d.axes(n):
            found[contracted] = read
        return found

    left, right = modes(a, -2, -1), modes(b, -1, -2)
    per_step = any(isinstance(m, Window) for m in (*left[:-1], right[-1]))
    if left[-1] is not None or right[-2] is not None:
        if left[-1] is None or right[-2] is None:
            raise refuse(node, "a product with one number for each step of the sequence")
        if per_step and not (isinstance(left[-2], Window) and beyond(d, a) == 0):
            raise refuse(node, "each step reads later ones", _LATER)
        if not per_step and not demand.at_end:
            raise refuse(node, "it is known at the end of the sequence only, but is needed at each step of it")
        d.roles.setdefault(b, "value")
    elif len(d.axes(a)) == 1 and len(d.axes(b)) == 1 and left[-2] is not None and right[-1] is not None:
        d.roles.setdefault(b, "key")
    needs = ((a, Demand(tuple(left))), (b, Demand(tuple(right))))

    def write(x: fx.Node, y: fx.Node) -> fx.Node:
        weights = x if left[-1] is None or _of_softmax(a) else steps_only(d, x, -1, read, 0.0, per_step)
        return d.emit(node.target, weights, y)

    return Plan(needs, write)


def _of_softmax(node: fx.Node) -> bool:
    """Whether ``node`` is what a softmax gave, moved or cast: that is 0 already where nothing is read."""
    while node.target not in (aten.softmax.int, aten._softmax.default):
        if node.target not in MOVES | {aten._to_copy.default, aten.clone.default}:
            return False
        (node,) = node.all_input_nodes[:1]
    return True


def einsum(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """A sum of products by letters: over what each step reads, or of steps with what they read."""
    arg = named_args(node)
    equation, operands = arg["equation"], list(arg["tensors"])
    letters = _letters(equation, [n.meta["val"].dim() for n in operands])
    if letters is None:
        return None
    *given, result = letters
    over = [{own[a] for a in d.axes(n)} for n, own in zip(operands, given, strict=True)]
    modes = dict(zip(result, demand.modes, strict=True))
    contracted = set.union(*over) - set(result)
    if len(contracted) > 1:
        raise refuse(node, "it sums over several axes of the sequence")
    read: Mode = ALL
    rules_out: fx.Node | None = None
    per_step = False
    for letter in contracted:
        weights = [n for n, own in zip(operands, over, strict=True) if letter in own and len(own) == 2]
        ordered = [n for n in weights if given[operands.index(n)].index(letter) == d.axes(n)[1]]
        rules_out = next((n for n in ordered if is_zero(beyond(d, n))), None)
        per_step = any(isinstance(modes[x], Window) for own in over for x in own if x in modes)
        if per_step:
            if rules_out is None:
                raise refuse(node, "each step reads later ones", _LATER)
        elif not demand.at_end:
            raise refuse(node, "it is known at the end of the sequence only, but is needed at each step of it")
        read = ALL if rules_out is None else read_by(d, rules_out, is_zero)
        modes[letter] = read
    for n, own in zip(operands, over, strict=True):
        if contracted & own and len(own) == 1:
            d.roles.setdefault(n, "value")
        elif len(own) == 1 and isinstance(modes[next(iter(own))], (Everything, Recent)):
            d.roles.setdefault(n, "key")
    needs = tuple(
        (n, Demand(tuple(modes[x] if x in times else None for x in own)))
        for n, own, times in zip(operands, given, over, strict=True)
    )

    def write(*new: fx.Node) -> fx.Node:
        factors = list(new)
        for letter in contracted:
            at = (
                next(i for i, own in enumerate(over) if letter in own)
                if rules_out is None
                else operands.index(rules_out)
            )
            if not _of_softmax(operands[at]):
                factors[at] = steps_only(d, factors[at], given[at].index(letter), read, 0.0, per_step)
        return d.emit(node.target, equation, factors)

    return Plan(needs, write)


def _letters(equation: str, ranks: list[int]) -> list[str] | None:
    """The letters of each operand's axes and of the result's; None where one is on a diagonal, or the result is not said."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    found = inputs.split(",")
    hidden = max((rank - len(own.replace("...", "")) for own, rank in zip(found, ranks, strict=True)), default=0)
    spare = [chr(ord("A") + i) for i in range(26) if chr(ord("A") + i) not in equation][:hidden]
    if not arrow or len(spare) < hidden:
        return None

    def spelled(own: str, rank: int) -> str:
        count = rank - len(own.replace("...", ""))
        return own.replace("...", "".join(spare[hidden - count :]) if count else "")

    words = [spelled(own, rank) for own, rank in zip(found, ranks, strict=True)]
    words.append(result.replace("...", "".join(spare)))
    return words if all(len(set(word)) == len(word) for word in words) else None


def triangle(d: Derivation, node: fx.Node, demand: Demand) -> Plan | None:
    """torch.tril and triu of values with an axis of steps and one of what they read: a mask by positions."""
    source, offset = named_args(node).values()
    rank = source.meta["val"].dim()
    if d.axes(source) != (rank - 2, rank - 1):
        return None
    below = node.target is aten.tril.default

    def write(new: fx.Node) -> fx.Node:
        zero = d.emit(aten.full.default, [], 0, dtype=new.meta["val"].dtype)
        kept = _before(d, demand.modes[-2], demand.modes[-1], offset if below else offset - 1)
        return d.emit(aten.where.self, kept, *((new, zero) if below else (zero, new)))

    return Plan(((source, demand),), write)
