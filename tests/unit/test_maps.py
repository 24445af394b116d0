"""The algebra of the linear maps that blocks of steps are: composing them is associative, and a scan over them exact."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from seqc.emit import Emitter
from seqc.lowerings.maps import Entries, Maps

COUNT, SIZE = 5, 3
STATES = 2


class Graph:
    """Maps written into a graph of their own, run on numbers."""

    def __init__(self, mixed: bool) -> None:
        self.mode = FakeTensorMode()
        self.graph = fx.Graph()
        self.output = self.graph.output(())
        self.emit = Emitter(fx.GraphModule({}, self.graph), self.mode)
        self.graph, self.output = self.emit.graph, self.emit.graph.output_node()
        self.maps, self.mixed = Maps(self.emit, mixed), mixed

    def placeholder(self, *shape: int) -> fx.Node:
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(f"p{len(self.graph.nodes)}")
        node.meta["val"] = self.mode.from_tensor(torch.empty(shape, dtype=torch.float64))
        return node

    def entries(self, blocks: int | None) -> Entries:
        shape = ((SIZE, SIZE) if self.mixed else (SIZE,)) if blocks is None else self._shape(blocks)
        return tuple(tuple(self.placeholder(*shape) for _ in range(STATES)) for _ in range(STATES))

    def _shape(self, blocks: int) -> tuple[int, ...]:
        return (blocks, SIZE, SIZE) if self.mixed else (blocks, SIZE)

    def run(self, results: list[fx.Node], values: dict[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
        self.output.args = (tuple(results),)
        self.graph.lint()
        given = [values[n] for n in self.graph.nodes if n.op == "placeholder"]
        return list(fx.Interpreter(self.emit.gm).run(*given))


def numbers(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Small integers, so that sums of products are exact in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).double()


def drawn(nodes: list[fx.Node], seed: int) -> dict[fx.Node, torch.Tensor]:
    return {n: numbers(seed + i, tuple(n.meta["val"].shape)) for i, n in enumerate(nodes)}


@pytest.mark.parametrize("mixed", [False, True])
def test_composing_maps_is_associative(mixed: bool) -> None:
    written = Graph(mixed)
    a, b, c = (written.entries(1) for _ in range(3))
    with written.emit.before(written.output):
        left = written.maps.product(written.maps.product(a, b), c)
        right = written.maps.product(a, written.maps.product(b, c))
    nodes = [n for entries in (a, b, c) for row in entries for n in row]
    results = [n for entries in (left, right) for row in entries for n in row if n is not None]

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 10**6))
    def check(seed: int) -> None:
        found = written.run(results, drawn(nodes, seed))
        for x, y in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
            assert torch.equal(x, y)

    check()


@pytest.mark.parametrize(("mixed", "constant", "reverse"), itertools.product((False, True), repeat=3))
def test_a_scan_gives_the_states_in_front_of_each_block(mixed: bool, constant: bool, reverse: bool) -> None:
    written = Graph(mixed)
    entries = written.entries(None if constant else COUNT)
    added = [written.placeholder(COUNT, SIZE) for _ in range(STATES)]
    first = [written.placeholder(SIZE) for _ in range(STATES)]
    with written.emit.before(written.output):
        states = written.maps.entering(entries, constant, added, first, COUNT, 100, reverse)
    values = drawn([*(n for row in entries for n in row), *added, *first], 7)
    found = written.run(states, values)
    h = [values[n] for n in first]
    for k in reversed(range(COUNT)) if reverse else range(COUNT):
        for state, entering in zip(h, found, strict=True):
            assert torch.equal(entering[k], state)
        maps = [[values[n] if constant else values[n][k] for n in row] for row in entries]
        applied = [[m @ s if mixed else m * s for m, s in zip(row, h, strict=True)] for row in maps]
        h = [sum(row, values[b][k]) for row, b in zip(applied, added, strict=True)]
