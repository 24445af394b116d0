"""``seqc::recurrence``: a loop over time whose body is a graph.

    carry_0 = init
    for t in 0 .. trip-1 (or trip-1 .. 0 where ``reverse``):
        carry_{t+1}, y_t = body(carry_t, x_t, invariants)
    returns (carry_trip..., stack(y)...)

In a graph it is a ``call_function`` node whose target is :func:`recurrence`, with positional arguments

    (body, trip, carries, xs, invariants, reverse)

``body``        get_attr node of a child GraphModule; placeholders are the carries, then one step of each x, then the
                invariants; it returns one flat tuple: the next carries, then one step of each y
``trip``        number of steps, an int or a node of a symbolic int, at least 0
``carries``     tuple of nodes, the initial values; shape and dtype are those of the next carries
``xs``          tuple of nodes of shape [trip, ...]: time is axis 0
``invariants``  tuple of nodes the body reads in every step (weights, masks)
``reverse``     True walks time from the end; x_t is read and y_t written at the same t either way

The value is a flat tuple: the final carries, then the ys of shape [trip, ...]. This is ``jax.lax.scan`` with explicit
invariants, and the ONNX ``Scan`` operator with time as axis 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx

from seqc import _torch
from seqc.ops.choose import choose
from seqc.sizes import at_least_one

if TYPE_CHECKING:
    from seqc.program import Dim

Body = Callable[..., Any]


def recurrence(
    body: Body,
    trip: int,
    carries: Sequence[torch.Tensor],
    xs: Sequence[torch.Tensor],
    invariants: Sequence[torch.Tensor],
    reverse: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The reference implementation: a plain loop. Shapes as in the module's docstring."""
    count = len(carries)
    state = tuple(carries)
    steps: list[tuple[torch.Tensor, ...]] = []
    for t in range(trip - 1, -1, -1) if reverse else range(trip):
        out = body(*state, *(x[t] for x in xs), *invariants)
        state = tuple(out[:count])
        steps.append(tuple(out[count:]))
    if reverse:
        steps.reverse()
    if not steps:
        return (*state, *_no_steps(body, state, xs, invariants))
    return (*state, *(torch.stack(column) for column in zip(*steps, strict=True)))


def _no_steps(
    body: Body, state: Sequence[torch.Tensor], xs: Sequence[torch.Tensor], invariants: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    out = body(*state, *(x.new_zeros(x.shape[1:]) for x in xs), *invariants)
    return tuple(y.new_empty((0, *y.shape)) for y in out[len(state) :])


def recurrence_shapes(
    body: fx.GraphModule,
    trip: int | torch.SymInt,
    carries: Sequence[torch.Tensor],
    xs: Sequence[torch.Tensor],
    invariants: Sequence[torch.Tensor],
    reverse: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The shape rule: one step on fake tensors. Also refreshes ``meta["val"]`` inside the body."""
    # Not x[0]: a number of steps like s // 64 may be 0 at the traced sizes.
    out = Propagate(body).run(*carries, *(x.new_empty(x.shape[1:]) for x in xs), *invariants)
    ys = out[len(carries) :]
    return (*out[: len(carries)], *(y.new_empty((trip, *y.shape)) for y in ys))


class Propagate(fx.Interpreter):
    """Recomputes ``meta["val"]`` of every node, bodies of recurrences included; run it on fake tensors, without guards.

    What a value was computed from is kept in ``meta["computed_from"]``: a call that is the same, on values of the same
    shapes and dtypes, is not run again, and a value that comes out as it was stays, so that its users are the same too.
    Strides mean nothing here.
    """

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            return super().run_node(n)
        call = _call_of(n, self.map_nodes_to_values) if _is_operation(n) else None
        if call is not None and _torch.alike(n.meta.get("computed_from"), call):
            return n.meta["val"]
        result = super().run_node(n)
        if not _torch.alike(n.meta.get("val"), result):
            n.meta["val"] = result
        if call is not None:
            n.meta["computed_from"] = call
        return n.meta["val"]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is recurrence:
            return recurrence_shapes(*args, **kwargs)
        if target is choose:
            _, long, *_, operands = args
            return tuple(Propagate(long).run(*operands))
        return super().call_function(_torch.shape_rule(target), args, kwargs)


def _is_operation(node: fx.Node) -> bool:
    """A call whose value depends on its arguments alone, and on no body."""
    return node.op == "call_function" and node.target not in (recurrence, choose)


def _call_of(node: fx.Node, values: Callable[[Any, fx.Node], Any]) -> tuple[Any, ...]:
    return node.target, values(node.args, node), values(node.kwargs, node)


def trust_values(graph: fx.Graph) -> None:
    """Let ``propagate`` take every ``meta["val"]`` of a fresh trace as computed from those of the node's arguments."""
    for node in graph.nodes:
        if _is_operation(node):
            node.meta["computed_from"] = _call_of(node, lambda args, _: fx.map_arg(args, lambda n: n.meta["val"]))


@dataclass(frozen=True)
class Parts:
    """The arguments of a recurrence node by name."""

    node: fx.Node
    body: fx.GraphModule
    trip: Any
    carries: tuple[fx.Node, ...]
    xs: tuple[fx.Node, ...]
    invariants: tuple[fx.Node, ...]
    reverse: bool

    @property
    def body_carries(self) -> list[fx.Node]:
        return self._inputs[: len(self.carries)]

    @property
    def body_xs(self) -> list[fx.Node]:
        return self._inputs[len(self.carries) : len(self.carries) + len(self.xs)]

    @property
    def body_invariants(self) -> list[fx.Node]:
        return self._inputs[len(self.carries) + len(self.xs) :]

    @property
    def next_carries(self) -> list[fx.Node]:
        return list(self.body.graph.output_node().args[0])[: len(self.carries)]  # type: ignore[arg-type]

    @property
    def ys(self) -> list[fx.Node]:
        return list(self.body.graph.output_node().args[0])[len(self.carries) :]  # type: ignore[arg-type]

    @property
    def _inputs(self) -> list[fx.Node]:
        return [n for n in self.body.graph.nodes if n.op == "placeholder"]


def parts(node: fx.Node) -> Parts:
    """The arguments of a recurrence node by name."""
    body, trip, carries, xs, invariants, *rest = node.args
    assert isinstance(body, fx.Node)
    owner = node.graph.owning_module
    module = owner.get_submodule(str(body.target))  # type: ignore[union-attr]
    assert isinstance(module, fx.GraphModule)
    reverse = bool(rest[0]) if rest else bool(node.kwargs.get("reverse", False))
    return Parts(node, module, trip, tuple(carries), tuple(xs), tuple(invariants), reverse)  # type: ignore[arg-type]


def always_steps(dims: Iterable[Dim], loop: Parts) -> bool:
    """Whether the trip count is proved to be at least 1 for all sizes in the ranges of ``dims``."""
    trip = loop.trip.meta["val"] if isinstance(loop.trip, fx.Node) else loop.trip
    return at_least_one(dims, trip)


def is_recurrence(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is recurrence


def is_branch(node: fx.Node) -> bool:
    """Whether a recurrence makes at most one step, whose number only tells whether it is made: an ``if``."""
    loop = parts(node)
    known = isinstance(loop.trip, fx.Node) and _torch.largest(loop.trip.meta["val"]) == 1
    return known and not loop.xs and not loop.ys


def propagate(gm: fx.GraphModule, *inputs: Any) -> None:
    """Refresh every ``meta["val"]`` of ``gm`` from its placeholders' (or the given) fake values, freezing no size."""
    values = inputs or tuple(n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder")
    mode = _torch.fake_mode_of(gm)
    with _torch.faking(mode):
        Propagate(gm).run(*values)
