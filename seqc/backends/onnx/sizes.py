"""Symbolic sizes as ONNX values: read off a tensor that has the size, or computed from those that have its symbols."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import onnx_ir as ir
import sympy
import torch

from seqc import _torch
from seqc.backends.onnx.refusal import Unsupported

# Sizes are at least 0, so ONNX's truncating Div is a floor division, and its Mod agrees with Python's.
_BINARY = {"Max": "Max", "Min": "Min", "FloorDiv": "Div", "CleanDiv": "Div", "Mod": "Mod", "PythonMod": "Mod"}


class Sizes:
    """Appends to ``graph`` what computes sizes; ``known`` pairs fake tensors with the ONNX values they describe."""

    def __init__(self, graph: ir.Graph, known: Sequence[tuple[torch.Tensor, ir.Value]]) -> None:
        self.graph = graph
        self.known = known

    def shape(self, sizes: Sequence[int | torch.SymInt]) -> ir.Value:
        """An int64 vector of ``sizes``. Raises Unsupported where one of them cannot be computed."""
        parts = [self._vector(_torch.size_expr(s)) for s in sizes]
        return self._append("Concat", parts, ir.AttrInt64("axis", 0))

    def _vector(self, expr: sympy.Expr) -> ir.Value:
        """``expr`` as an int64 vector of one element."""
        if expr.is_Integer:
            return self._append("Constant", [], ir.AttrTensor("value", ir.tensor([int(expr)])))
        for tensor, value in self.known:
            for axis, size in enumerate(tensor.shape):
                if _torch.size_expr(size) == expr:
                    return self._append("Shape", [value], ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1))
        kind = type(expr).__name__
        op = {"Add": "Add", "Mul": "Mul"}.get(kind) or _BINARY.get(kind)
        if op is None:
            raise Unsupported(f"the size {expr} cannot be computed from the sizes of the inputs")
        return functools.reduce(lambda a, b: self._append(op, [a, b]), (self._vector(a) for a in expr.args))

    def _append(self, op: str, inputs: Sequence[ir.Value], *attributes: ir.Attr) -> ir.Value:
        node = ir.Node("", op, inputs, attributes)
        self.graph.append(node)
        return node.outputs[0]
