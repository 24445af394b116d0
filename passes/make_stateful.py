"""MakeStateful: a Program over whole sequences becomes one over their next steps, with states."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import sympy
import torch
import torch.fx as fx

from seqc import _torch
from seqc.errors import UnsupportedModelError
from seqc.program import Dim, Port, Program, State, module_path, place_of
from seqc.rewrite import remove_dead_code
from seqc.streaming.concrete import Concrete
from seqc.streaming.demand import of_the_model
from seqc.streaming.derivation import Derivation
from seqc.streaming.sizes import bound
from seqc.streaming.states import Slot, layer, names
from seqc.streaming.time import time_of


@dataclass(frozen=True)
class MakeStateful:
    """Derives the step form: states go in and come out, and the inputs hold the next steps only.

        y = recurrence(x [sequence, ...], h0 = 0)
    ->  y, h_next = recurrence(x [new steps, ...], h0 = h)      a first call takes h = 0

    One graph serves every number of new steps from 1 on: prefill and decoding are the same function. ``time`` names the
    dimension of the steps; None takes the only one that is not the batch. ``steps`` fixes the number of new steps of a call.
    What looks ahead is refused with its source line.

    ``tolerance``: sums along the time are taken in other groups.
    """

    time: str | None = None
    steps: int | None = None

    name: ClassVar[str] = "make_stateful"
    tolerance: ClassVar[float] = 1e-5

    def __call__(self, program: Program) -> int:
        time = _bounded(program, time_of(program, self.time))
        derivation = Derivation(program, time, self.steps)
        derivation.run()
        slots = [slot for slot in derivation.slots if slot.following is not None]
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        slots.sort(key=lambda slot: order[slot.origin])
        _adopt(program, derivation, slots, time)
        return len(slots)


def _bounded(program: Program, time: Dim) -> Dim:
    """``time``, with as many steps at most as the model has entries for in tables that it reads by position."""
    found = bound(program, time.symbol)
    if found is None or (time.max is not None and time.max <= found[0]):
        return time
    most, where = found
    _torch.set_largest(time.symbol, program.fake_mode, most)
    bounded = replace(time, max=most)
    program.dims = tuple(bounded if d.symbol == time.symbol else d for d in program.dims)
    program.notes.append(f"a stream takes at most {most} steps: {place_of(of_the_model(where))} has no more")
    return bounded


def _adopt(program: Program, d: Derivation, slots: list[Slot], time: Dim) -> None:
    """Put the derived graph into ``program``."""
    last = max((layer(module_path(s.origin)) or 0 for s in slots), default=0)
    layers = [layer(module_path(s.origin)) for s in slots]
    layer_of = {i: n if n is not None else last for i, n in enumerate(layers)}
    states = []
    own = _own_dims(program, d, slots)
    dims = {x.symbol: x.name for x in (*program.dims, *own)}
    results: Any = d.output.args[0]
    inputs = [_port(p.name, d.inputs[n], dims) for p, n in zip(program.inputs, program.input_nodes, strict=True)]
    outputs = [_port(p.name, n, dims) for p, n in zip(program.outputs, results, strict=True)]
    for (name, following), slot in zip(names(slots, layer_of), slots, strict=True):
        axis = _batch_axis(d, slot, time)
        states.append(State(name, following, _initial(d, slot), axis, slot.grows, slot.pending, slot.window))
        inputs.append(_port(name, slot.placeholder, dims))
        assert slot.following is not None
        outputs.append(_port(following, slot.following, dims))
        program.reasons.append(f"{place_of(slot.origin)}: {name} {list(inputs[-1].shape)}")
    d.output.args = ((*results, *(slot.following for slot in slots)),)
    weights = {d.inputs[n]: program.weights[n.name] for n in program.weight_nodes} | d.constants
    given = [d.inputs[n] for n in program.input_nodes]
    _order(d.gm.graph, [*weights, *given, *(slot.placeholder for slot in slots)])
    old_names = {d.inputs[n].name: program.weight_names.get(n.name, n.name) for n in program.weight_nodes}
    program.graph_module = d.gm
    program.weights = {n.name: value for n, value in weights.items()}
    program.weight_names = {n: old_names.get(n, n) for n in program.weights}
    program.inputs, program.outputs, program.states = tuple(inputs), tuple(outputs), tuple(states)
    fixed = d.steps.is_Integer
    program.dims = (*(x for x in program.dims if not (fixed and x.symbol == time.symbol)), *own)
    d.gm.recompile()
    remove_dead_code(program)


def _own_dims(program: Program, d: Derivation, slots: list[Slot]) -> list[Dim]:
    """The dimensions that only states have, by names that the model has not."""
    taken = {x.name for x in program.dims}
    shown = {a for s in slots for size in s.placeholder.meta["val"].shape for a in _torch.size_expr(size).free_symbols}
    found = []
    for dim in (x for x in d.own_dims if x.symbol in shown):
        name = next(n for n in (dim.name, *(f"{dim.name}_{i}" for i in range(2, 99))) if n not in taken)
        taken.add(name)
        found.append(replace(dim, name=name))
    return found


def _order(graph: fx.Graph, placeholders: list[fx.Node]) -> None:
    for node in reversed(placeholders):
        next(iter(graph.nodes)).prepend(node)
    wanted = set(placeholders)
    for node in list(graph.nodes):
        if node.op == "placeholder" and node not in wanted:
            graph.erase_node(node)


def _port(name: str, node: fx.Node, dims: dict[sympy.Symbol, str]) -> Port:
    named = {symbol: sympy.Symbol(dim) for symbol, dim in dims.items()}
    exprs = [_torch.size_expr(s).subs(named) for s in node.meta["val"].shape]
    return Port(name, node.meta["val"].dtype, tuple(int(e) if e.is_Integer else str(e) for e in exprs))


def _initial(d: Derivation, slot: Slot) -> torch.Tensor:
    """The state of one stream before its first step."""
    value = slot.placeholder.meta["val"]
    none = {x.symbol: 0 for x in d.own_dims}
    one, two = ({**{x.symbol: n for x in d.source.dims}, **none} for n in (1, 2))
    shape = [int(_torch.size_expr(s).subs(one)) for s in value.shape]
    if not isinstance(slot.initial, fx.Node):
        return torch.full(shape, slot.initial, dtype=value.dtype)
    try:
        first, second = (Concrete(d.source.weights, at).value(slot.initial) for at in (one, two))
    except KeyError:
        raise UnsupportedModelError(
            f"no streaming form: the first state at {place_of(slot.origin)} is computed from an input"
        ) from None
    result: torch.Tensor = first.expand(shape).contiguous()
    if not torch.equal(second, result.repeat([b // a for a, b in zip(result.shape, second.shape, strict=True)])):
        raise UnsupportedModelError(
            f"no streaming form: the first states of the streams differ, at {place_of(slot.origin)}"
        )
    return result.to(value.dtype)


def _batch_axis(d: Derivation, slot: Slot, time: Dim) -> int | None:
    others = {x.symbol for x in d.source.dims} - {time.symbol}
    axes = [a for a, s in enumerate(slot.placeholder.meta["val"].shape) if _torch.size_expr(s).free_symbols & others]
    if len(axes) > 1:
        raise UnsupportedModelError(
            f"no streaming form: a state at {place_of(slot.origin)} has several axes of streams"
        )
    return axes[0] if axes else None
