"""FuseFlips: a scan between flips of time walks it from the end, and nothing is flipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from seqc.mirror import SHAPES, Mixed, is_scan, mirrored_axis, turned
from seqc.program import Program, place_of
from seqc.rewrite import remove_dead_code, replace_node

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseFlips:
    """Turns scans of which every operand is flipped in time, and every result is flipped back.

        y = flip(scan(linear(flip(x, [1]))), [1])    ->    y = reverse scan(linear(x))

    What lies between the flips must make the reversed of its result of reversed operands: operations on each element,
    projections and reductions along other axes, permutations, scans. Final states need no flip. Where one value between the
    flips is read otherwise, all stays as it is.

    ``tolerance``: rows of a matrix product come in another order.
    """

    name: ClassVar[str] = "fuse_flips"
    tolerance: ClassVar[float] = 1e-6

    def __call__(self, program: Program) -> int:
        changes = 0
        for gm in program.graph_modules():
            for region in _regions(gm.graph):
                changes += _turn(program, region)
        if changes:
            remove_dead_code(program)
        return changes


class _Region:
    """What is computed from flips of the same steps, up to where they are flipped back."""

    def __init__(self) -> None:
        self.entries: list[fx.Node] = []
        self.exits: list[fx.Node] = []
        self.scans: list[fx.Node] = []
        self.refused: str | None = None

    def take(self, other: _Region) -> None:
        self.entries += other.entries
        self.exits += other.exits
        self.scans += other.scans
        self.refused = self.refused or other.refused


def _regions(graph: fx.Graph) -> list[_Region]:
    read = _read(graph)
    mirrored: dict[fx.Node, int] = {}
    region_of: dict[fx.Node, _Region] = {}
    for node in graph.nodes:
        if node not in read or (node.target in SHAPES and node.op == "call_function"):
            continue
        sources = [x for x in node.all_input_nodes if x in mirrored]
        axis = _flipped_axis(node)
        if not sources:
            if axis is not None:
                region = region_of[node] = _Region()
                region.entries.append(node)
                mirrored[node] = axis
            continue
        region = _merged([region_of[x] for x in sources], region_of)
        if axis is not None and axis == mirrored[sources[0]]:
            region.exits.append(node)
            continue
        if is_scan(node):
            region.scans.append(node)
        try:
            if node.op == "output":
                raise Mixed("is the output")
            result = mirrored[sources[0]] if axis is not None else mirrored_axis(node, mirrored)
        except Mixed as reason:
            region.refused = region.refused or f"{node.target} at {place_of(node)} {reason}"
            continue
        if result is not None:
            mirrored[node], region_of[node] = result, region
    return list(dict.fromkeys(region_of.values()))


def _flipped_axis(node: fx.Node) -> int | None:
    """The axis along which ``node`` flips its operand; None where it does not, or along several."""
    if node.target is not aten.flip.default:
        return None
    dims = node.args[1]
    return int(dims[0]) % node.meta["val"].dim() if len(dims) == 1 else None  # type: ignore[arg-type, index]


def _merged(regions: list[_Region], region_of: dict[fx.Node, _Region]) -> _Region:
    first, *others = dict.fromkeys(regions)
    for other in others:
        first.take(other)
        for node in [n for n, r in region_of.items() if r is other]:
            region_of[node] = first
    return first


def _read(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of whose result more than the shape is read."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or any(u in found and u.target not in SHAPES for u in node.users):
            found.add(node)
    return found


def _turn(program: Program, region: _Region) -> bool:
    if not region.scans:
        return False
    if region.refused:
        reason = f"flips around it stay: {region.refused}"
        program.reasons += [f"{place_of(scan)}: {reason}" for scan in region.scans]
        return False
    for scan in region.scans:
        scan.args, scan.kwargs = turned(scan), {}
        program.reasons.append(f"{place_of(scan)}: walks time the other way, so that its operands need no flip")
    for flip in [*region.entries, *region.exits]:
        replace_node(flip, flip.args[0])  # type: ignore[arg-type]
    return True
