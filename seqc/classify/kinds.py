"""What a state that stays in its loop computes: affine or not, and which of its elements depend on which."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx
import torch
import torch.fx as fx

from seqc.classify.forms import Form, NotMultilinear
from seqc.classify.terms import Terms
from seqc.dependence import ancestors
from seqc.loop import Loop
from seqc.verify import same_shape


def kind_of(loop: Loop, index: int) -> str:
    """What carry ``index`` computes together with those that depend on it as it does on them, in words.

    One of: affine, element by element (several states: in blocks of one element of each, as complex numbers are); affine,
    with elements mixed; not linear, element by element; not linear.
    """
    group = coupled(loop, index)
    several = f", {len(group)} coupled states" if len(group) > 1 else ""
    terms = Terms(loop.body, [loop.carries[i][1] for i in group], loop.emit.mode)
    try:
        forms = [terms.form(loop.next_carries[i]) for i in group]
        return f"affine, {'each element by itself' if _diagonal(terms, forms) else 'with elements mixed'}{several}"
    except NotMultilinear:
        return f"not linear, {'each element by itself' if _pointwise(loop, group) else 'with elements mixed'}{several}"
    finally:
        terms.emit.undo(0)


def kinds_of(node: fx.Node) -> str:
    """What each group of states of a recurrence computes, in words."""
    loop = Loop(node.graph.owning_module, node, None)  # type: ignore[arg-type]
    return "; ".join(dict.fromkeys(kind_of(loop, group[0]) for group in groups(loop))) or "without a state"


def coupled(loop: Loop, index: int) -> list[int]:
    """The carries that depend, from step to step, on carry ``index`` and it on them."""
    (group,) = [g for g in groups(loop) if index in g]
    return group


def groups(loop: Loop) -> list[list[int]]:
    """The carries in groups that depend on each other from step to step; each group after those that it depends on."""
    inner = [carry for _, carry in loop.carries]
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(inner)))
    for i, following in enumerate(loop.next_carries):
        graph.add_edges_from((inner.index(carry), i) for carry in loop.carries_behind(following))
    coupled = nx.condensation(graph)
    return [sorted(coupled.nodes[c]["members"]) for c in nx.lexicographical_topological_sort(coupled)]


def _diagonal(terms: Terms, forms: Sequence[Form]) -> bool:
    """Whether each state is read where it is written."""
    for form in forms:
        for term in form.terms:
            for factor in term.factors:
                axes = tuple(() if label is None else (label,) for label in factor.labels)
                if factor.node in terms.states and axes != form.axes:
                    return False
    return True


def _pointwise(loop: Loop, group: Sequence[int]) -> bool:
    """Whether only operations element by element lead from the states to the next ones."""
    shape = loop.carries[group[0]][1].meta["val"].shape
    reading = {loop.carries[i][1] for i in group}
    leading = ancestors(loop.next_carries[i] for i in group)
    for node in loop.operations():
        if node not in leading or not any(n in reading for n in node.all_input_nodes):
            continue
        pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
        if not pointwise or not same_shape(node.meta["val"].shape, shape):
            return False
        reading.add(node)
    return True
