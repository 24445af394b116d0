"""Arithmetic of Python numbers with the number of the step: in a loop's body that is a tensor, and so is what is made of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from seqc import _torch

aten = torch.ops.aten

Call = Callable[..., fx.Node]

_BINARY = {
    operator.add: aten.add.Tensor,
    operator.sub: aten.sub.Tensor,
    operator.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor,
}
_FUNCTIONS = {torch.sym_float, operator.neg, *_BINARY}


def is_arithmetic(target: Any) -> bool:
    """Whether ``target`` computes a Python number of numbers, as :func:`arithmetic` does of tensors."""
    return target in _FUNCTIONS


def arithmetic(body: fx.Graph, mode: Any, target: Any, args: Sequence[Any]) -> fx.Node:
    """``target(*args)`` as a tensor [] of int64 or float64, as Python computes; args are numbers, sizes or such tensors."""

    def call(operation: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = body.call_function(operation, args, kwargs)
        with _torch.faking(mode):
            values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
            node.meta["val"] = operation(*values, **kwargs)
        return node

    tensors = [as_tensor(call, a) for a in args]
    if target in (torch.sym_float, operator.truediv):
        tensors = [call(aten._to_copy.default, t, dtype=torch.float64) for t in tensors]
    if target is torch.sym_float:
        return tensors[0]
    return call(aten.neg.default if target is operator.neg else _BINARY[target], *tensors)


def as_tensor(call: Call, number: Any) -> fx.Node:
    """A number, or a node that is one, as a tensor [] that ``call(operation, *args, **kwargs)`` writes; a tensor as it is."""
    value = number.meta["val"] if isinstance(number, fx.Node) else number
    if isinstance(value, torch.Tensor):
        assert isinstance(number, fx.Node)
        return number
    floating = isinstance(value, float | torch.SymFloat)
    return call(aten.full.default, [], number, dtype=torch.float64 if floating else torch.int64)
