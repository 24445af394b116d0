"""Counting the nodes of an ONNX model, those in bodies of loops and in functions included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx


def op_counts(path: Path) -> Counter[str]:
    """How often each operator occurs in the model file ``path``: main graph, nested bodies, and local functions.

    The body of a function is counted once, however often it is called.
    """
    model = onnx.load(path, load_external_data=False)
    counts = Counter(node.op_type for node in _nodes(model.graph.node))
    for function in model.functions:
        counts.update(node.op_type for node in _nodes(function.node))
    return counts


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)
