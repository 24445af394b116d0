"""Aligning the copies of a loop body by anti-unification.

Starting from a column known to be a result of the loop (the entries of ``torch.stack``, say), its arguments form columns in
turn, until every column is explained (see ``columns``). This follows data flow only, so it does not depend on how the loop
was spelled or in which order its results were made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.frontend.columns import (
    Carry,
    Column,
    Index,
    Invariant,
    Members,
    Op,
    Read,
    Result,
    reads_of,
    traced_size,
    walk,
)
from seqc.program import source_line

aten = torch.ops.aten


class MisalignedError(Exception):
    """The copies of a loop body differ; the message says in what and where."""


class DirectionError(MisalignedError):
    """Two carries run in opposite directions: the second belongs to a loop of its own."""

    def __init__(self, members: Members) -> None:
        super().__init__("two values are carried in opposite directions")
        self.members = members


@dataclass
class Alignment:
    """The columns of one loop of ``k`` steps. ``backward`` is True where carries come from the next step, None if unknown."""

    k: int
    backward: bool | None = None
    columns: list[Carry | Op] = field(default_factory=list)
    others: tuple[Alignment, ...] = ()
    """Loops already found; what they compute in every step is read from their results."""
    exported: list[Op] = field(default_factory=list)
    """Columns whose values in all steps another loop reads."""
    results: dict[int, fx.Node] = field(default_factory=dict)
    """Once the loop is built: id of a collected column -> the node of its values in all steps."""
    _by_member: dict[tuple[int, fx.Node], list[Carry | Op]] = field(default_factory=dict)

    def adopt(self, trial: Alignment) -> None:
        """Take over what a copy of this alignment found."""
        self.backward, self.columns, self._by_member = trial.backward, trial.columns, trial._by_member

    def copy(self) -> Alignment:
        """A trial alignment; columns are shared, and only ever added to."""
        trial = Alignment(self.k, self.backward, list(self.columns), self.others)
        trial._by_member = {key: list(value) for key, value in self._by_member.items()}
        return trial

    def member_nodes(self) -> set[fx.Node]:
        return {m for c in self.columns if isinstance(c, Op) for m in c.members if m is not None}

    def complete(self) -> None:
        """Find the nodes that columns lack: what a last step computes only for the code behind the loop."""
        for column in walk(*self.columns, through_carries=True):
            if not isinstance(column, Op):
                continue
            for i in (i for i, m in enumerate(column.members) if m is None):
                users = (u for a in column.args for source in _at_step(a, i) for u in source.users)
                for user in (u for u in users if u.target is column.template.target):
                    try:
                        self._fill(column, i, user)
                        break
                    except MisalignedError:
                        continue

    def align(self, members: Iterable[fx.Node | None]) -> Column:
        """Explain a column. Raises MisalignedError naming what differs and the source line."""
        members = tuple(members)
        present = [m for m in members if m is not None]
        if len(present) < 2:
            raise MisalignedError("fewer than two copies of the loop body are left to compare")
        if all(m is present[0] for m in present):
            return Invariant(present[0])
        known = self._find(members, 0)
        if known is not None:
            for i, member in enumerate(members):
                if member is not None and known.members[i] is None:
                    self._fill(known, i, member)
            return known
        result = self._result_of_another(members)
        if result is not None:
            return result
        carry = self._shifted(members)
        if carry is not None:
            return carry
        odd = _odd_one(members)
        if odd is not None:
            return self._new_carry(members, odd)
        read = _read(members)
        if read is not None:
            return read
        return self._new_op(members)

    def _result_of_another(self, members: Members) -> Result | None:
        for loop in self.others:
            if loop.k != self.k:
                continue
            for flipped, order in ((False, members), (True, members[::-1])):
                column = loop._find(order, 0)
                if isinstance(column, Op) and all(m is not None for m in column.members):
                    return Result(loop, column, flipped)
        return None

    def _register(self, column: Carry | Op) -> None:
        self.columns.append(column)
        for i, member in enumerate(column.members):
            if member is not None:
                self._by_member.setdefault((i, member), []).append(column)

    def _fill(self, column: Any, i: int, value: Any) -> None:
        """Give a column the node of step ``i`` that it lacked, after checking that it computes what the column says."""
        found: list[tuple[Carry | Op, int, fx.Node]] = []
        if not self._computes(column, i, value, found):
            raise MisalignedError(f"step {i} of the loop computes something else than the steps before it")
        for item, step, node in found:
            item.members = (*item.members[:step], node, *item.members[step + 1 :])
            self._by_member.setdefault((step, node), []).append(item)

    def _computes(self, column: Any, i: int, value: Any, found: list[tuple[Carry | Op, int, fx.Node]]) -> bool:
        """Whether ``value`` is step ``i`` of the column; ``found`` collects the members that were missing, and their steps."""
        if not isinstance(column, (Invariant, Read, Result, Carry, Op)):
            number = _whole_chunk(value) if isinstance(value, fx.Node) else value
            return bool(number == (column.start + column.stride * i if isinstance(column, Index) else column))
        if not isinstance(value, fx.Node) or isinstance(column, Result):
            return False
        if isinstance(column, Invariant):
            return column.node is value
        if isinstance(column, Read):
            return column.is_step(i, value)
        if column.members[i] is not None:
            return column.members[i] is value
        found.append((column, i, value))
        if isinstance(column, Carry):
            return self._computes(column.next, i + 1 if self.backward else i - 1, value, found)
        leaves, spec = pytree.tree_flatten((value.args, dict(value.kwargs)))
        alike = value.target is column.template.target and spec == column.spec
        return alike and all(self._computes(a, i, x, found) for a, x in zip(column.args, leaves, strict=True))

    def _find(self, members: Members, shift: int) -> Carry | Op | None:
        """The column G with G[i - shift] == members[i] wherever both have a node, and at least two such places."""
        for i, member in enumerate(members):
            for column in self._by_member.get((i - shift, member), ()) if member is not None else ():
                pairs = [(m, column.members[j - shift]) for j, m in enumerate(members) if 0 <= j - shift < self.k]
                both = [(a, b) for a, b in pairs if a is not None and b is not None]
                if len(both) >= 2 and all(a is b for a, b in both):
                    return column
        return None

    def _shifted(self, members: Members) -> Column | None:
        """Members that are a known column one or more steps earlier (or later, in a loop that runs backwards)."""
        for distance in (1, 2, 3):
            for sign in (1, -1):
                source = self._find(members, sign * distance)
                if isinstance(source, Carry) and self.backward != (sign < 0):
                    continue  # the next value of a carry, which is being explained
                if source is not None and self._set_direction(sign < 0, source):
                    return self._carry_chain(members, source, distance)
        return None

    def _set_direction(self, backward: bool, source: Carry | Op) -> bool:
        if self.backward is None:
            self.backward = backward
        if self.backward != backward:
            raise DirectionError(source.members)
        return True

    def _carry_chain(self, members: Members, source: Column, distance: int) -> Column:
        """``distance`` one-step carries in a row: h_{t-2} is the carry of the carry of h."""
        assert isinstance(source, (Carry, Op))
        origin = source.members
        for j in range(1, distance + 1):
            if self.backward:
                shifted = (*origin[j:], *members[self.k - distance : self.k - distance + j])
                init = shifted[-1]
            else:
                shifted = (*members[distance - j : distance], *origin)[: self.k]
                init = shifted[0]
            known = self._find(shifted, 0)
            if known is None:
                if init is None:
                    raise MisalignedError("the first value of a carried state is missing from the trace")
                known = Carry(shifted, init, source)
                self._register(known)
            source = known
        return source

    def _new_carry(self, members: Members, odd: int) -> Carry:
        """All members but the first (in loop order) compute alike: a carried value that starts as that first one."""
        if self.backward is None:
            self.backward = odd != 0
        if self.backward != (odd != 0):
            raise MisalignedError(_difference(members))
        init = members[odd]
        assert init is not None
        if any(m is not None and _shape(m) != _shape(init) for m in members):
            raise MisalignedError(_difference(members))
        carry = Carry(members, init)
        self._register(carry)
        shifted = (None, *members[:-1]) if self.backward else (*members[1:], None)
        carry.next = self.align(shifted)
        _check_bounds(carry.next, self.k, self.backward or False)
        return carry

    def _new_op(self, members: Members) -> Op:
        present = [m for m in members if m is not None]
        first = present[0]
        if any(m.op != "call_function" or m.target is not first.target for m in present):
            raise MisalignedError(_difference(members))
        if any(_shape(m) != _shape(first) for m in present):
            shapes = " and ".join(sorted({str(_shape(m)) for m in present})[:2])
            raise MisalignedError(f"{first.target} has shapes {shapes} in different steps at {source_line(first)}")
        leaves, specs = zip(*(pytree.tree_flatten((m.args, dict(m.kwargs))) for m in present), strict=True)
        if any(s != specs[0] for s in specs):
            raise MisalignedError(_difference(members))
        op = Op(members, first, spec=specs[0])
        self._register(op)
        for column in zip(*leaves, strict=True):
            rows = iter(column)
            op.args.append(self._argument(tuple(next(rows) if m is not None else None for m in members), first))
        return op

    def _argument(self, values: tuple[Any, ...], where: fx.Node) -> Any:
        present = [v for v in values if v is not None]
        if not present:
            return None
        if all(isinstance(v, fx.Node) for v in present):
            numbers = tuple(None if v is None else _whole_chunk(v) for v in values)
            if len(set(present)) > 1 and all((v is None) == (n is None) for v, n in zip(values, numbers, strict=True)):
                return self._argument(numbers, where)
            return self.align(values)
        if all(type(v) is type(present[0]) and v == present[0] for v in present):
            return present[0]
        affine = _affine(values) if all(type(v) is int for v in present) else _affine_float(values)
        if affine is not None:
            return Index(*affine)
        shown = ", ".join(str(v) for v in present[:4])
        raise MisalignedError(
            f"the steps of the loop use different values ({shown}) at {source_line(where)}; where they are made of the step "
            "number, make them of torch.arange(length)[t]"
        )


def _shape(node: fx.Node) -> Any:
    """The traced sizes: a chunk x[:, 4:8] has a size of 4 here, however its bounds depend on the length in general."""
    value = node.meta.get("val")
    return [_torch.hint(s) for s in value.shape] if isinstance(value, torch.Tensor) else None


def _at_step(column: Any, i: int) -> list[fx.Node]:
    """The nodes that are step ``i`` of a column that differs from step to step."""
    if isinstance(column, Read):
        return [u for u in column.x.users if column.is_step(i, u)]
    member = column.members[i] if isinstance(column, (Op, Carry)) else None
    return [] if member is None else [member]


def _whole_chunk(node: fx.Node) -> int | None:
    """The number behind a size such as ``min(8, length) - 4`` in a step whose chunk lies within the length."""
    value = node.meta.get("val")
    return _torch.unclamped(value) if isinstance(value, torch.SymInt) else None


def _odd_one(members: Members) -> int | None:
    """The place of the first step (0, or the last where the loop runs backwards) if that alone computes something else."""
    for odd in (0, len(members) - 1):
        rest = [m for i, m in enumerate(members) if m is not None and i != odd]
        alone = members[odd]
        if alone is None or len(rest) < 2 or _alike(alone, rest[0]):
            continue
        if all(_alike(m, rest[0]) for m in rest) or all(m is rest[0] for m in rest):
            return odd
    return None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    if a.op != "call_function" or b.op != "call_function" or a.target is not b.target or _shape(a) != _shape(b):
        return False
    if a.target in (aten.select.int, aten.slice.Tensor):
        return a.args[:2] == b.args[:2] or not _from_outside(a, b)
    return True


def _from_outside(a: fx.Node, b: fx.Node) -> bool:
    """Whether two reads take from different tensors although one of them is read at a changing place."""
    return a.args[0] is not b.args[0] and a.args[2:] != b.args[2:]


def _affine(values: tuple[Any, ...]) -> tuple[int, int] | None:
    """(a, b) with values[i] == a + b*i wherever there is a value."""
    known = [(i, v) for i, v in enumerate(values) if v is not None]
    if len(known) < 2:
        return None
    (i, v), (j, w) = known[0], known[1]
    if (w - v) % (j - i):
        return None
    stride = (w - v) // (j - i)
    start = v - stride * i
    return (start, stride) if all(v == start + stride * i for i, v in known) else None


def _affine_float(values: tuple[Any, ...]) -> tuple[float, float] | None:
    """The same for floats, up to their rounding: Python computed ``0.1 * t`` in float64."""
    if any(type(v) not in (int, float) for v in values) or len(values) < 3:
        return None
    start, stride = float(values[0]), (values[-1] - values[0]) / (len(values) - 1)
    scale = max(abs(v) for v in values)
    exact = all(abs(v - (start + stride * i)) <= 1e-14 * scale for i, v in enumerate(values))
    return (start, stride) if exact else None


def _read(members: Members) -> Read | None:
    present = [m for m in members if m is not None]
    first = present[0]
    if first.target not in (aten.select.int, aten.slice.Tensor):
        return None
    if any(
        m.target is not first.target or m.args[:2] != first.args[:2] or len(m.args) != len(first.args) for m in present
    ):
        return None
    x, dim = first.args[:2]
    starts: tuple[Any, ...] = tuple(m.args[2] if m is not None else None for m in members)
    if (
        not isinstance(x, fx.Node)
        or not isinstance(dim, int)
        or any(type(s) is not int for s in starts if s is not None)
    ):
        return None
    affine = _affine(starts)
    if affine is None or affine[1] == 0:
        return None
    dim %= x.meta["val"].dim()
    if all(s < 0 for s in starts if s is not None):
        affine = (affine[0] + traced_size(x, dim), affine[1])  # counted from the end
    if first.target is aten.select.int:
        return Read(x, dim, *affine)
    if len(first.args) != 4 or any(type(m.args[3]) is not int for m in present):
        return None
    widths = {m.args[3] - m.args[2] for m in present}  # type: ignore[operator]
    return Read(x, dim, *affine, width=int(widths.pop())) if len(widths) == 1 else None  # type: ignore[arg-type]


def _check_bounds(column: Column | None, k: int, backward: bool) -> None:
    """A value the trace lacks in the last step will be computed after all: what it reads must exist."""
    for read in reads_of(column):
        step = 0 if backward else k - 1
        index = read.start + read.stride * step
        if not 0 <= index < traced_size(read.x, read.dim):
            raise MisalignedError("the last step would read past the end of the sequence")


def _difference(members: Members) -> str:
    present = [m for m in members if m is not None]
    first = present[0]
    other = next((m for m in present if m.op != first.op or m.target is not first.target), present[-1])
    told = (f"{_operation(node)} at {source_line(node) or '?'}" for node in (first, other))
    return "one step computes {} where another computes {}".format(*told)


def _operation(node: fx.Node) -> str:
    if node.op != "call_function":
        return node.name
    target: Any = node.target
    return str(target) if isinstance(target, torch._ops.OpOverload) else str(target.__name__)
