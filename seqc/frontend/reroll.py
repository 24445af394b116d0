"""Finds the unrolled copies of time loops in a trace and replaces them by ``seqc::recurrence``.

A loop shows in three ways: a ``stack`` or ``cat`` whose number of entries depends on the length (a list of results; writes
into a buffer were brought to this form by ``normalize``), and, for a loop of which only the last value is used, reads
``x[:, 0], x[:, 1], ...`` whose number depends on the length. From there the copies are aligned (``align``) and the
recurrence is built (``build_loop``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from seqc.frontend.align import Alignment, DirectionError, MisalignedError
from seqc.frontend.build_loop import build
from seqc.frontend.columns import Carry, Column, Index, Invariant, Read, Result, step_of, walk
from seqc.ops.recurrence import is_recurrence
from seqc.program import Program, flat_args, source_line
from seqc.rewrite import remove_dead_code

aten = torch.ops.aten

# Steps peeled off the front and the back of a list of results, in the order tried.
_PEELS = ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 2))
_FEWEST_STEPS = 3


@dataclass
class Sink:
    """A list of results: ``node`` stacks or concatenates ``front`` odd entries, one column, and ``back`` odd entries."""

    node: fx.Node
    column: Column
    front: int
    back: int


_COLLECTS = (aten.stack.default, aten.cat.default)


@dataclass
class Loop:
    """An alignment and how its results leave the loop."""

    alignment: Alignment
    sinks: list[Sink] = field(default_factory=list)
    roots: list[Column] = field(default_factory=list)
    """Columns that other loops read, or whose last value is used after the loop."""


def reroll(program: Program, depends_on_length: Callable[[fx.Node], bool]) -> list[str]:
    """Replace loops in place; returns why some lists of results could not be explained as loops.

    ``depends_on_length`` tells of a node whether another trace, at another length, has another number of it or of its
    entries.
    """
    refusals: list[str] = []
    loops: list[Loop] = []
    for node in program.graph.nodes:
        if node.target in _COLLECTS and depends_on_length(node):
            try:
                _add_sink(loops, node)
            except MisalignedError as error:
                refusals.append(_why(program, node, error))
    replaced: dict[fx.Node, fx.Node] = {}
    for loop in loops:
        loop.alignment.complete()
        sinks = [(s.node, s.column, s.front, s.back) for s in loop.sinks]
        build(program, loop.alignment, sinks, loop.roots, replaced)
    remove_dead_code(program)
    while (found := _last_value_loop(program, depends_on_length, refusals)) is not None:
        found.alignment.complete()
        build(program, found.alignment, [], found.roots, {})
        remove_dead_code(program)
    return refusals


def _why(program: Program, node: fx.Node, error: MisalignedError) -> str:
    """Why what ``node`` collects is no loop's results."""
    line = source_line(node)
    alike = [list(n.args[0]) for n in program.graph.nodes if n.target in _COLLECTS and source_line(n) == line]
    if line and (len({len(entries) for entries in alike}) > 2 or any(entries[:1] == [node] for entries in alike)):
        return (
            f"a tensor of all steps so far is made in each step at {line}: make it once, behind the loop, and rule later "
            "steps out by a mask"
        )
    return f"the results collected at {line} do not come from a uniform loop: {error}"


def _add_sink(loops: list[Loop], node: fx.Node) -> None:
    entries = list(node.args[0])  # type: ignore[arg-type]
    reasons: list[MisalignedError] = []
    for loop in loops:
        for front, back in _PEELS:
            if len(entries) - front - back == loop.alignment.k and _joins(loop, node, entries, front, back):
                return
    for front, back in _PEELS:
        k = len(entries) - front - back
        if k < _FEWEST_STEPS:
            continue
        try:
            alignment, column = _aligned(loops, entries[front : len(entries) - back], k)
            _check_order(alignment, column)
        except MisalignedError as error:
            reasons.append(error)
            continue
        for item in walk(column, through_carries=True):
            if isinstance(item, Result):
                item.loop.exported.append(item.column)
                next(x for x in loops if x.alignment is item.loop).roots.append(item.column)
        loops.append(Loop(alignment, [Sink(node, column, front, back)]))
        return
    raise reasons[0] if reasons else MisalignedError(f"only {len(entries)} results were traced")


def _joins(loop: Loop, node: fx.Node, entries: list[fx.Node], front: int, back: int) -> bool:
    """Whether the entries are computed by a loop already found, sharing work with it; if so the sink is added to it."""
    trial = loop.alignment.copy()
    known = {id(c) for c in trial.columns}
    try:
        column = trial.align(entries[front : len(entries) - back])
        _check_order(trial, column)
    except MisalignedError:
        return False
    if not any(id(c) in known for c in walk(column)):
        return False
    loop.alignment.adopt(trial)
    loop.sinks.append(Sink(node, column, front, back))
    return True


def _aligned(loops: list[Loop], entries: list[fx.Node], k: int) -> tuple[Alignment, Column]:
    """Align; a value carried against the direction of the others becomes a loop of its own, whose results are read."""
    for _ in range(4):
        alignment = Alignment(k, others=tuple(x.alignment for x in loops))
        try:
            return alignment, alignment.align(entries)
        except DirectionError as error:
            inner = Alignment(k, others=alignment.others)
            inner.align(error.members)
            loops.append(Loop(inner))
    raise MisalignedError("values are carried in opposite directions")


def inputs_of(column: Column) -> list[fx.Node]:
    """The nodes outside the loop that a column and all it depends on take in."""
    nodes: list[fx.Node] = []
    for item in walk(column, through_carries=True):
        if isinstance(item, Invariant):
            nodes.append(item.node)
        elif isinstance(item, Read):
            nodes.append(item.x)
        elif isinstance(item, Carry):
            nodes.append(item.init)
        elif isinstance(item, Result):
            nodes.extend(inputs_of(item.column))
    return nodes


def _check_order(alignment: Alignment, column: Column) -> None:
    """Nothing the loop takes in may depend on what the loop computes."""
    if isinstance(column, (Invariant, Index)):
        raise MisalignedError("the results are the same in every step")
    members = alignment.member_nodes()
    seen: set[fx.Node] = set()
    stack = inputs_of(column)
    while stack:
        node = stack.pop()
        if node in members:
            raise MisalignedError(f"a step needs the whole result of the loop at {source_line(node)}")
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)


def _last_value_loop(
    program: Program, depends_on_length: Callable[[fx.Node], bool], refusals: list[str]
) -> Loop | None:
    """A loop of which only the last value is used: grown forward from its reads of steps, or of whole chunks."""
    families: dict[tuple[Any, ...], dict[int, fx.Node]] = {}
    for node in program.graph.nodes:
        place = step_of(node)
        if place is not None and (depends_on_length(node) or _is_result_of_a_loop(node.args[0])):
            families.setdefault((*node.args[:2], place[1]), {})[place[0]] = node
    for reads in families.values():
        ordered = [reads[i] for i in sorted(reads)]
        for members in (ordered, ordered[::-1]):
            if len(members) < _FEWEST_STEPS:
                continue
            try:
                loop = _grow(members)
            except MisalignedError as error:
                refusals.append(f"the reads at {source_line(members[0])} are not those of a uniform loop: {error}")
                continue
            if loop is not None:
                return loop
    return None


def _is_result_of_a_loop(node: Any) -> bool:
    return node.target is operator.getitem and is_recurrence(node.args[0])


def _grow(reads: list[fx.Node]) -> Loop | None:
    frontier: list[list[fx.Node | None]] = [list(reads)]
    alignment: Alignment | None = None
    roots: list[Column] = []
    seen: set[tuple[fx.Node | None, ...]] = set()
    while frontier:
        for members in _user_columns(frontier.pop(0)):
            if tuple(members) in seen:
                continue
            seen.add(tuple(members))
            first = next(i for i, m in enumerate(members) if m is not None)
            k = len(members) - first
            if alignment is not None and alignment.k != k:
                continue
            trial = Alignment(k, backward=False) if alignment is None else alignment.copy()
            try:
                column = trial.align(members[first:])
                _check_order(trial, column)
            except MisalignedError:
                continue
            alignment = trial
            roots.append(column)
            frontier.append(members)
    if alignment is None or not any(isinstance(c, Carry) for c in alignment.columns):
        return None
    return Loop(alignment, roots=roots)


def _user_columns(column: list[fx.Node | None]) -> list[list[fx.Node | None]]:
    """Columns of nodes that use ``column`` in the same way in every step; the first steps may lack one."""
    last = column[-2]
    if last is None:
        return []
    found = []
    for user in last.users:
        pattern = _pattern(user, last)
        users: list[fx.Node | None] = []
        for node in column:
            alike = [u for u in node.users if _pattern(u, node) == pattern] if node is not None else []
            users.append(alike[0] if len(alike) == 1 else None)
        lead = next((i for i, u in enumerate(users) if u is not None), len(users))
        if len(users) - lead >= _FEWEST_STEPS and all(u is not None for u in users[lead:]) and lead <= 2:
            found.append(users)
    return found


def _pattern(user: fx.Node, used: fx.Node) -> Any:
    """An operation with its literals, and the places in which it takes ``used``."""
    leaves = ("used" if a is used else "node" if isinstance(a, fx.Node) else a for a in flat_args(user))
    return user.target, tuple(leaves)
