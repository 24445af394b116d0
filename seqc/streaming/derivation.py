"""Derives the Program that takes the next steps of a sequence and the state after the earlier ones.

First, from the outputs back to the inputs, what is wanted of each value is collected (:mod:`seqc.streaming.demand`): the
newest steps of it, a window that reaches further back, or everything so far. Each operation says what it needs of its
operands for that (:mod:`seqc.streaming.rules`). Where a window reaches back, its last elements become a state; where
everything is wanted of computed values, they are kept, and grow; values that depend on positions alone are computed anew.
Then the operations are written, from the inputs on. What no rule and no trial (:mod:`seqc.streaming.commutes`) shows to be
computable step by step is refused with its source line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from seqc import _torch
from seqc.emit import Emitter
from seqc.outside import is_size
from seqc.program import Dim, Program
from seqc.sizes import simpler
from seqc.streaming.concrete import SHAPE_ONLY, Concrete
from seqc.streaming.demand import NEW, Demand, Everything, Mode, Plan, Recent, Window, refuse
from seqc.streaming.sizes import simplify
from seqc.streaming.states import Slot

aten = torch.ops.aten

END = 2**63 - 1

CAPACITY = 13
"""The number of places of growing states while shapes are computed: any number that no other size has."""


class Derivation:
    """The new graph while it is written, and what is known of the source graph.

    ``time`` is the dimension of the steps. ``steps`` fixes the number of new steps of a call; None leaves it symbolic, and
    the symbol of ``time`` then stands for it in the new graph.
    """

    def __init__(self, source: Program, time: Dim, steps: int | None = None) -> None:
        self.source, self.time = source, time.symbol
        self.longest = time.max
        simplify(source, self.time, self.longest)
        self.steps: Any = time.symbol if steps is None else sympy.Integer(steps)
        self.capacity = _torch.new_symbol(source.fake_mode, "capacity", hint=CAPACITY)
        self.own_dims = [Dim("capacity", self.capacity, CAPACITY, max=time.max)]
        self.gm = fx.GraphModule({}, fx.Graph())
        self.emit = Emitter(self.gm, source.fake_mode)
        self.output = self.gm.graph.output(())
        self.timed = self._timed()
        self.given = self._computed_from(source.input_nodes)
        self.lengthy = self._lengthy()
        self.slots: list[Slot] = []
        self.plans: dict[fx.Node, dict[Demand, Plan]] = {}
        self.written: dict[tuple[fx.Node, Demand], Any] = {}
        self.inputs: dict[fx.Node, fx.Node] = {}
        self.roles: dict[fx.Node, str] = {}
        self.constants: dict[fx.Node, torch.Tensor] = {}
        self.restarts: dict[fx.Node, Any] = {}
        self._sizes: dict[Any, Any] = {}
        self._shared: dict[Any, Any] = {}
        for node in source.placeholders:
            self.inputs[node] = self.placeholder(
                node.name, self._shape(node, self.newest(node)), node.meta["val"].dtype
            )

    # -- the source graph --------------------------------------------------------------------------------------------

    def _timed(self) -> set[fx.Node]:
        """The nodes that are computed from the values of an input with an axis over time."""
        return self._computed_from([n for n in self.source.input_nodes if self.axes(n)])

    def _computed_from(self, sources: Sequence[fx.Node]) -> set[fx.Node]:
        found = set(sources)
        for node in self.source.graph.nodes:
            if not is_size(node) and any(n in found for n in self._read(node)):
                found.add(node)
        return found

    def _lengthy(self) -> set[fx.Node]:
        """The nodes whose shape or value may depend on the number of steps."""
        found: set[fx.Node] = set()
        for node in self.source.graph.nodes:
            if is_size(node):
                if self.has_time(node.meta["val"]):
                    found.add(node)
            elif self.axes(node) or any(n in found for n in self._read(node)):
                found.add(node)
        return found

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """What the value of ``node`` is computed from."""
        return [n for n in node.all_input_nodes if node.target not in SHAPE_ONLY or n is not node.args[0]]

    def has_time(self, size: Any) -> bool:
        """Whether a size depends on the number of steps."""
        return isinstance(size, (torch.SymInt, torch.SymFloat)) and self.time in size.node.expr.free_symbols

    def axes(self, node: fx.Node) -> tuple[int, ...]:
        """The axes over time of ``node``'s value; of the first of several."""
        value = first(node.meta.get("val"))
        return tuple(a for a, s in enumerate(getattr(value, "shape", ())) if self.has_time(s))

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the value is the same whatever the inputs."""
        return node not in self.given and node not in self.lengthy

    def is_fixed(self, node: fx.Node) -> bool:
        """Whether the value is the same whatever the sequence."""
        return node not in self.timed and node not in self.lengthy

    def newest(self, node: fx.Node, at_end: bool = False, since: int = 0) -> Demand:
        """The newest steps of ``node``."""
        rank = len(getattr(first(node.meta["val"]), "shape", ()))
        over = self.axes(node)
        return Demand(tuple(self.newest_of(node, a) if a in over else None for a in range(rank)), at_end, since)

    def newest_of(self, node: fx.Node, axis: int) -> Window:
        """The elements that come with the newest steps: of ``x[1:]``, whose first comes with the second step, those before."""
        extra = sympy.expand(_torch.size_expr(first(node.meta["val"]).shape[axis]) - self.time)
        return Window(int(extra), int(extra)) if extra.is_Integer and extra < 0 else NEW

    def is_newest(self, node: fx.Node, demand: Demand) -> bool:
        """Whether no other steps than the newest are wanted."""
        over = [(a, m) for a, m in enumerate(demand.modes) if isinstance(m, Window)]
        return all(m.is_same(self.newest_of(node, a)) for a, m in over)

    def within(self, length: int) -> int:
        """``length``, or the longest that there is."""
        return length if self.longest is None else min(length, self.longest)

    def at(self, length: int) -> dict[sympy.Symbol, int]:
        """Sizes of all dimensions, with the sequence ``length`` long and the others small and different."""
        return {d.symbol: length if d.symbol == self.time else 2 + i for i, d in enumerate(self.source.dims)}

    def concrete(self, length: int) -> Concrete:
        """Values that depend on positions and weights alone, for a sequence of ``length``."""
        found: Concrete = self.shared(("concrete", length), lambda: Concrete(self.source.weights, self.at(length)))
        return found

    def shared(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gave when it was first asked for under ``key``."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def role(self, node: fx.Node) -> str:
        """What the kept values of ``node`` are to what reads them: ``key`` or ``value``, or ``cache``."""
        pending, seen = [node], {node}
        while pending:
            here = pending.pop()
            if here in self.roles:
                return self.roles[here]
            new = [user for user in here.users if user not in seen and user.target in MOVES]
            seen.update(new)
            pending += new
        return "cache"

    # -- sizes and shapes of the new graph ---------------------------------------------------------------------------

    def size(self, expr: Any) -> Any:
        """A size of the new graph as an int or a node; ``self.time`` in it stands for the new steps."""
        expr = sympy.sympify(expr).subs(self.time, self.steps)
        if expr.is_Integer:
            return int(expr)
        if expr not in self._sizes:
            symbols = {s: fx.Proxy(self._symbol(s)) for s in expr.free_symbols}
            self._sizes[expr] = self._written(expr, symbols)
        return self._sizes[expr]

    def _written(self, expr: Any, symbols: dict[sympy.Symbol, fx.Proxy]) -> fx.Node:
        result = _torch.emit_expr(expr, symbols)
        assert isinstance(result, fx.Proxy)
        for node in self.gm.graph.nodes:
            if "val" not in node.meta and node.op == "call_function":
                node.meta["val"] = self.emit.compute(node.target, *node.args)
        return result.node

    def _symbol(self, symbol: sympy.Symbol) -> fx.Node:
        for node in self.gm.graph.nodes:
            if node.op != "placeholder":
                break
            for axis, size in enumerate(node.meta["val"].shape):
                if _torch.size_expr(size) == symbol:
                    return self.emit(aten.sym_size.int, node, axis)
        raise KeyError(symbol)

    def expected(self, size: Any, mode: Mode) -> Any:
        """What becomes of ``size``, along an axis of the source, where ``mode`` of it is wanted: an expression."""
        expr = _torch.size_expr(size)
        if mode is None:
            return expr
        if isinstance(mode, Everything):
            return expr.subs(self.time, self.capacity)
        if isinstance(mode, Recent):
            return expr.subs(self.time, self.steps + mode.count)
        if sympy.expand(expr - self.time).is_number:
            return self.steps + mode.stop - mode.start  # whatever the axis is longer or shorter than the sequence
        return expr.subs(self.time, self.steps)

    def shape(self, node: fx.Node, demand: Demand) -> list[Any]:
        """The sizes, ints or nodes, of what is wanted of ``node``."""
        value = first(node.meta["val"])
        return [self.size(self.expected(s, m)) for s, m in zip(value.shape, demand.modes, strict=True)]

    def _shape(self, node: fx.Node, demand: Demand) -> list[Any]:
        value = first(node.meta["val"])
        return [self.expected(s, m) for s, m in zip(value.shape, demand.modes, strict=True)]

    def fake(self, exprs: Sequence[Any], dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor of a shape given as expressions."""
        hints = {d.symbol: d.traced for d in (*self.source.dims, *self.own_dims)}
        env = self.source.fake_mode.shape_env
        sizes = [
            _torch.symint(env, e, int(e.subs(hints))) if not e.is_Integer else int(e) for e in map(sympy.sympify, exprs)
        ]
        result: torch.Tensor = self.emit.compute(lambda: torch.empty(sizes, dtype=dtype))
        return result

    def placeholder(self, name: str, exprs: Sequence[Any], dtype: torch.dtype) -> fx.Node:
        """A new input of the new graph."""
        last = next((n for n in reversed(self.gm.graph.nodes) if n.op == "placeholder"), None)
        place = (
            self.gm.graph.inserting_after(last)
            if last
            else self.gm.graph.inserting_before(next(iter(self.gm.graph.nodes)))
        )
        with place:
            node = self.gm.graph.placeholder(name)
        node.meta["val"] = self.fake(exprs, dtype)
        return node

    def constant(self, value: torch.Tensor, name: str) -> fx.Node:
        """A weight that is computed now."""
        node = self.placeholder(f"constant_{name}", list(value.shape), value.dtype)
        self.constants[node] = value
        return node

    # -- states ------------------------------------------------------------------------------------------------------

    def slot(
        self,
        kind: str,
        origin: fx.Node,
        exprs: Sequence[Any],
        dtype: torch.dtype,
        initial: fx.Node | float,
        grows: int | None = None,
        pending: int | None = None,
    ) -> Slot:
        """A new state. ``initial`` is a number or a node of the source."""
        slot = Slot(kind, origin, self.placeholder(f"state_{len(self.slots)}", exprs, dtype), initial, grows, pending)
        self.slots.append(slot)
        return slot

    def pending(self, chunk: int) -> sympy.Symbol:
        """The number of steps since the beginning of the last chunk: 0 before the first step, else 1 to ``chunk``."""

        def make() -> sympy.Symbol:
            hint = 3 * chunk + 1  # so that there are several chunks while shapes are computed
            symbol = _torch.new_symbol(self.source.fake_mode, f"pending_{chunk}", hint)
            self.own_dims.append(Dim("pending", symbol, hint, min=0, max=chunk))
            return symbol

        found: sympy.Symbol = self.shared(("pending", chunk), make)
        return found

    def position(self) -> fx.Node:
        """The number of past steps, an int64 tensor [] that is the same for all streams of a call."""
        if "position" not in self._shared:
            slot = self.slot("position", self.source.output_node, [], torch.int64, 0.0)
            slot.following = self.emit(aten.add.Tensor, slot.placeholder, self.size(self.steps))
            self._shared["position"] = slot.placeholder
        found: fx.Node = self._shared["position"]
        return found

    def positions(self, mode: Mode) -> fx.Node:
        """The positions of the elements of ``mode``, int64 [n]; 0 for places in front of the first step."""
        if mode not in self._shared:
            if isinstance(mode, Everything):
                self._shared[mode] = self.emit(aten.arange.default, self.size(self.capacity))
            elif isinstance(mode, Recent):
                self._shared[mode] = self.emit(aten.clamp.default, self._recent(mode), 0)
            else:
                assert isinstance(mode, Window)
                steps = self.emit(aten.arange.start, mode.start, self.size(self.steps + mode.stop))
                self._shared[mode] = self.emit(aten.add.Tensor, steps, self.position())
        found: fx.Node = self._shared[mode]
        return found

    def are_steps(self, mode: Recent | Everything) -> fx.Node:
        """bool [n]: which elements of ``mode`` are steps, not places in front of the first or behind the newest."""

        def write() -> fx.Node:
            if isinstance(mode, Recent):
                return self.emit(aten.ge.Scalar, self._recent(mode), 0)
            seen = self.emit(aten.add.Tensor, self.position(), self.size(self.steps))
            return self.emit(aten.lt.Tensor, self.positions(mode), seen)

        found: fx.Node = self.shared(("are steps", mode), write)
        return found

    def places(self, new: fx.Node, axis: int) -> fx.Node:
        """The position of each element of ``new``, whose axis is over the new steps: int64 of the shape of ``new``."""
        exprs = tuple(_torch.size_expr(s) for s in new.meta["val"].shape)

        def write() -> fx.Node:
            along = self.emit(
                aten.reshape.default, self.positions(NEW), [-1 if a == axis else 1 for a in range(len(exprs))]
            )
            return self.emit(aten.expand.default, along, [self.size(e) for e in exprs])

        found: fx.Node = self.shared(("places", exprs, axis), write)
        return found

    def _recent(self, mode: Recent) -> fx.Node:
        return self.emit(
            aten.add.Tensor, self.emit(aten.arange.start, -mode.count, self.size(self.steps)), self.position()
        )

    # -- planning and writing ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Write the new graph. Raises NotCausal."""
        from seqc.streaming.restart import restarts  # these are written in terms of this class
        from seqc.streaming.rules import plan

        self.restarts = restarts(self)
        wanted: dict[fx.Node, list[Demand]] = {}
        for node in self.source.output_nodes:
            wanted.setdefault(node, []).append(self._of_output(node))
        for node in reversed(list(self.source.graph.nodes)):
            pending = list(wanted.get(node, ()))
            plans = self.plans.setdefault(node, {})
            while pending:
                demand = pending.pop()
                if demand in plans:
                    continue
                plans[demand] = plan(self, node, demand)
                for operand, need in plans[demand].needs:
                    (pending if operand is node else wanted.setdefault(operand, [])).append(need)
        with self.emit.before(self.output):
            for node in self.source.graph.nodes:
                for demand in self.plans[node]:
                    self.new(node, demand)
            results = [self.new(n, self._of_output(n)) for n in self.source.output_nodes]
        self.output.args = (tuple(results),)

    def _of_output(self, node: fx.Node) -> Demand:
        over = self.axes(node)
        if over and [_torch.size_expr(node.meta["val"].shape[a]) for a in over] != [self.time]:
            shape = ", ".join(map(str, self.source.shape_of(node.meta["val"])))
            raise refuse(node, f"an output of shape [{shape}] has not one element for each step")
        return self.newest(node, at_end=not over)

    def new(self, node: fx.Node, demand: Demand) -> Any:
        """What is wanted of ``node``, in the new graph."""
        key = (node, demand)
        if key not in self.written:
            plan = self.plans[node][demand]
            operands = [self.new(n, d) for n, d in plan.needs]
            with self.emit.of(node):
                self.written[key] = plan.write(*operands)
            self._check(node, demand, self.written[key])
        return self.written[key]

    def _check(self, node: fx.Node, demand: Demand, new: Any) -> None:
        """What was written has the shape that was wanted."""
        if isinstance(new, fx.Node) and isinstance(new.meta["val"], torch.Tensor) and self.axes(node):
            found = [simpler(_torch.size_expr(s), self.time) for s in new.meta["val"].shape]
            wanted = [sympy.sympify(e).subs(self.time, self.steps) for e in self._shape(node, demand)]
            if len(found) != len(wanted) or any(sympy.expand(a - b) != 0 for a, b in zip(found, wanted, strict=True)):
                raise refuse(node, f"it was written with shape {found}, not {wanted}")

    def number(self, reader: fx.Node, size: fx.Node) -> Any:
        """What ``reader`` gets for a number that is made of sizes."""
        value = size.meta["val"]
        if self.has_time(value):
            raise refuse(reader, "it computes with the length of the whole sequence")
        return self.size(value if isinstance(value, int) else value.node.expr)

    def arguments(
        self, node: fx.Node, operands: dict[fx.Node, Any], shape: Sequence[Any] | None = None
    ) -> tuple[Any, Any]:
        """The arguments of ``node`` with new nodes for the old; ``shape`` is put where they state the result's."""
        args, kwargs = resized(node, shape)

        def new(arg: Any) -> Any:
            if not isinstance(arg, fx.Node) or arg in operands:
                return operands.get(arg, arg)
            if arg.graph is self.gm.graph:
                return arg
            return self.number(node, arg)

        new_args, new_kwargs = pytree.tree_map(new, (tuple(args), kwargs), is_leaf=lambda a: a is None)
        return new_args, new_kwargs


def first(value: Any) -> Any:
    """The value itself, or the first tensor of several."""
    return value[0] if isinstance(value, (tuple, list)) and value else value


MOVES = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.transpose.int,
        aten.permute.default,
    }
)
"""Operations that only arrange elements, or repeat them."""

_SHAPES: dict[Any, int] = {
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten.expand.default: 1,
    torch.ops.prims.broadcast_in_dim.default: 1,
}


def target_of(node: fx.Node) -> Any:
    """What ``node`` calls; a view as a reshape, since a part of a value may lie in memory otherwise than the whole."""
    return aten.reshape.default if node.target in (aten.view.default, aten._unsafe_view.default) else node.target


def resized(node: fx.Node, shape: Sequence[Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of ``node``, with ``shape`` in place of the one they state, where they do."""
    at = _SHAPES.get(node.target)
    if shape is None or at is None:
        return node.args, dict(node.kwargs)
    return (*node.args[:at], list(shape), *node.args[at + 1 :]), dict(node.kwargs)


Rule = Callable[[Derivation, fx.Node, Demand], Plan | None]
