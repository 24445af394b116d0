"""Operations of which none treats each step by itself, but which do so together: tokens sorted by expert, and back.

Between a value that all of them are computed from and what is wanted of them, the steps may be in any order. Whether each is
treated by itself is tried, as of one operation (:mod:`seqc.streaming.commutes`), in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import networkx as nx
import sympy
import torch
import torch.fx as fx

from seqc import _torch
from seqc.dependence import ancestors, computed_from
from seqc.outside import is_size
from seqc.streaming.commutes import LENGTH, PARTS, close, narrow
from seqc.streaming.concrete import shape_at
from seqc.streaming.copied import Copy, as_in_the_model
from seqc.streaming.demand import Demand, Plan
from seqc.streaming.derivation import Derivation
from seqc.streaming.double import Double
from seqc.streaming.regions import Region

_FARTHEST = 6
_LARGEST = 128

Inner = Callable[[Derivation, fx.Node], int | None]
"""How many elements of each step lie together in the axis over time of a node; None where none fits."""


def together(
    d: Derivation, node: fx.Node, demand: Demand, others: Mapping[sympy.Symbol, int], inner: Inner
) -> Plan | None:
    """``node`` for the newest steps from those of a value that it is computed from; None where no such value is found.

    ``others`` are small sizes of the other dimensions.
    """
    if (
        node not in d.timed
        or len(d.axes(node)) != 1
        or not d.is_newest(node, demand)
        or not isinstance(node.meta["val"], torch.Tensor)
    ):
        return None
    for region in _regions(d, node):
        if _treats_each_step(d, region, others, inner):
            break
    else:
        return None

    def write(*new: fx.Node) -> fx.Node:
        given = dict(zip(region.given, new, strict=True))
        return as_in_the_model(d, node, Copy(d, region, d.time, {}).write(region.inside, given)[node])

    return Plan(tuple((n, d.newest(n)) for n in region.given), write)


def _regions(d: Derivation, node: fx.Node) -> Iterator[Region]:
    """Between ``node`` and each value that all of its sequence passes through, which is the first given; the nearest first."""
    timed = nx.DiGraph((n, user) for n in d.timed for user in n.users if user in d.timed)
    root = "inputs"
    timed.add_edges_from((root, n) for n in d.timed if not any(o in d.timed for o in n.all_input_nodes))
    nearest = nx.immediate_dominators(timed, root)
    entry = node
    for _ in range(_FARTHEST):
        entry = nearest[entry]
        if entry == root:
            return
        among = (computed_from([entry]) - {entry}) & ancestors([node]) | {node}
        among |= _of_the_length(d, among)
        inside = [n for n in d.source.graph.nodes if n in among and not is_size(n)]
        if len(inside) > _LARGEST:
            return
        reads = [
            n for i in inside for n in i.all_input_nodes if n not in inside and not is_size(n) and n.op != "get_attr"
        ]
        given = tuple(dict.fromkeys([entry, *reads]))
        if all(n is entry or d.is_fixed(n) for n in given):
            yield Region(tuple(inside), given, (node,), ())


def _of_the_length(d: Derivation, among: Iterable[fx.Node]) -> set[fx.Node]:
    """What nodes read that depends on the length alone, masks and numbers of places: it is made anew."""
    found: set[fx.Node] = set()
    pending = list(among)
    while pending:
        new = {
            n for n in pending.pop().all_input_nodes if n in d.lengthy and n not in d.timed and not is_size(n)
        } - found
        found |= new
        pending += new
    return found


def _treats_each_step(d: Derivation, region: Region, others: Mapping[sympy.Symbol, int], inner: Inner) -> bool:
    entry, node = region.given[0], region.exits[0]
    own = inner(d, entry) if len(d.axes(entry)) == 1 and isinstance(entry.meta["val"], torch.Tensor) else None
    if own is None or not entry.meta["val"].dtype.is_floating_point:
        return False
    at = {**others, d.time: LENGTH}
    torch.manual_seed(0)
    whole = torch.randn(shape_at(entry.meta["val"], at), dtype=torch.float64)

    def value(steps: torch.Tensor, count: int) -> torch.Tensor:
        found: torch.Tensor = Double(d.source.weights, {**at, d.time: count}, {entry: steps}, {}).value(node)
        return found

    ((axis,), (out,)) = d.axes(entry), d.axes(node)
    try:
        wanted = value(whole, LENGTH)
        found = [(bounds, value(narrow(whole, axis, bounds, own), bounds[1] - bounds[0])) for bounds in PARTS]
    except Exception:  # operations that do not run on a part do not treat each step by itself
        return False
    each = _torch.size_expr(node.meta["val"].shape[out]).subs({**others, d.time: 1})
    return any(
        all(_is_same(part, narrow(wanted, out, bounds, int(lying))) for bounds, part in found)
        for lying in sympy.divisors(each)
    )


def _is_same(part: torch.Tensor, wanted: torch.Tensor) -> bool:
    return part.shape == wanted.shape and close(part, wanted)
