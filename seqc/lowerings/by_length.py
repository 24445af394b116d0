"""The choice between two forms by the number of steps, made in the graph: short sequences skip what long ones pay for.

A form that prepares chunks, masks or layouts costs several times a step where there is only one (measured on ONNX Runtime's
CPU provider by ``python -m tests.benchmarks.scans --lengths 1``: ``chunked`` linear attention 2.5 to 2.8 times the best
form, ``contrib`` softmax_scan 1.8, ``native`` GRU 1.3). So such forms come with ``single``, the step written directly.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
import torch.fx as fx

from seqc.dependence import ancestors
from seqc.emit import Emitter
from seqc.lowerings.base import Lowering
from seqc.ops.choose import choose
from seqc.outside import is_pure
from seqc.program import named_args

aten = torch.ops.aten

SHORT = 1
"""The largest number of steps for which ``single`` is taken."""


def by_length(emit: Emitter, node: fx.Node, form: Lowering, weights: Iterable[fx.Node]) -> list[fx.Node]:
    """``form`` of ``node``, or, where there are few steps, its ``single``. Raises Refused as ``form`` does."""
    assert form.single is not None
    steps = named_args(node)[form.timed]
    trip = steps.meta["val"].shape[0]
    if isinstance(trip, int):
        return (form.single if trip <= SHORT else form.write)(emit, node)
    read = sorted({int(reader.args[1]) for reader in node.users})  # type: ignore[arg-type]
    size = emit(aten.sym_size.int, steps, 0)
    mark = emit.mark()
    long = form.write(emit, node)
    long_body = _Body(emit, mark, [long[i] for i in read], weights)
    mark = emit.mark()
    short = form.single(emit, node)
    short_body = _Body(emit, mark, [short[i] for i in read], weights)
    operands = list(dict.fromkeys([*short_body.operands, *long_body.operands]))
    values = [long[i].meta["val"] for i in read]
    attrs = [body.attach(operands) for body in (short_body, long_body)]
    call = emit.written(choose, (*attrs, size, SHORT, tuple(operands)), tuple(values))
    found = {i: emit(operator.getitem, call, at) for at, i in enumerate(read)}
    return [found.get(i, steps) for i in range(len(long))]  # nothing reads the others


class _Body:
    """What was written since ``mark`` and ``results`` are computed from, to become a graph of its own.

    What is computed from weights and literals alone stays outside: it is known at compile time, and no branch holds it.
    """

    def __init__(self, emit: Emitter, mark: int, results: list[fx.Node], weights: Iterable[fx.Node]) -> None:
        self.emit, self.results = emit, results
        needed, fixed = ancestors(results), set(weights)
        for node in emit.graph.nodes:
            if node.op == "call_function" and is_pure(node) and all(a in fixed for a in node.all_input_nodes):
                fixed.add(node)
        self.nodes = [n for n in emit.since(mark) if n in needed and n not in fixed]
        inside = set(self.nodes)
        read = [*(a for n in self.nodes for a in n.all_input_nodes), *results]
        self.operands = [n for n in dict.fromkeys(read) if n not in inside and n.op != "get_attr"]

    def attach(self, operands: list[fx.Node]) -> fx.Node:
        """Move the nodes into a child graph with these inputs; returns the node that reads it."""
        graph = fx.Graph()
        body = fx.GraphModule({}, graph)
        known: dict[fx.Node, fx.Node] = {}
        for outer in operands:
            known[outer] = graph.placeholder(outer.name)
            known[outer].meta["val"] = outer.meta["val"]
        for node in self.nodes:
            for attr in (a for a in node.all_input_nodes if a.op == "get_attr" and a not in known):
                body.add_submodule(str(attr.target), self.emit.gm.get_submodule(str(attr.target)))
                known[attr] = graph.get_attr(str(attr.target))
            known[node] = graph.node_copy(node, known.__getitem__)
        graph.output((*(known[r] for r in self.results),))
        body.recompile()
        return self._read(body)

    def _read(self, body: fx.GraphModule) -> fx.Node:
        gm = self.emit.gm
        name = next(f"choice_{i}" for i in range(10**6) if not hasattr(gm, f"choice_{i}"))
        gm.add_submodule(name, body)
        return self.emit.graph.get_attr(name)
