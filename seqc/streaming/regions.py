"""Parts of a graph that compute in chunks of the sequence: between values with one element for each step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx
import sympy
import torch.fx as fx

from seqc import _torch
from seqc.dependence import ancestors, computed_from
from seqc.outside import is_size
from seqc.sizes import is_even
from seqc.streaming.derivation import Derivation


@dataclass(frozen=True)
class Region:
    """``inside``: nodes in order, which compute with chunks. ``given``: what they read, each of one element a step, or
    the same whatever the sequence. ``exits``: those of the inside that others read, or that are outputs. ``together``: what
    is computed from the inside and leads to it."""

    inside: tuple[fx.Node, ...]
    given: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]
    together: tuple[fx.Node, ...]


def regions(d: Derivation) -> list[Region]:
    """The regions of the source graph, which is put in an order that leaves each in one piece."""
    order = {n: i for i, n in enumerate(d.source.graph.nodes)}
    uneven = {n for n in d.timed if any(_is_uneven(d, leaf) for leaf in (n, *_items(n)))}
    near = nx.Graph([(n, n) for n in uneven])
    for node in d.timed:
        together = [n for n in (node, *node.all_input_nodes) if n in uneven]
        near.add_edges_from(itertools.pairwise(together))
    found = [_region(d, group, order) for group in nx.connected_components(near)]
    found.sort(key=lambda r: order[r.inside[0]])
    _in_one_piece(d, found, order)
    return found


def _items(node: fx.Node) -> list[fx.Node]:
    return [u for u in node.users if isinstance(node.meta["val"], (tuple, list))]


def _is_uneven(d: Derivation, node: fx.Node) -> bool:
    return any(not is_even(s, d.time) for s in getattr(node.meta["val"], "shape", ()))


def _region(d: Derivation, group: set[fx.Node], order: dict[fx.Node, int]) -> Region:
    between = computed_from(group) & ancestors(group)
    behind = {u for n in between for u in n.users if u in d.timed and u not in between}
    behind |= {item for n in behind for item in _items(n)}
    inside = {n for n in between | behind if not is_size(n)}
    # Masks over the chunks are no part of the sequence: each region computes its own.
    pending = list(inside)
    while pending:
        for n in pending.pop().all_input_nodes:
            if n not in inside and n not in d.timed and n in d.lengthy and not is_size(n) and _is_uneven(d, n):
                inside.add(n)
                pending.append(n)
    reads = {
        n for node in inside for n in node.all_input_nodes if n not in inside and n.op != "get_attr" and not is_size(n)
    }
    exits = {n for n in inside if n in d.timed and (n in behind or d.source.output_node in n.users) and not _items(n)}
    return Region(*(tuple(sorted(nodes, key=order.__getitem__)) for nodes in (inside, reads, exits, between | behind)))


def _in_one_piece(d: Derivation, found: Iterable[Region], order: dict[fx.Node, int]) -> None:
    owner = {n: -1 - i for i, region in enumerate(found) for n in region.together}
    graph = nx.DiGraph()
    for node in order:
        graph.add_node(owner.get(node, order[node]))
        for user in node.users:
            if owner.get(node, order[node]) != owner.get(user, order[user]):
                graph.add_edge(owner.get(node, order[node]), owner.get(user, order[user]))
    members: dict[int, list[fx.Node]] = {}
    for node in order:
        members.setdefault(owner.get(node, order[node]), []).append(node)
    for key in nx.lexicographical_topological_sort(graph, key=lambda k: order[members[k][0]]):
        for node in members[key]:
            if node.op != "output":
                d.source.output_node.prepend(node)


def chunk_of(d: Derivation, region: Region) -> int:
    """The largest number in a size of the region: the chunks are not longer."""
    sizes = {_torch.size_expr(s) for n in region.inside for s in getattr(n.meta["val"], "shape", ()) if d.has_time(s)}
    return max((abs(int(a)) for size in sizes for a in size.atoms(sympy.Integer)), default=1)
