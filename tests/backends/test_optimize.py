"""Rules tried on the nodes of their operator only rewrite what onnxscript's own optimiser rewrites."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import pytest
from onnxscript.rewriter import _rewrite_rule

from seqc.backends.onnx.optimize import optimize

# A double transposition, a multiplication by one and relu of relu go; of the slices, no rule makes one operator.
SOURCE = """
<ir_version: 9, opset_import: ["" : 18]>
agraph (float[4, 6] x) => (float[4, 6] y) {
    zero = Constant <value = int64[1] {0}> ()
    end = Constant <value = int64[1] {3}> ()
    begin = Constant <value = int64[1] {3}> ()
    six = Constant <value = int64[1] {6}> ()
    axis = Constant <value = int64[1] {1}> ()
    one = Constant <value = float {1.0}> ()
    left = Slice (x, zero, end, axis)
    right = Slice (x, begin, six, axis)
    swapped = Concat <axis = 1> (right, left)
    there = Transpose <perm = [1, 0]> (swapped)
    back = Transpose <perm = [1, 0]> (there)
    same = Mul (back, one)
    first = Relu (same)
    second = Relu (first)
    y = Mul (second, second)
}
"""


def model() -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(SOURCE))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_rewrites_what_onnxscript_rewrites() -> None:
    ours, theirs = model(), model()
    optimize(ours, 4096, lambda node: None)
    onnxscript.optimizer.optimize_ir(theirs)
    assert operators(ours) == operators(theirs) == ["Slice", "Slice", "Concat", "Relu", "Mul"]


def test_rules_are_tried_on_their_operator_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[object, str]] = []
    original = _rewrite_rule.RewriteRule.try_rewrite

    def recorded(self: _rewrite_rule.RewriteRule, model: ir.Model, graph: ir.Graph, node: ir.Node, **more: object):  # type: ignore[no-untyped-def]
        tried.append((self._target_pattern.output_nodes[0].op_identifier(), node.op_type))
        return original(self, model, graph, node, **more)

    monkeypatch.setattr(_rewrite_rule.RewriteRule, "try_rewrite", recorded)
    optimize(model(), 4096, lambda node: None)
    assert tried
    assert {(op, found) for op, found in tried if op is not None and op[1] != found} == set()  # type: ignore[index]
