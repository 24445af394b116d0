"""Values of a part of a graph in float64, from given ones."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.ops.recurrence import recurrence
from seqc.streaming.concrete import Concrete
from seqc.streaming.derivation import target_of


class Double(Concrete):
    """Evaluates nodes as :class:`Concrete` does, in float64, with the values of some nodes ``given``.

    ``starts`` replaces first states: by a recurrence and the index of its carried value, or by a cat and 0, its first part.
    Chunks of ``chunk`` steps become chunks of one.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        sizes: Mapping[sympy.Symbol, int],
        given: Mapping[fx.Node, Any],
        starts: Mapping[tuple[fx.Node, int], torch.Tensor],
        chunk: int = 1,
    ) -> None:
        super().__init__(weights, sizes)
        self.starts, self.chunk = starts, chunk
        self._known |= {node: widened(value) for node, value in given.items()}

    def _compute(self, node: fx.Node) -> Any:
        if node in self._known:
            return self._known[node]
        if node.op == "get_attr":
            body = getattr(node.graph.owning_module, str(node.target))
            return Wide(body if self.chunk == 1 else body_of_one(body, self.chunk)).run
        return widened(super()._compute(node))

    def arguments(self, node: fx.Node) -> tuple[Any, Any]:
        return of_one(super().arguments(node), self.chunk)  # type: ignore[no-any-return]

    def _size(self, value: Any) -> Any:
        if self.chunk == 1 or not isinstance(value, torch.SymInt):
            return super()._size(value)
        return int(of_one(_torch.size_expr(value), self.chunk).subs(self.sizes))

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        at = 2 if node.target is recurrence else 0
        if any(user is node for user, _ in self.starts):
            states = [self.starts.get((node, i), value) for i, value in enumerate(args[at])]
            args = (*args[:at], states, *args[at + 1 :])
        return target_of(node)(*args, **_wide_types(kwargs))


def of_one(value: Any, chunk: int) -> Any:
    """Arguments of a node, or a size, in which each number ``chunk`` is 1."""
    if isinstance(value, sympy.Basic):
        return value.xreplace({sympy.Integer(chunk): sympy.Integer(1)})
    return pytree.tree_map(
        lambda a: 1 if type(a) is int and a == chunk else a,
        value,
        is_leaf=lambda a: a is None,
    )


def body_of_one(body: fx.GraphModule, chunk: int) -> fx.GraphModule:
    """The body of a loop in which each number ``chunk`` is 1."""
    changed = copy.deepcopy(body)
    for node in changed.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            node.args, node.kwargs = of_one((node.args, dict(node.kwargs)), chunk)
    changed.recompile()
    return changed


class Wide(fx.Interpreter):
    """Runs a graph in float64."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is recurrence:
            args = (Wide(args[0]).run, *args[1:])
        return widened(super().call_function(target, args, _wide_types(kwargs)))


def widened(value: Any) -> Any:
    """Tensors of floating-point numbers in float64."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not (leaf.dtype.is_floating_point or leaf.dtype.is_complex):
            return leaf
        return leaf.to(torch.complex128 if leaf.dtype.is_complex else torch.float64)

    return pytree.tree_map(of, value)


def _wide_types(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    wide = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}
    return {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in kwargs.items()}
