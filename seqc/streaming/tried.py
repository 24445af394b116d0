"""What a computation in chunks has to carry from one piece of the sequence to the next: found by trying it.

Two pieces, the second from what the first left, have to give what the whole gives: in float64, on random numbers, with
pieces shorter and longer than the chunks and boundaries between pieces inside of chunks and between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.dependence import ancestors
from seqc.ops.recurrence import is_recurrence, parts
from seqc.outside import is_size
from seqc.program import named_args
from seqc.streaming.concrete import shape_at
from seqc.streaming.demand import refuse
from seqc.streaming.derivation import Derivation
from seqc.streaming.double import Double
from seqc.streaming.regions import Region, chunk_of

aten = torch.ops.aten

_LARGEST_CHUNK = 1024
_MOST_CHOICES = 64
_HINT = "compute it step by step, or in chunks that may begin at any step, filled up by what changes no state"


@dataclass(frozen=True)
class Carried:
    """A first state: ``start``, which ``at`` reads as its carried value ``index``, or as what it puts in front.

    After the last step it is the result ``index`` of ``end``, or the last element of ``end`` along ``axis``.
    """

    at: fx.Node
    index: int
    start: fx.Node
    end: fx.Node
    axis: int | None = None


def carried(d: Derivation, region: Region) -> tuple[Carried, ...]:
    """The first states of a region. Raises NotCausal where it does not go on from them."""
    known: dict[Any, tuple[Region, tuple[Carried, ...]]] = d.shared("carried", dict)
    kind = kind_of(region)
    if kind not in known:
        known[kind] = region, _tried(d, region)
    alike, states = known[kind]
    own = dict(zip((*alike.inside, *alike.given), (*region.inside, *region.given), strict=True))
    return tuple(replace(c, at=own[c.at], start=own[c.start], end=own[c.end]) for c in states)


def kind_of(region: Region) -> Any:
    """What regions that compute the same of what they are given have in common; layers of a model are alike."""
    place: dict[Any, Any] = {n: ("given", i) for i, n in enumerate(region.given)}
    place |= {n: ("inside", i) for i, n in enumerate(region.inside)}

    def named(arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return repr(arg)
        if arg.op == "get_attr":
            return getattr(arg.graph.owning_module, str(arg.target)).code
        return str(_torch.size_expr(arg.meta["val"])) if is_size(arg) else place[arg]

    calls = [(str(n.target), str(pytree.tree_map(named, (n.args, dict(n.kwargs))))) for n in region.inside]
    given = [(str(n.meta["val"].shape), n.meta["val"].dtype) for n in region.given]
    return str((calls, given, [place[n] for n in region.exits]))


def _tried(d: Derivation, region: Region) -> tuple[Carried, ...]:
    where, size = region.exits[0], chunk_of(d, region)
    for node in region.given:
        if not d.is_fixed(node) and any(_torch.size_expr(node.meta["val"].shape[a]) != d.time for a in d.axes(node)):
            raise refuse(node, "it is read in chunks, but has not one element for each step of the sequence")
    if size > _LARGEST_CHUNK:
        raise refuse(where, f"a computation in chunks of {size} steps is too large to be tried", _HINT)
    choices = list(itertools.islice(itertools.product(*_candidates(d, region)), _MOST_CHOICES))
    found = [tuple(c for c in choice if c is not None) for choice in choices]
    for lengths in ((1, 1), (1, size), (size, 2), (size + 1, size + 1)):
        if found:
            found = _going_on(d, region, found, lengths)
    if not found:
        raise refuse(where, f"it computes in chunks of {size} steps, and not on from the end of a piece", _HINT)
    return found[0]


def is_same_in_ones(d: Derivation, region: Region, states: Sequence[Carried], chunk: int) -> bool:
    """Whether one step is the same where each number ``chunk`` is 1, as if chunks were no longer than it."""
    torch.manual_seed(0)
    ends = [(c.end, c.index, c.axis) for c in states]
    for before in (1, chunk + 1):
        given = {n: random_value(d, n, before + 1) for n in region.given}
        step = part(d, given, before, 1)
        try:
            _, after = _run(d, region, part(d, given, 0, before), before, {}, ends)
            starts = {(c.at, c.index): after[end] for c, end in zip(states, ends, strict=True)}
            wanted = _run(d, region, step, 1, starts, ends)
            got = _run(d, region, {n: v for n, v in step.items() if not is_computed(d, n)}, 1, starts, ends, chunk)
        except Exception:  # the number stands for something else too
            return False
        for one, other in zip(pytree.tree_leaves(wanted), pytree.tree_leaves(got), strict=True):
            if one.shape != other.shape or not bool((one - other).abs().max() <= 1e-6 * one.abs().max()):
                return False
    return True


def is_computed(d: Derivation, node: fx.Node) -> bool:
    """Whether a value is made of numbers alone: a mask within a chunk."""
    reads = [n for n in ancestors([node]) if not is_size(n)]
    return d.is_constant(node) and all(n.op == "call_function" for n in reads)


def _candidates(d: Derivation, region: Region) -> list[list[Carried | None]]:
    """For each first state, what it may be at the end; None: it is a constant and no state."""
    found: list[list[Carried | None]] = []
    for node in region.inside:
        if is_recurrence(node):
            loop = parts(node)
            over = isinstance(loop.trip, fx.Node) and d.has_time(loop.trip.meta["val"])
            for i, start in enumerate(loop.carries):
                if over and start not in d.timed and not d.axes(start):
                    found.append([Carried(node, i, start, node)])
        elif node.target is aten.cat.default:
            arg = named_args(node)
            start, axis = arg["tensors"][0], arg["dim"] % node.meta["val"].dim()
            if start not in d.timed and not d.axes(start) and start.meta["val"].shape[axis] == 1:
                found.append([*(Carried(node, 0, start, *end) for end in _ends(d, region, node, axis)), None])
    return found


def _ends(d: Derivation, region: Region, node: fx.Node, axis: int) -> list[tuple[fx.Node, int]]:
    """The values with as many elements along an axis as ``node``: what comes last first."""
    value = node.meta["val"]
    wanted = [_torch.size_expr(s) for s in value.shape]
    return [
        (n, axis)
        for n in reversed(region.inside)
        if isinstance(n.meta["val"], torch.Tensor)
        and n.meta["val"].dtype == value.dtype
        and [_torch.size_expr(s) for s in n.meta["val"].shape] == wanted
    ]


def _going_on(
    d: Derivation, region: Region, choices: Sequence[tuple[Carried, ...]], lengths: tuple[int, int]
) -> list[tuple[Carried, ...]]:
    """Those of the ``choices`` with which two pieces of these ``lengths`` give what the whole gives."""
    torch.manual_seed(0)
    count = sum(lengths)
    given = {n: random_value(d, n, count) for n in region.given}
    ends = {(c.end, c.index, c.axis) for choice in choices for c in choice}
    try:
        whole, _ = _run(d, region, given, count, {}, ())
        first, after = _run(d, region, part(d, given, 0, lengths[0]), lengths[0], {}, ends)
    except Exception:  # what does not run on a piece does not go on from one
        return []
    second = part(d, given, *lengths)
    found = []
    for choice in choices:
        starts = {(c.at, c.index): after[c.end, c.index, c.axis] for c in choice}
        try:
            rest, _ = _run(d, region, second, lengths[1], starts, ())
        except Exception:  # a choice of another shape
            continue
        if all(same(d, node, whole[node], first[node], rest[node]) for node in region.exits):
            found.append(choice)
    return found


def same(d: Derivation, node: fx.Node, whole: torch.Tensor, first: torch.Tensor, rest: torch.Tensor) -> bool:
    """Whether two pieces of ``node`` are the whole; where it has no steps, whether the second is."""
    over = d.axes(node)
    pieces = torch.cat([first, rest], over[0]) if over else rest
    return pieces.shape == whole.shape and bool(
        torch.isfinite(whole).all() and (pieces - whole).abs().max() <= 1e-6 * whole.abs().max()
    )


def _run(
    d: Derivation,
    region: Region,
    given: Mapping[fx.Node, Any],
    length: int,
    starts: Mapping[tuple[fx.Node, int], torch.Tensor],
    ends: Any,
    chunk: int = 1,
) -> tuple[dict[fx.Node, Any], dict[Any, torch.Tensor]]:
    at = d.at(length)
    values = Double(d.source.weights, at, given, starts, chunk)
    results = {n: values.value(n) for n in region.exits}
    after = {}
    for end, index, axis in ends:
        value = values.value(end)
        after[end, index, axis] = value[index] if axis is None else value.narrow(axis, value.shape[axis] - 1, 1)
    return results, after


def random_value(d: Derivation, node: fx.Node, length: int) -> Any:
    """Random numbers for ``node`` over a sequence of ``length``; its value where that does not depend on the sequence."""
    if node not in d.timed:
        return d.concrete(length).value(node)
    value = node.meta["val"]
    shape = shape_at(value, d.at(length))
    if not value.dtype.is_floating_point and not value.dtype.is_complex:
        return torch.randint(0, 2, shape).to(value.dtype)
    return torch.randn(shape, dtype=torch.complex128 if value.dtype.is_complex else torch.float64) / 4


def part(d: Derivation, given: Mapping[fx.Node, Any], start: int, count: int) -> dict[fx.Node, Any]:
    """``count`` steps of the values ``given``, from ``start`` on."""
    parts = dict(given)
    for node in given:
        for axis in d.axes(node):
            parts[node] = parts[node].narrow(axis, start, count)
    return parts
