"""FoldWeights: what depends on weights alone and has no plain ONNX form is computed at compile time."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc.backends.onnx.translate import has_form
from seqc.complex_rules import RULES
from seqc.memory import node_bytes
from seqc.ops.recurrence import is_recurrence
from seqc.outside import is_pure
from seqc.pairs import REAL
from seqc.program import Program, source_line
from seqc.rewrite import copy_meta, remove_dead_code


@dataclass(frozen=True)
class FoldWeights:
    """Makes a weight of what is computed from weights alone by complex arithmetic or by operators that ONNX lacks.

        a_bar = linalg_solve(eye(n) - a, eye(n) + a)      ->  a_bar, a weight
        pole = exp(complex(-exp(re), im) * exp(log_dt))   ->  pole, a complex weight, split into two by SplitComplex

    and all that follows from it without reading an input. Plain real arithmetic on weights stays as it is: ONNX Runtime
    does it once when it loads the model, and the passes read decays off it. A value that is larger than the weights
    behind it and than ``free_bytes`` stays computed where it has a form at all.

    ``tolerance``: each folded value is bitwise that of the source model, whose operations compute it.
    """

    free_bytes: int = 1 << 20

    name: ClassVar[str] = "fold_weights"
    tolerance: ClassVar[float] = 0.0

    def __call__(self, program: Program) -> int:
        sources = _constants(program)
        folded: set[fx.Node] = set()
        for node in sources:
            if _calls_for_it(node) or any(a in folded for a in node.all_input_nodes):
                folded.add(node)
        results = []
        for node in reversed(list(sources)):
            if node not in folded or all(user in folded for user in node.users):
                continue
            if isinstance(node.meta["val"], torch.Tensor) and (not _writable(node) or self._small(node, sources[node])):
                results.append(node)
            else:
                folded.discard(node)  # what it is computed from is looked at next
        if not results:
            return 0
        values = _evaluated(program, results)
        for node in reversed(results):
            new = copy_meta(node, program.add_weight(values[node].resolve_conj().contiguous(), node.name))
            node.replace_all_uses_with(new)
            sizes = ", ".join(map(str, values[node].shape))
            program.reasons.append(f"{source_line(node)}: [{sizes}] is computed from weights alone, at compile time")
        remove_dead_code(program)
        return len(results)

    def _small(self, node: fx.Node, weights: frozenset[fx.Node]) -> bool:
        return node_bytes([node]) <= max(self.free_bytes, node_bytes(weights))


def _constants(program: Program) -> dict[fx.Node, frozenset[fx.Node]]:
    """Every operation that reads no input and has fixed sizes, in order, with the weights it is computed from."""
    weights: dict[fx.Node, frozenset[fx.Node]] = {node: frozenset([node]) for node in program.weight_nodes}
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or is_recurrence(node) or not is_pure(node) or not _is_fixed(node):
            continue
        if all(a in weights or a in found for a in node.all_input_nodes):
            found[node] = frozenset().union(*(weights.get(a) or found[a] for a in node.all_input_nodes))
    return found


def _is_fixed(node: fx.Node) -> bool:
    leaves = _leaves(node)
    return bool(leaves) and all(isinstance(v, torch.Tensor) and all(type(s) is int for s in v.shape) for v in leaves)


def _leaves(node: fx.Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _calls_for_it(node: fx.Node) -> bool:
    return _is_complex(node) or not _writable(node)


def _is_complex(node: fx.Node) -> bool:
    return any(getattr(v, "dtype", None) in REAL for n in (node, *node.all_input_nodes) for v in _leaves(n))


def _writable(node: fx.Node) -> bool:
    """Whether the backend can write the operation, as it is or split into real and imaginary part."""
    if node.target is operator.getitem:
        return True
    return node.target in RULES if _is_complex(node) else has_form(node)


def _evaluated(program: Program, results: list[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """The values of ``results``, by running what they are computed from on the weights."""
    known: dict[fx.Node, Any] = {node: program.weights[node.name].detach() for node in program.weight_nodes}
    with torch.no_grad():
        for node in _ancestors(results, program):
            args, kwargs = pytree.tree_map_only(fx.Node, known.__getitem__, (node.args, node.kwargs))
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return {node: known[node] for node in results}


def _ancestors(results: list[fx.Node], program: Program) -> list[fx.Node]:
    needed, pending = set(results), list(results)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source.op == "call_function" and source not in needed:
                needed.add(source)
                pending.append(source)
    return [n for n in program.graph.nodes if n in needed]
