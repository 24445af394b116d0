"""What a pass is, and small graph edits that passes share."""

from __future__ import annotations

import itertools
from typing import ClassVar, Protocol, runtime_checkable

import torch.fx as fx

from seqc.program import Program


@runtime_checkable
class Pass(Protocol):
    """A rewrite of a Program: a frozen dataclass whose fields are its options.

    ``tolerance`` is 0.0 for a pass whose result is bitwise equal, else the largest relative change it may cause, which its
    docstring justifies. Calling it edits the Program in place and returns the number of changes made; the Program is valid
    before and after. What it recognised or refused, and why, it appends to ``program.reasons``.
    """

    name: ClassVar[str]
    tolerance: ClassVar[float]

    def __call__(self, program: Program) -> int: ...


def result_index(reader: fx.Node) -> int:
    """Which result of a node with several a getitem reads."""
    return int(reader.args[1])  # type: ignore[arg-type]


def replace_node(node: fx.Node, value: fx.Node) -> None:
    """Let ``value`` serve every user of ``node``, and remove ``node``."""
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def remove_dead_code(program: Program) -> int:
    """Remove pure nodes without users, in bodies too; weights and bodies that nothing reads go with them."""
    removed = 0
    for gm in reversed(list(program.graph_modules())):
        for node in reversed(list(gm.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                gm.graph.erase_node(node)
                removed += 1
    for node in program.weight_nodes:
        if not node.users:
            del program.weights[node.name]
            program.weight_names.pop(node.name, None)
            program.graph.erase_node(node)
    for gm in list(program.graph_modules()):
        drop_unread_bodies(gm)
        gm.recompile()
    return removed


def drop_unread_bodies(gm: fx.GraphModule) -> None:
    """Remove children that no node of ``gm`` itself reads; those of nested bodies stay theirs."""
    read = {str(n.target).split(".")[0] for n in gm.graph.nodes if n.op == "get_attr"}
    for name, _ in list(gm.named_children()):
        if name not in read:
            delattr(gm, name)


def copy_meta(source: fx.Node, target: fx.Node) -> fx.Node:
    """Give ``target`` the provenance of ``source``."""
    for key in ("stack_trace", "nn_module_stack"):
        if key in source.meta:
            target.meta[key] = source.meta[key]
    return target


def sort_topologically(graph: fx.Graph) -> None:
    """Move nodes so that each comes after its inputs, otherwise keeping their order."""
    placed: set[fx.Node] = set()
    order: list[fx.Node] = []
    for root in graph.nodes:
        stack = [root]
        while stack:
            node = stack[-1]
            waiting = [] if node in placed else [n for n in node.all_input_nodes if n not in placed]
            if waiting:
                stack.extend(reversed(waiting))
                continue
            stack.pop()
            if node not in placed:
                placed.add(node)
                order.append(node)
    for before, after in itertools.pairwise(order):
        before.append(after)
