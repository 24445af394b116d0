"""Narrow: the model computes in float16 or bfloat16, but for what needs float32."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.emit import Emitter
from seqc.errors import UnsupportedModelError
from seqc.precision import FLOATS, Kind, beyond, computed_wide, has_floats, kinds
from seqc.program import Port, Program, State, named_args
from seqc.rewrite import remove_dead_code

aten = torch.ops.aten


@dataclass(frozen=True)
class Narrow:
    """The model's products, and what is elementwise between them, in ``dtype``; inputs and outputs keep their types.

        y = linear(x, w) * silu(z)          ->      y = linear(f16(x), f16(w)) * silu(z)
        norm(y)                             ->      norm(f32(y))

    In float32 stay: recurrences and scans, their states, and what leads to them elementwise (decays, steps, gates);
    exponentials, logarithms, powers and angles; norms, softmax and sums; what meets literals beyond the range of ``dtype``;
    what is made of weights and positions alone. The softmax in attention is the backends' to widen; its mask stays
    float32. A state with a place for each step (keys and values) is kept in ``dtype`` where numpy has that. A cast stands once
    behind each value that is needed in both types.

    The rules are those of automatic mixed precision (Micikevicius et al. 2018, torch.amp), and of :class:`WidenStates`.

    ``tolerance``: four units in the last place of bfloat16; of float16 an eighth of that.
    """

    dtype: torch.dtype

    name: ClassVar[str] = "narrow"
    tolerance: ClassVar[float] = 2.0**-5

    def __call__(self, program: Program) -> int:
        caches = self._caches(program)
        found = kinds(program, self.dtype, caches)
        casts = _Casts(program)
        self._store(program, caches)
        changes = 0
        for node in list(program.graph.nodes):
            # a size is that of the value in any type
            if node.op == "call_function" and node.target is not aten.sym_size.int:
                changes += self._rewrite(node, torch.float32 if computed_wide(node, found) else self.dtype, casts)
        outputs = zip(program.output_nodes, program.outputs, strict=True)
        program.output_node.args = (
            tuple(casts(n, p.dtype) if p.dtype in FLOATS and has_floats(n) else n for n, p in outputs),
        )
        if changes or casts.count:
            remove_dead_code(program)
            program.reasons.append(_summary(found, self.dtype))
        program.graph_module.recompile()
        return changes + casts.count

    def _caches(self, program: Program) -> list[fx.Node]:
        """Growing states whose next values are narrow where they are. Numpy, and so the runtime, has no bfloat16."""
        first = len(program.given_inputs)
        nodes, following = program.input_nodes[first:], program.output_nodes[len(program.own_outputs) :]
        growing = {n: f for n, f, s in zip(nodes, following, program.states, strict=True) if s.grows is not None}
        if self.dtype is torch.bfloat16:
            if growing:
                program.reasons.append("growing states stay float32: numpy, which reads them, has no bfloat16")
            return []
        while True:
            found = kinds(program, self.dtype, growing)
            kept = {n: f for n, f in growing.items() if n in found and found[f] is Kind.NARROW}
            if len(kept) == len(growing):
                return list(kept)
            growing = kept

    def _store(self, program: Program, caches: list[fx.Node]) -> None:
        """Let the states ``caches`` go in and out in the narrow type."""
        first = len(program.given_inputs)
        narrow = {program.input_nodes.index(node) - first for node in caches}

        def port(i: int, port: Port) -> Port:
            return replace(port, dtype=self.dtype) if i in narrow else port

        def state(i: int, state: State) -> State:
            return replace(state, initial=state.initial.to(self.dtype)) if i in narrow else state

        own = len(program.own_outputs)
        program.inputs = tuple(port(i - first, p) for i, p in enumerate(program.inputs))
        program.outputs = tuple(port(i - own, p) for i, p in enumerate(program.outputs))
        program.states = tuple(state(i, s) for i, s in enumerate(program.states))
        for node in caches:
            _retype(node, self.dtype, program)

    def _rewrite(self, node: fx.Node, dtype: torch.dtype, casts: _Casts) -> int:
        """Let ``node`` read, and give, floats of that type; 1 where it gave another."""

        def read(arg: Any) -> Any:
            if isinstance(arg, fx.Node):
                wanted = torch.float32 if arg is mask else dtype
                return casts(arg, wanted) if has_floats(arg) and not _is_tuple(arg) else arg
            return dtype if isinstance(arg, torch.dtype) and arg in FLOATS else arg

        attends = node.target is aten.scaled_dot_product_attention.default
        mask = named_args(node)["attn_mask"] if attends else None
        if node.target is operator.getitem:
            source: Any = node.args[0]
            before, node.meta["val"] = node.meta["val"], source.meta["val"][node.args[1]]
            return int(isinstance(before, torch.Tensor) and before.dtype != node.meta["val"].dtype)
        tree = (tuple(node.args), dict(node.kwargs))
        node.args, node.kwargs = pytree.tree_map(read, tree, is_leaf=lambda a: a is None)
        return _retype(node, dtype, casts.program)


class _Casts:
    """Values in other types than they have, each written once, behind the value."""

    def __init__(self, program: Program) -> None:
        self.program, self.count = program, 0
        self._emit = Emitter(program.graph_module, program.fake_mode)
        self._made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def __call__(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        if node.meta["val"].dtype is dtype:
            return node
        if (node, dtype) not in self._made:
            weight = self.program.weights.get(node.name)
            if weight is not None and beyond(weight, dtype):
                name = self.program.weight_names.get(node.name, node.name)
                raise UnsupportedModelError(
                    f"weight {name} holds numbers that are infinite in {dtype}: take dtype=bf16"
                )
            place = node.next
            while place.op == "placeholder":
                place = place.next
            with self._emit.before(place, origin=node):
                self._made[node, dtype] = self._emit(aten._to_copy.default, node, dtype=dtype)
            self.count += 1
        return self._made[node, dtype]


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], tuple | list)


def _retype(node: fx.Node, dtype: torch.dtype, program: Program) -> int:
    """Give the floats of a node's value that type; 1 where they had another."""
    changed = False

    def typed(value: Any) -> Any:
        nonlocal changed
        if not isinstance(value, torch.Tensor) or value.dtype not in FLOATS or value.dtype is dtype:
            return value
        changed = True
        with _torch.faking(program.fake_mode):
            return value.to(dtype)

    node.meta["val"] = pytree.tree_map(typed, node.meta["val"])
    return int(changed)


def _summary(found: dict[fx.Node, Kind], dtype: torch.dtype) -> str:
    called = [kind for node, kind in found.items() if node.op == "call_function"]
    name = str(dtype).removeprefix("torch.")
    narrow = sum(kind is Kind.NARROW for kind in called)
    return f"{narrow} of {len(called)} floating-point values are computed in {name}, the others in float32"
