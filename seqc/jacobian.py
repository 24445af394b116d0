"""Derivatives of one step of a loop by its states, where each element of a state is computed from its own place only.

The Jacobian of such a step has one number for each element and each pair of states. PyTorch's forward-mode derivative is
traced with a single number in the place of each tensor: traced with the tensors' own symbolic sizes, its broadcasts turn
the batch into a literal (measured, torch 2.13). What comes out is elementwise, so it holds for tensors of any shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

from seqc import _torch
from seqc.dependence import ancestors, computed_from
from seqc.emit import Emitter
from seqc.outside import is_pure, is_size
from seqc.program import flat_args, place_of
from seqc.verify import same_shape

aten = torch.ops.aten


class NotElementwise(Exception):
    """What mixes the elements of a state, and where."""


@dataclass(frozen=True)
class Number:
    """A value that is the same whatever is read."""

    value: float | int | bool
    dtype: torch.dtype


Derived = fx.Node | Number


@dataclass(frozen=True)
class Jacobian:
    """The next states and their derivatives as elementwise operations on the states and ``operands``.

    ``operands`` are the values of the body that are read besides the states; ``entries[i, j]`` is the derivative of next
    state i by state j, and missing where it is zero everywhere.
    """

    operands: tuple[fx.Node, ...]
    entries: Mapping[tuple[int, int], Derived]
    following: tuple[Derived, ...]
    inputs: tuple[fx.Node, ...]

    @property
    def is_constant(self) -> bool:
        """Whether no derivative depends on a state: the step is affine."""
        reading = computed_from(self.inputs[: len(self.following)])
        return not any(entry in reading for entry in self.entries.values())

    def write(self, emit: Emitter, values: Sequence[fx.Node], wanted: Sequence[Derived]) -> list[fx.Node | float]:
        """Write ``wanted`` for states and operands given as nodes that broadcast against each other."""
        known: dict[fx.Node, Any] = dict(zip(self.inputs, values, strict=True))
        needed = ancestors(w for w in wanted if isinstance(w, fx.Node))
        for node in self.inputs[0].graph.nodes:
            if node in needed and node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = emit(node.target, *args, **kwargs)
        return [float(w.value) if isinstance(w, Number) else known[w] for w in wanted]


def jacobian(states: Sequence[fx.Node], following: Sequence[fx.Node]) -> Jacobian:
    """The derivatives of ``following`` by ``states``, all of one body, one shape and one dtype.

    Raises NotElementwise where an operation between them mixes elements, or has no elementwise derivative.
    """
    reading = computed_from(states)
    leading = ancestors(following)
    steps = [n for n in states[0].graph.nodes if n in reading and n in leading and n not in states]
    for node in steps:
        _check(node, states[0])
    read = dict.fromkeys(a for n in steps for a in flat_args(n) if isinstance(a, fx.Node) and a not in reading)
    operands = tuple(n for n in (*read, *(f for f in following if f not in reading)))

    def step(*numbers: torch.Tensor) -> list[torch.Tensor]:
        known: dict[fx.Node, Any] = dict(zip((*states, *operands), numbers, strict=True))
        for node in steps:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
        return [known[f] for f in following]

    def with_derivatives(*numbers: torch.Tensor) -> list[torch.Tensor]:
        found = step(*numbers)
        for j, number in enumerate(numbers[: len(states)]):

            def alone(value: torch.Tensor, j: int = j) -> list[torch.Tensor]:
                return step(*numbers[:j], value, *numbers[j + 1 :])

            found += torch.func.jvp(alone, (number,), (torch.ones_like(number),))[1]
        return found

    # One element, not none: between tensors without axes a Python number counts as a float64.
    numbers = [torch.zeros(1, dtype=n.meta["val"].dtype) for n in (*states, *operands)]
    try:
        functional = torch.func.functionalize(with_derivatives, remove="mutations_and_views")
        traced = make_fx(functional, _torch.onnx_decompositions(), tracing_mode="fake")(*numbers)
    except Exception as error:
        raise NotElementwise(f"torch gives no derivative: {str(error).splitlines()[0]}") from error
    traced.graph.eliminate_dead_code()
    inputs, results = _simplified(traced)
    count = len(states)
    columns = [results[count * (j + 1) : count * (j + 2)] for j in range(count)]
    entries = {(i, j): columns[j][i] for i in range(count) for j in range(count)}
    nonzero = {at: e for at, e in entries.items() if not (isinstance(e, Number) and e.value == 0)}
    return Jacobian(operands, nonzero, tuple(results[:count]), tuple(inputs))


def _check(node: fx.Node, state: fx.Node) -> None:
    where = f"{node.target} at {place_of(node)}"
    target, value = node.target, node.meta["val"]
    if not isinstance(target, torch._ops.OpOverload) or not is_pure(node):
        raise NotElementwise(f"{where} of the state is no elementwise operation")
    if torch.Tag.pointwise not in target.tags and target not in _SAME:
        raise NotElementwise(f"{where} is not known to be elementwise")
    if not same_shape(value.shape, state.meta["val"].shape):
        raise NotElementwise(f"{where} gives another shape than the state's")
    if any(isinstance(a, fx.Node) and is_size(a) for a in flat_args(node)):
        raise NotElementwise(f"{where} computes with a size")


_SAME = frozenset(
    {aten.alias.default, aten.clone.default, aten.expand.default, aten._to_copy.default, aten.detach.default}
)
"""Operations that give a single number back, but for its dtype."""

_FILLED: dict[Any, Any] = {
    aten.ones_like.default: 1,
    aten.zeros_like.default: 0,
    aten.empty_like.default: 0,  # written by a fill before it is read
    aten.zeros.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
}


def _simplified(traced: fx.GraphModule) -> tuple[list[fx.Node], list[Derived]]:
    """The placeholders and results of ``traced``, a graph on single numbers, without what only fills and copies them."""
    graph = fx.Graph()
    inputs: list[fx.Node] = []
    known: dict[fx.Node, Any] = {}
    written: dict[Any, fx.Node] = {}

    def tensor(value: Any) -> Any:
        number = isinstance(value, Number)
        return call(aten.scalar_tensor.default, (value.value,), {"dtype": value.dtype}) if number else value

    def call(target: Any, args: Any, kwargs: dict[str, Any]) -> fx.Node:
        key = (target, str(args), str(sorted(kwargs.items())))
        if key not in written:
            written[key] = graph.call_function(target, args, kwargs)
        return written[key]

    for node in traced.graph.nodes:
        if node.op == "placeholder":
            inputs.append(graph.placeholder(node.name))
            known[node] = inputs[-1]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            kwargs = {k: v for k, v in kwargs.items() if k not in ("layout", "device", "pin_memory", "memory_format")}
            simple = _value(node, args, kwargs)
            if simple is None:
                if torch.Tag.pointwise not in node.target.tags and node.target not in _SAME:
                    raise NotElementwise(f"torch gives the derivative as {node.target}, which no target has")
                if node.target in _COMMUTATIVE and isinstance(args[0], Number) and not kwargs:
                    args = args[::-1]
                if node.target in _ARITHMETIC and isinstance(args[1], Number):
                    args = (args[0], args[1].value)
                simple = call(node.target, tuple(map(tensor, args)), kwargs)
            known[node] = simple
        elif node.op != "output":
            raise NotElementwise(f"its derivative reads a constant tensor {node.target}")
    results: Any = traced.graph.output_node().args[0]
    return inputs, [known[n] for n in results]


_COMMUTATIVE = frozenset({aten.add.Tensor, aten.mul.Tensor})
_ARITHMETIC = _COMMUTATIVE | {aten.sub.Tensor, aten.div.Tensor}


def _value(node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
    """What ``node`` is, a node or a Number, without writing it; None where it is computed."""
    target, dtype = node.target, node.meta["val"].dtype
    if target in _FILLED:
        return Number(_FILLED[target], dtype)
    if target in (aten.scalar_tensor.default, aten.fill.Scalar, aten.full.default, aten.full_like.default):
        return Number(args[-1], dtype)
    tensors = [a for a in args if isinstance(a, (fx.Node, Number))]
    if tensors and all(isinstance(a, Number) for a in tensors):
        values = [torch.tensor(a.value, dtype=a.dtype) if isinstance(a, Number) else a for a in args]
        return Number(target(*values, **kwargs).item(), dtype)  # type: ignore[operator]
    if target in _SAME and node.args[0].meta["val"].dtype == dtype:  # type: ignore[union-attr]
        return args[0]
    neutral = {aten.mul.Tensor: 1, aten.add.Tensor: 0}.get(target)  # type: ignore[call-overload]
    if neutral is not None and not kwargs:
        for i, number in enumerate(args):
            other = node.args[1 - i]
            same = isinstance(other, fx.Node) and other.meta["val"].dtype == dtype
            if isinstance(number, Number) and same and number.value == neutral:
                return args[1 - i]
            if isinstance(number, Number) and same and number.value == 0:
                return Number(0, dtype)
    return None
