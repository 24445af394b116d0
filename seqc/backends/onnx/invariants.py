"""Moves out of Scan bodies what no step changes: transposed weights, shapes, masks.

The hoist pass does this for ATen ops; what is left are nodes that only translation brings about.
"""

from __future__ import annotations

import onnx_ir as ir


def hoist(graph: ir.Graph) -> int:
    """Move invariant nodes of every Scan body, innermost first, to before the Scan. Returns how many moved."""
    moved = 0
    for node in list(graph):
        for attribute in list(node.attributes.values()):
            if attribute.type is ir.AttributeType.GRAPH:
                moved += hoist(attribute.as_graph())
        if node.op_type == "Scan" and node.domain == "":
            moved += _hoist_body(graph, node, node.attributes["body"].as_graph())
    return moved


def _hoist_body(graph: ir.Graph, scan: ir.Node, body: ir.Graph) -> int:
    moved = 0
    own_inputs = set(body.inputs)
    for node in list(body):
        has_body = any(a.type is ir.AttributeType.GRAPH for a in node.attributes.values())
        if has_body or any(value.is_graph_output() for value in node.outputs):
            continue
        if any(_made_inside(value, body, own_inputs) for value in node.inputs if value is not None):
            continue
        body.remove(node)
        graph.insert_before(scan, node)
        moved += 1
    return moved


def _made_inside(value: ir.Value, body: ir.Graph, own_inputs: set[ir.Value]) -> bool:
    producer = value.producer()
    return value in own_inputs or (producer is not None and producer.graph is body)
