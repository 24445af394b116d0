"""What a computation in chunks has to carry from one piece of the sequence to the next: found by trying it.

Two pieces, the second from what the first left, have to give what the whole gives: in float64, on random numbers, with
pieces shorter and longer than the chunks and boundaries between pieces inside of chunks and between them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from seqc import _torch
from seqc.ops.recurrence import is_recurrence, parts
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
    where, size = region.exits[0], chunk_of(d, region)
    for node in region.given:
        if not d.is_fixed(node) and any(_torch.size_expr(node.meta["val"].shape[a]) != d.time for a in d.axes(node)):
            raise refuse(node, "it is read in chunks, but has not one element for each step of the sequence")
    if size > _LARGEST_CHUNK:
        raise refuse(where, f"a computation in chunks of {size} steps is too large to be tried", _HINT)
    choices = list(itertools.islice(itertools.product(*_candidates(d, region)), _MOST_CHOICES))
    found = [tuple(c for c in choice if c is not None) for choice in choices]
    for lengths in ((1, 1), (1, size), (size - 1, size + 2), (size, size), (size + 1, 2 * size + 1), (2 * size, 1)):
        if min(lengths) > 0 and found:
            found = _going_on(d, region, found, lengths)
    if not found:
        raise refuse(where, f"it computes in chunks of {size} steps, and not on from the end of a piece", _HINT)
    return found[0]


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
    given = {n: _random(d, n, count) for n in region.given}
    ends = {(c.end, c.index, c.axis) for choice in choices for c in choice}
    try:
        whole, _ = _run(d, region, given, count, {}, ())
        first, after = _run(d, region, _part(d, given, 0, lengths[0]), lengths[0], {}, ends)
    except Exception:  # what does not run on a piece does not go on from one
        return []
    second = _part(d, given, *lengths)
    found = []
    for choice in choices:
        starts = {(c.at, c.index): after[c.end, c.index, c.axis] for c in choice}
        try:
            rest, _ = _run(d, region, second, lengths[1], starts, ())
        except Exception:  # a choice of another shape
            continue
        if all(_same(d, node, whole[node], first[node], rest[node]) for node in region.exits):
            found.append(choice)
    return found


def _same(d: Derivation, node: fx.Node, whole: torch.Tensor, first: torch.Tensor, rest: torch.Tensor) -> bool:
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
) -> tuple[dict[fx.Node, Any], dict[Any, torch.Tensor]]:
    at = {**d.at(length)}
    values = Double(d.source.weights, at, given, starts)
    results = {n: values.value(n) for n in region.exits}
    after = {}
    for end, index, axis in ends:
        value = values.value(end)
        after[end, index, axis] = value[index] if axis is None else value.narrow(axis, value.shape[axis] - 1, 1)
    return results, after


def _random(d: Derivation, node: fx.Node, length: int) -> Any:
    if node not in d.timed:
        return d.concrete(length).value(node)
    value = node.meta["val"]
    shape = shape_at(value, d.at(length))
    if not value.dtype.is_floating_point and not value.dtype.is_complex:
        return torch.randint(0, 2, shape).to(value.dtype)
    return torch.randn(shape, dtype=torch.complex128 if value.dtype.is_complex else torch.float64) / 4


def _part(d: Derivation, given: Mapping[fx.Node, Any], start: int, count: int) -> dict[fx.Node, Any]:
    parts = dict(given)
    for node in given:
        for axis in d.axes(node):
            parts[node] = parts[node].narrow(axis, start, count)
    return parts
