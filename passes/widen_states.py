"""WidenStates: what is carried from step to step is float32, whatever the model's type."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc.emit import Emitter
from seqc.ops.recurrence import is_recurrence, parts
from seqc.program import Program, place_of
from seqc.rewrite import remove_dead_code
from seqc.widen import is_narrow, wide, wide_body
from seqc.write_loop import write_recurrence

aten = torch.ops.aten

_CARRY = {
    aten.lstm.input,
    aten.gru.input,
    aten.rnn_tanh.input,
    aten.rnn_relu.input,
    aten.cumsum.default,
    aten.cumprod.default,
    aten.logcumsumexp.default,
}
"""Operations whose result at each step is made of that of the step before."""


@dataclass(frozen=True)
class WidenStates:
    """Recurrences in float16 or bfloat16 compute, and carry, float32.

        h = recurrence(x, h0)                            float16
    ->  h = float16(recurrence(float32(x), float32(h0)))

    A stream adds to its states for ever: in float16 a sum of ones stays at 2048, and a decay of 0.9999 is 1.

    ``tolerance``: the results differ from the model's own by what it loses to rounding in each step, a few units in the last
    place of float16.
    """

    name: ClassVar[str] = "widen_states"
    tolerance: ClassVar[float] = 1e-2

    def __call__(self, program: Program) -> int:
        changes = 0
        for node in list(program.graph.nodes):
            if not (is_recurrence(node) or node.target in _CARRY) or not is_narrow(_carried(node)):
                continue
            emit = Emitter(program.graph_module, program.fake_mode)
            with emit.before(node):
                new = _loop(emit, node) if is_recurrence(node) else _operation(emit, node)
                _replace(emit, node, new)
            program.reasons.append(f"{place_of(node, 'a loop')}: its states are float32")
            changes += 1
        if changes:
            remove_dead_code(program)
        return changes


def _carried(node: fx.Node) -> Any:
    return [n.meta["val"] for n in parts(node).carries] if is_recurrence(node) else node.meta["val"]


def _operation(emit: Emitter, node: fx.Node) -> fx.Node:
    args, kwargs = pytree.tree_map(
        lambda a: wide(emit, a), (tuple(node.args), dict(node.kwargs)), is_leaf=lambda a: a is None
    )
    return emit(node.target, *args, **kwargs)


def _loop(emit: Emitter, node: fx.Node) -> fx.Node:
    loop = parts(node)
    carries, xs, invariants = ([wide(emit, n) for n in group] for group in (loop.carries, loop.xs, loop.invariants))
    return write_recurrence(emit, wide_body(loop.body), loop.trip, carries, xs, invariants, loop.reverse)


def _replace(emit: Emitter, node: fx.Node, new: fx.Node) -> None:
    """Let ``new``, in the types of ``node``, serve its users."""
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(emit(aten._to_copy.default, new, dtype=node.meta["val"].dtype))
        return
    for reader in list(node.users):
        value = emit(operator.getitem, new, reader.args[1])
        was = reader.meta["val"].dtype
        reader.replace_all_uses_with(
            value if value.meta["val"].dtype == was else emit(aten._to_copy.default, value, dtype=was)
        )
