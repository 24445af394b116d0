"""SplitRecurrence: layers that run inside one loop become a loop each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
import torch.fx as fx

from seqc.batch import Value, is_projection
from seqc.emit import Emitter
from seqc.loop import Loop
from seqc.memory import node_bytes
from seqc.ops.recurrence import is_recurrence
from seqc.outside import is_size
from seqc.passes.loop_cleanup import clean
from seqc.program import Program, place_of
from seqc.rewrite import remove_dead_code
from seqc.write_loop import write_loop


@dataclass(frozen=True)
class SplitRecurrence:
    """Splits a loop where a projection leads from some carries to others that they do not depend on.

        for t: a = f(a, x[t]); b = g(b, W @ a); y[t] = b
    ->  for t: a = f(a, x[t]); u[t] = a
        for t: b = g(b, W @ u[t]); y[t] = b

    The projection, once per step before, can then be computed for all steps at once (Hoist), and each layer is
    recognised for itself. What one loop hands to the next is kept for all steps: at most ``max_growth`` times what the
    loop reads and writes in each step already.

    ``tolerance``: the same operations on the same numbers, but a matrix product may differ in its last bit where its rows
    lie elsewhere in memory.
    """

    max_growth: float = 4.0

    name: ClassVar[str] = "split_recurrence"
    tolerance: ClassVar[float] = 1e-6

    def __call__(self, program: Program) -> int:
        changes = 0
        for gm in program.graph_modules():
            for node in [n for n in gm.graph.nodes if is_recurrence(n)]:
                changes += self._loop(Loop(gm, node, program.fake_mode), program)
        if changes:
            remove_dead_code(program)
        return changes

    def _loop(self, loop: Loop, program: Program) -> int:
        loop.sync()
        stages = _Stages(loop)
        if stages.count < 2:
            return 0
        if clean(loop):  # sizes are then those of a carry
            stages = _Stages(loop)
        where = place_of(loop.node, "a loop")
        crossing = stages.crossing()
        kept = node_bytes(crossing)
        allowed = self.max_growth * node_bytes([*(inner for _, inner in loop.xs), *loop.ys])
        if kept > allowed:
            program.reasons.append(
                f"{where}: {stages.count} layers stay one loop: between them {kept} bytes would be kept for each step"
            )
            return 0
        if any(n.op == "get_attr" for n in loop.body.graph.nodes):
            program.reasons.append(f"{where}: {stages.count} layers stay one loop: there is a loop inside")
            return 0
        with loop.emit.before(loop.node):
            _Writer(loop, stages, crossing).run()
        program.reasons.append(f"{where}: {stages.count} layers in one loop become a loop each")
        return stages.count - 1


class _Stages:
    """Which of the loops-to-be computes each value of a body.

    Values that depend on each other from step to step are in one. The stage of a value is the largest of those of its
    operands, and one more behind a projection between two groups of carries. What depends on no carry has no stage
    (None): each loop that needs it computes it.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.of: dict[fx.Node, int | None] = {}
        carries = [inner for _, inner in loop.carries]
        graph = nx.DiGraph()
        graph.add_nodes_from(loop.body.graph.nodes)
        graph.add_edges_from((arg, node) for node in loop.body.graph.nodes for arg in node.all_input_nodes)
        graph.add_edges_from(zip(loop.next_carries, carries, strict=True))
        graph.remove_node(loop.body.graph.output_node())
        condensed = nx.condensation(graph)
        feeding = {n for c in carries for n in nx.ancestors(graph, c)}
        invariants = {inner for _, inner in loop.invariants}
        for component in nx.topological_sort(condensed):
            members = condensed.nodes[component]["members"]
            cyclic = any(c in members for c in carries)
            before = [self.of[n] for p in condensed.predecessors(component) for n in condensed.nodes[p]["members"]]
            stage = max((s for s in before if s is not None), default=0 if cyclic else None)
            (node, *_) = members
            if stage is not None and not cyclic and node in feeding and _projects(node, invariants):
                stage += 1
            self.of |= dict.fromkeys(members, stage)
        self.count = 1 + max((s for s in self.of.values() if s is not None), default=0)

    def crossing(self) -> list[fx.Node]:
        """The values of one stage that a later one reads, in order."""
        loop = self.loop
        found: dict[fx.Node, None] = {}
        for node in loop.operations():
            for arg in node.all_input_nodes:
                stage, own = self.of[arg], self.of[node]
                if stage is not None and own is not None and stage < own and not is_size(arg):
                    found[arg] = None
        return list(found)


def _projects(node: fx.Node, invariants: set[fx.Node]) -> bool:
    args = tuple(Value(a, a not in invariants) for a in node.args if isinstance(a, fx.Node))
    return node.op == "call_function" and is_projection(args, node.target)


class _Writer:
    """Writes the loops, each where ``loop.emit`` stands, and lets what read the old loop read them."""

    def __init__(self, loop: Loop, stages: _Stages, crossing: list[fx.Node]) -> None:
        self.loop, self.stages, self.crossing = loop, stages, crossing
        self.outer: dict[fx.Node, fx.Node] = {}
        """The values of all steps [trip, ...] that stages have written."""

    def run(self) -> None:
        for stage in range(self.stages.count):
            self._write(stage)
        self.loop.commit()

    def _write(self, stage: int) -> None:
        loop, of = self.loop, self.stages.of
        mine = [i for i, (_, inner) in enumerate(loop.carries) if of[inner] == stage]
        last = self.stages.count - 1
        results = [
            i
            for i, (value, _) in enumerate(loop.results)
            if i in mine or (i >= len(loop.carries) and (of[value] == stage or (of[value] is None and stage == last)))
        ]
        handed = [n for n in self.crossing if of[n] == stage]
        wanted = list(dict.fromkeys([*(loop.results[i][0] for i in results if i not in mine), *handed]))
        needed = self._needed([*(loop.next_carries[i] for i in mine), *wanted])
        xs = [(outer, inner) for outer, inner in loop.xs if inner in needed]
        xs += [(self.outer[n], n) for n in self.crossing if n in needed and n in self.outer]
        invariants = [(outer, inner) for outer, inner in loop.invariants if inner in needed]
        # Of another stage's carry only the sizes can be needed: its initial value has them too.
        invariants += [pair for i, pair in enumerate(loop.carries) if pair[1] in needed and i not in mine]
        invariants = [(outer, inner) for outer, inner in invariants if inner not in self.outer]
        carried = [loop.carries[i] for i in mine]

        def step(
            emit: Emitter, carries: list[fx.Node], per_step: list[fx.Node], same: list[fx.Node]
        ) -> tuple[list[fx.Node], list[fx.Node]]:
            inputs = (*carried, *xs, *invariants)
            known = {inner: new for (_, inner), new in zip(inputs, (*carries, *per_step, *same), strict=True)}
            for node in loop.operations():
                if node in needed and node not in known:
                    known[node] = emit.graph.node_copy(node, known.__getitem__)
            return [known[loop.next_carries[i]] for i in mine], [known[value] for value in wanted]

        first, steps, same = ([outer for outer, _ in group] for group in (carried, xs, invariants))
        written = write_loop(loop.emit, step, loop.trip, first, steps, same, loop.reverse)
        finals, ys = written[: len(mine)], dict(zip(wanted, written[len(mine) :], strict=True))
        self.outer |= {n: ys[n] for n in handed}
        for i, new in [
            *zip(mine, finals, strict=True),
            *((i, ys[loop.results[i][0]]) for i in results if i not in mine),
        ]:
            value, reader = loop.results[i]
            if reader is not None:
                reader.replace_all_uses_with(new)
                loop.gm.graph.erase_node(reader)
                loop.results[i] = (value, None)

    def _needed(self, wanted: Iterable[fx.Node]) -> set[fx.Node]:
        """``wanted`` and what they are computed from, down to what earlier loops hand over."""
        found: set[fx.Node] = set()
        pending = list(wanted)
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending += [] if node in self.outer else node.all_input_nodes
        return found
