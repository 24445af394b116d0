"""The choice between two forms by the number of steps, made in the graph: short sequences skip what long ones pay for.

A form that prepares chunks, masks or layouts costs several times a step where there is only one: on ONNX Runtime's CPU
provider ``chunked`` linear attention 2.6 times the best form (``python -m tests.benchmarks.scans --lengths 1``); the choice
itself takes 8 µs. So such a form names those that are taken for few steps, and how many that is. Where the number is known
when the model is compiled, only one form is written.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import torch
import torch.fx as fx

from seqc.dependence import ancestors
from seqc.emit import Emitter
from seqc.lowerings.base import Lowering, Refused
from seqc.ops.choose import choose
from seqc.ops.recurrence import is_recurrence
from seqc.outside import is_pure
from seqc.program import named_args
from seqc.rewrite import result_index

aten = torch.ops.aten


def by_length(
    emit: Emitter,
    node: fx.Node,
    form: Lowering,
    others: Mapping[Lowering, int],
    weights: Iterable[fx.Node],
    single_steps: bool,
) -> tuple[list[fx.Node], str]:
    """``form`` of ``node``, or for few steps the first of ``others`` that takes it, each given with the number of steps up to
    which it is faster; and what is said of that one, empty where none does. Where that is a loop, ``single_steps`` are
    written without it; there has to be at least one step then. Raises Refused as ``form`` does.
    """
    steps = named_args(node)[form.timed]
    trip = steps.meta["val"].shape[0]
    if isinstance(trip, int):
        others = {few: most for few, most in others.items() if trip <= most}
    if not others:
        return _written(form, emit, node), ""
    read = sorted({result_index(reader) for reader in node.users})
    mark = emit.mark()
    long = _written(form, emit, node)
    middle = emit.mark()

    def choice(short: list[fx.Node], written: list[fx.Node], most: int, otherwise: list[fx.Node]) -> list[fx.Node]:
        """``short``, results of the nodes ``written``, for at most ``most`` steps, else ``otherwise``."""
        size = emit(aten.sym_size.int, steps, 0)
        rest = [n for n in emit.since(mark) if n is not size and n not in set(written)]
        bodies = [
            _Body(nodes, [found[i] for i in read], weights) for nodes, found in ((written, short), (rest, otherwise))
        ]
        operands = list(dict.fromkeys(n for body in bodies for n in body.operands))
        attrs = [body.attach(emit, operands) for body in bodies]
        call = emit.written(
            choose, (*attrs, size, most, tuple(operands)), tuple(otherwise[i].meta["val"] for i in read)
        )
        found = {i: emit(operator.getitem, call, at) for at, i in enumerate(read)}
        return [found.get(i, steps) for i in range(len(long))]  # nothing reads the others

    for few, most in others.items():
        try:
            with emit.at_most(most):
                short = _written(few, emit, node)
        except Refused:
            emit.undo(middle)
            continue
        if isinstance(trip, int):
            return short, f"{few.name} for at most {most} steps"
        written = emit.since(middle)
        results = choice(short, written, most, long)
        if single_steps and any(map(is_recurrence, written)):
            before = emit.mark()
            with emit.at_most(1):
                single = _written(few, emit, node)
            results = choice(single, emit.since(before), 1, results)
        return results, f"{few.name} for at most {most} steps"
    return long, ""


def _written(form: Lowering, emit: Emitter, node: fx.Node) -> list[fx.Node]:
    results = form.write(emit, node)
    assert results is not None, f"{form.name} leaves its node as it is, which is no form for some lengths"
    return results


class _Body:
    """What of the nodes ``written`` ``results`` are computed from, to become a graph of its own.

    What is computed from weights and literals alone stays outside: it is known at compile time, and no branch holds it.
    """

    def __init__(self, written: list[fx.Node], results: list[fx.Node], weights: Iterable[fx.Node]) -> None:
        self.results = results
        needed, fixed = ancestors(results), set(weights)
        for node in results[0].graph.nodes:
            if node.op == "call_function" and is_pure(node) and all(a in fixed for a in node.all_input_nodes):
                fixed.add(node)
        self.nodes = [n for n in written if n in needed and n not in fixed]
        inside = set(self.nodes)
        read = [*(a for n in self.nodes for a in n.all_input_nodes), *results]
        self.operands = [n for n in dict.fromkeys(read) if n not in inside and n.op != "get_attr"]

    def attach(self, emit: Emitter, operands: list[fx.Node]) -> fx.Node:
        """Move the nodes into a child graph with these inputs; returns the node that reads it."""
        graph = fx.Graph()
        body = fx.GraphModule({}, graph)
        known: dict[fx.Node, fx.Node] = {}
        for outer in operands:
            known[outer] = graph.placeholder(outer.name)
            known[outer].meta["val"] = outer.meta["val"]
        for node in self.nodes:
            for attr in (a for a in node.all_input_nodes if a.op == "get_attr" and a not in known):
                body.add_submodule(str(attr.target), emit.gm.get_submodule(str(attr.target)))
                known[attr] = graph.get_attr(str(attr.target))
            known[node] = graph.node_copy(node, known.__getitem__)
        graph.output((*(known[r] for r in self.results),))
        body.recompile()
        name = next(f"choice_{i}" for i in range(10**6) if not hasattr(emit.gm, f"choice_{i}"))
        emit.gm.add_submodule(name, body)
        return emit.graph.get_attr(name)
