"""Shapes of what torch's own rules take for the traced length, and what stays whole for the backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from seqc._torch.sizes import hint


def _unbind_shapes(t: torch.Tensor, dim: int = 0) -> tuple[torch.Tensor, ...]:
    return tuple(t.select(dim, i) for i in range(int(t.shape[dim])))


def _layer_shapes(x: torch.Tensor, hx: Any, *settings: Any) -> tuple[torch.Tensor, ...]:
    bidirectional = bool(settings[5])  # after params, has_biases, num_layers, dropout, train
    states = hx if isinstance(hx, (list, tuple)) else [hx]
    features = states[0].shape[-1] * (1 + bidirectional)
    return (x.new_empty((*x.shape[:-1], features)), *(torch.empty_like(s) for s in states))


# Kept whole in the IR beyond what torch.onnx knows: the backend has forms of them far cheaper than their decomposition
# (a loop over time, or a product over [length, length]).
_aten = torch.ops.aten
_RECURRENT_LAYERS = (_aten.lstm.input, _aten.gru.input, _aten.rnn_tanh.input, _aten.rnn_relu.input)
KEPT = (*_RECURRENT_LAYERS, _aten.cumprod.default)
_SHAPE_RULES: dict[Any, Callable[..., Any]] = {
    _aten.unbind.int: _unbind_shapes,
    **dict.fromkeys(_RECURRENT_LAYERS, _layer_shapes),
}


def shape_rule(target: Any) -> Any:
    """What to call on fake tensors for the shape of ``target``'s result: for most operations themselves.

    With torch's Python dispatcher a recurrent layer is a loop over its time, and its length a literal.
    """
    return _SHAPE_RULES[target] if target in _RECURRENT_LAYERS else target


@contextlib.contextmanager
def shape_rules() -> Iterator[None]:
    """Shape rules for ops whose decompositions give wrong shapes where a symbolic size is read as its traced value.

    unbind becomes tensor_split of a symbolic size and keeps the axis; recurrent layers unbind time; a slice whose bound
    may be negative gets an unknown size, though its sign is the same at every length in practice.
    """
    from torch._decomp import decomposition_table
    from torch._subclasses import fake_impls

    rules: Any = fake_impls
    original = rules._compute_slice_index

    def slice_index(size: int | torch.SymInt, index: int | torch.SymInt) -> Any:
        found = original(size, index)
        if found is None and (isinstance(index, int) or index.node.has_hint()):
            symbolic: Any = torch
            found = symbolic.sym_max(index + size, 0) if hint(index) < 0 else symbolic.sym_min(index, size)
        return found

    saved = {op: decomposition_table[op] for op in _SHAPE_RULES}
    decomposition_table.update(_SHAPE_RULES)
    rules._compute_slice_index = slice_index
    try:
        yield
    finally:
        rules._compute_slice_index = original
        decomposition_table.update(saved)
