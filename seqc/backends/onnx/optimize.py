"""onnxscript's optimiser, with each rewrite rule tried only where it can match."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
from onnxscript import rewriter

from seqc import _torch


class _OfOperator:
    """A rewrite rule that is tried only on nodes of the operator its pattern ends in.

    onnxscript tries every rule on every node, and the one for a split, which is two slices, on every pair of a node and a
    slice: most of the time of an export of a long graph.
    """

    def __init__(self, rule: Any) -> None:
        self._rule = rule
        self._operator = rule._target_pattern.output_nodes[0].op_identifier()  # None: of any operator

    def try_rewrite(self, model: ir.Model, graph: Any, node: ir.Node, **settings: Any) -> Any:
        if self._operator not in (None, node.op_identifier()):
            return None
        return self._rule.try_rewrite(model, graph, node, **settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)


@functools.cache
def _rules() -> tuple[_OfOperator, ...]:
    return tuple(_OfOperator(rule) for rule in rewriter._DEFAULT_REWRITE_RULES)


def optimize(model: ir.Model, limit: int, should_fold: Callable[[ir.Node], bool | None]) -> None:
    """``onnxscript.optimizer.optimize_ir`` in place; constants of more than ``limit`` elements are not folded."""
    with _torch.replaced(rewriter, {"_DEFAULT_REWRITE_RULES": _rules()}):
        onnxscript.optimizer.optimize_ir(
            model, input_size_limit=limit, output_size_limit=limit, should_fold=should_fold
        )
