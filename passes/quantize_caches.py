"""QuantizeCaches: the rows of caches are stored in few bits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.fx as fx

from seqc.caches import Int8, Scheme, Stored
from seqc.dependence import ancestors
from seqc.emit import Emitter
from seqc.program import Port, Program, State
from seqc.rewrite import remove_dead_code

aten = torch.ops.aten

_FLOATS = (torch.float32, torch.float16)


@dataclass(frozen=True)
class QuantizeCaches:
    """Caches, whose rows are written once and then only moved and read, are stored by a scheme, such as int8 with scales.

        k = scatter(past, positions, new);               y = attention(q, k)
    ->  q, s = int8(new);  qs = scatter(past_q, positions, q);  ss = scatter(past_s, positions, s)
        k = float(qs) * ss;                              y = attention(q, k)

    A row is rounded once, when it is written, and read as it was rounded from then on, in the same call too: so what comes out
    does not depend on the pieces in which a sequence is taken. A state that is computed of itself is never stored so, since
    its error would grow with each step. Rows are vectors along the last axis that is not the steps'.

    ``tolerance``: half a scale of each row, 1/254 of its largest number; what that does to outputs the check measures.
    """

    scheme: Scheme = field(default_factory=Int8)

    name: ClassVar[str] = "quantize_caches"
    tolerance: ClassVar[float] = 0.5

    def __call__(self, program: Program) -> int:
        changes = 0
        for state in program.states:
            found = _cache(program, state, self.scheme)
            if isinstance(found, _Cache):
                names = _store(program, state, found, self.scheme)
                program.reasons.append(f"{state.name} is stored as {self.scheme.name}: {', '.join(names)}")
                changes += 1
            elif found:
                program.reasons.append(f"{state.name} stays as it is: {found}")
        if changes:
            remove_dead_code(program)
        return changes


@dataclass(frozen=True)
class _Cache:
    """A state whose rows are only written, moved and read.

    ``given`` takes it; ``new`` are rows to write and ``line`` all rows, old and new, of which ``following`` is what is kept.
    ``places`` says where rows are written, None where they are put behind; ``steps`` is the axis of the rows, ``row`` that of
    their numbers.
    """

    given: fx.Node
    new: fx.Node
    line: fx.Node
    following: fx.Node
    places: fx.Node | None
    steps: int
    row: int


def _cache(program: Program, state: State, scheme: Scheme) -> _Cache | str:
    """The cache that ``state`` is; why it cannot be stored; or nothing, where it is no cache."""
    at = program.states.index(state)
    given = program.input_nodes[len(program.given_inputs) + at]
    following = program.output_nodes[len(program.own_outputs) + at]
    steps = state.window if state.grows is None else state.grows
    if steps is None:
        return ""
    value = given.meta["val"]
    if value.dtype not in _FLOATS or state.initial.any():
        return f"it is {value.dtype}" if value.dtype not in _FLOATS else "it does not begin with zeros"
    row = value.dim() - (2 if steps == value.dim() - 1 else 1)
    size = value.shape[row] if row >= 0 else 1
    if row < 0 or row == state.batch_axis or not isinstance(size, int):
        return "it has one number for each step"
    if scheme.row_bytes(size) >= size * value.dtype.itemsize:
        return f"rows of {size} numbers would not become smaller"
    found = _written(given, following, steps, row) if state.grows is not None else _moved(given, following, steps, row)
    readers = [user for user in given.users if user.target is not aten.sym_size.int]
    if following in program.output_nodes[: len(program.own_outputs)] and state.grows is None:
        found = None
    if found is None or readers != [found.line] or given in ancestors([found.new]):
        return "its rows are not only written, moved and read"
    return found


def _written(given: fx.Node, following: fx.Node, steps: int, row: int) -> _Cache | None:
    """A growing cache: rows are written at their places."""
    if following.target is not aten.scatter.src or following.args[:2] != (given, steps):
        return None
    places, new = following.args[2:4]
    assert isinstance(places, fx.Node) and isinstance(new, fx.Node)
    return _Cache(given, new, following, following, places, steps, row)


def _moved(given: fx.Node, following: fx.Node, steps: int, row: int) -> _Cache | None:
    """The cache of a window: new rows are put behind, and the newest kept."""
    count = given.meta["val"].shape[steps]
    line = following.args[0] if following.target is aten.slice.Tensor else None
    if (
        not isinstance(line, fx.Node)
        or line.target is not aten.cat.default
        or list(following.args[1:3]) != [steps, -count]
    ):
        return None
    parts: Any = line.args[0]
    if len(parts) != 2 or parts[0] is not given or (*line.args, 0)[1] != steps or len(following.users) != 1:
        return None
    return _Cache(given, parts[1], line, following, None, steps, row)


def _store(program: Program, state: State, cache: _Cache, scheme: Scheme) -> list[str]:
    """Rewrite the cache; returns the names of the states that it became."""
    value = cache.given.meta["val"]
    kinds = scheme.stored(value.shape[cache.row])
    emit = Emitter(program.graph_module, program.fake_mode)
    given = list(_placeholders(program, emit, cache, kinds))
    kept, lines = [], []
    with emit.before(cache.line):
        for past, rows, kind in zip(given, scheme.quantise(emit, cache.new, cache.row), kinds, strict=True):
            if cache.places is not None:
                lines.append(emit(aten.scatter.src, past, cache.steps, _places(emit, cache, kind.size), rows))
                kept.append(lines[-1])
            else:
                lines.append(emit(aten.cat.default, [past, rows], cache.steps))
                kept.append(emit(aten.slice.Tensor, lines[-1], *cache.following.args[1:]))
        read = scheme.dequantise(emit, lines, value.dtype)
    for user in list(cache.line.users):
        if user is not program.output_node and user is not cache.following:
            user.replace_input_with(cache.line, read)
    for user in list(cache.given.users):
        if user.target is aten.sym_size.int:
            user.replace_input_with(cache.given, given[0])
    return _adopt(program, state, cache, kinds, given, kept, read)


def _places(emit: Emitter, cache: _Cache, size: int) -> fx.Node:
    """The place of each number of new rows that are ``size`` long: the same for all numbers of a row."""
    assert cache.places is not None, "of a growing cache"
    if cache.places.meta["val"].shape[cache.row] == size:
        return cache.places
    first = emit(aten.slice.Tensor, cache.places, cache.row, 0, 1)
    sizes = [size if axis == cache.row else -1 for axis in range(first.meta["val"].dim())]
    return first if size == 1 else emit(aten.expand.default, first, sizes)


def _placeholders(program: Program, emit: Emitter, cache: _Cache, kinds: Sequence[Stored]) -> Iterator[fx.Node]:
    last = cache.given
    for kind in kinds:
        with program.graph.inserting_after(last):
            last = program.graph.placeholder(f"{cache.given.name}_{kind.suffix.strip('_') or 'data'}")
        sizes = list(cache.given.meta["val"].shape)
        sizes[cache.row] = kind.size
        last.meta["val"] = emit.compute(torch.empty, sizes, dtype=kind.dtype)
        yield last


def _adopt(
    program: Program,
    state: State,
    cache: _Cache,
    kinds: Sequence[Stored],
    given: Sequence[fx.Node],
    kept: Sequence[fx.Node],
    read: fx.Node,
) -> list[str]:
    """Let the new states stand where ``state`` stood."""
    at = program.states.index(state)
    first, own = len(program.given_inputs) + at, len(program.own_outputs)

    def port(old: Port, kind: Stored) -> Port:
        shape = tuple(kind.size if axis == cache.row else size for axis, size in enumerate(old.shape))
        return Port(f"{old.name}{kind.suffix}", kind.dtype, shape)

    def made(kind: Stored) -> State:
        shape = [kind.size if axis == cache.row else size for axis, size in enumerate(state.initial.shape)]
        initial = torch.zeros(math.prod(shape), dtype=kind.dtype).reshape(shape)
        return replace(state, name=state.name + kind.suffix, next_name=state.next_name + kind.suffix, initial=initial)

    taken, results = program.inputs, list(program.output_nodes)
    outputs = [read if node is cache.line and i < own else node for i, node in enumerate(results)]
    outputs[own + at : own + at + 1] = kept
    new_outputs = [port(program.outputs[own + at], kind) for kind in kinds]
    program.outputs = (*program.outputs[: own + at], *new_outputs, *program.outputs[own + at + 1 :])
    program.inputs = (*taken[:first], *(port(taken[first], kind) for kind in kinds), *taken[first + 1 :])
    states = [made(kind) for kind in kinds]
    program.states = (*program.states[:at], *states, *program.states[at + 1 :])
    program.output_node.args = (tuple(outputs),)
    for node in dict.fromkeys((cache.following, cache.line, cache.given)):
        program.graph.erase_node(node)
    return [s.name for s in states]
