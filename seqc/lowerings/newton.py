"""Newton's method for loops that are not linear: all steps at once, instead of one after the other.

A loop h_t = f(h_{t-1}, x_t) is a system of equations with one unknown for each step. Newton's method solves it by a few
linear recurrences over all steps, h_t += d_t with

    d_t = J_t d_{t-1} + (f(h_{t-1}, x_t) - h_t)         J_t = df/dh at h_{t-1}

from the guess h_t = f(h_0, x_t). Where each element of a state is computed from its own place only, J_t has one number
for each element (for m coupled states m x m of them), so a correction is a scan. Sources: Lim et al., "Parallelizing
non-linear sequential models over the sequence length" (DEER, 2024); Danieli et al., "ParaRNN" (2025).

The method may diverge: measured, it needs 3 to 5 iterations at recurrent gains up to 0.5 and never ends at large ones. So
the graph itself checks what came out: where f(h_{t-1}, x_t) - h_t is not small in every step, NaN included, it takes the
loop instead. What passes is what a loop gives that rounds each of its steps to the tolerance.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from seqc import _torch
from seqc.batch import Value
from seqc.emit import Emitter
from seqc.jacobian import Jacobian, NotElementwise, jacobian
from seqc.loop import Loop
from seqc.lowerings.base import Lowering, Refused
from seqc.ops.recurrence import recurrence, recurrence_shapes
from seqc.outside import Outside
from seqc.program import place_of
from seqc.verify import same_shape
from seqc.write_loop import write_loop

aten = torch.ops.aten

# A residual of a few roundings is as small as it gets.
_ROUNDINGS = 8


def newton(emit: Emitter, node: fx.Node, iterations: int, tolerance: float) -> list[fx.Node]:
    """All steps at once, and the loop for where that did not converge."""
    loop = Loop(emit.gm, node, emit.mode)
    loop.emit = emit
    steps = _Steps(emit, loop, _jacobian(loop))
    h = steps.guess()
    for _ in range(iterations):
        h = steps.corrected(h)
    found, results = steps.results(h)
    return _unless(emit, steps.failed(h, found, tolerance), results, loop)


def _jacobian(loop: Loop) -> Jacobian:
    states = [inner for _, inner in loop.carries]
    if not states:
        raise Refused("it has no state")
    first = states[0].meta["val"]
    if not first.is_floating_point():
        raise Refused(f"its state is {first.dtype}")
    if not loop.xs and isinstance(loop.trip, fx.Node):
        raise Refused("it reads nothing that differs from step to step")
    if any(not same_shape(s.meta["val"].shape, first.shape) or s.meta["val"].dtype != first.dtype for s in states):
        raise Refused("its states have different shapes or dtypes")
    try:
        found = jacobian(states, loop.next_carries)
    except NotElementwise as reason:
        raise Refused(str(reason)) from reason
    if found.is_constant:
        raise Refused("it is affine in its state, which takes no iterations")
    return found


class _Steps:
    """The equations of all steps: states are lists of nodes [trip, ...], one for each carry."""

    def __init__(self, emit: Emitter, loop: Loop, derived: Jacobian) -> None:
        self.emit, self.loop, self.derived = emit, loop, derived
        self.initial = [outer for outer, _ in loop.carries]
        self.outside = Outside(loop)
        self.operands = [self._operand(node) for node in derived.operands]

    def _operand(self, node: fx.Node) -> fx.Node:
        """``node`` of the body for all steps at once, so that it broadcasts against the states of all steps."""
        value = self._value(node)
        aligned = value.node
        for _ in range(self.initial[0].meta["val"].dim() - value.rank if value.batched else 0):
            aligned = self.emit(aten.unsqueeze.default, aligned, 1)
        return aligned

    def _value(self, node: fx.Node) -> Value:
        value = self.outside.value(node)
        if value is None:
            raise Refused(f"there is no rule to compute {node.target} at {place_of(node)} for all steps at once")
        return value

    def _every_step(self, value: Value) -> fx.Node:
        """``value`` as [trip, ...], repeated where it is the same in each step."""
        if value.batched:
            return value.node
        lead = self.emit(aten.unsqueeze.default, value.node, 0)
        return self.emit(aten.expand.default, lead, [self.loop.trip, *([-1] * value.rank)])

    def guess(self) -> list[fx.Node]:
        """The states after each step from the initial ones in front of it."""
        return self.after([self._every_step(Value(initial, False)) for initial in self.initial])

    def after(self, before: Sequence[fx.Node]) -> list[fx.Node]:
        """The states after each step from those in front of it."""
        values = self.derived.write(self.emit, [*before, *self.operands], self.derived.following)
        return [self._full(value, before[0]) for value in values]

    def _full(self, value: fx.Node | float, like: fx.Node) -> fx.Node:
        if not isinstance(value, fx.Node):
            return self.emit(aten.full_like.default, like, value)
        if value.meta["val"].dtype != like.meta["val"].dtype:
            raise Refused(f"a derivative is {value.meta['val'].dtype}, the state {like.meta['val'].dtype}")
        same = same_shape(value.meta["val"].shape, like.meta["val"].shape)
        return value if same else self.emit(aten.expand_as.default, value, like)

    def with_ends(self, h: Sequence[fx.Node]) -> list[fx.Node]:
        """[trip + 1, ...]: the states and the initial ones, in order of time."""
        firsts = [self.emit(aten.unsqueeze.default, initial, 0) for initial in self.initial]
        pairs = zip(firsts, h, strict=True)
        return [self.emit(aten.cat.default, [b, a] if self.loop.reverse else [a, b], 0) for a, b in pairs]

    def before(self, h: Sequence[fx.Node]) -> list[fx.Node]:
        """The states in front of each step from those after each."""
        start, stop = (1, 2**63 - 1) if self.loop.reverse else (0, self.loop.trip)
        return [self.emit(aten.slice.Tensor, x, 0, start, stop) for x in self.with_ends(h)]

    def corrected(self, h: Sequence[fx.Node]) -> list[fx.Node]:
        """One iteration."""
        derived, count = self.derived, len(h)
        before = self.before(h)
        wanted = [*derived.following, *derived.entries.values()]
        values = derived.write(self.emit, [*before, *self.operands], wanted)
        after = [self._full(value, before[0]) for value in values[:count]]
        residuals = [self.emit(aten.sub.Tensor, a, b) for a, b in zip(after, h, strict=True)]
        rates = {at: self._full(value, before[0]) for at, value in zip(derived.entries, values[count:], strict=True)}
        return [self.emit(aten.add.Tensor, a, d) for a, d in zip(h, self._scan(rates, residuals), strict=True)]

    def _scan(self, rates: dict[tuple[int, int], fx.Node], residuals: list[fx.Node]) -> list[fx.Node]:
        """d_t = rates_t d_{t-1} + residuals_t from d_0 = 0."""
        emit, reverse = self.emit, self.loop.reverse
        zeros = [emit(aten.zeros_like.default, initial) for initial in self.initial]
        if len(residuals) == 1:
            scan = emit(torch.ops.seqc.linear_scan.default, rates[0, 0], residuals[0], zeros[0], reverse)
            return [emit(operator.getitem, scan, 0)]
        places = list(rates)

        def step(inner: Emitter, d: list[fx.Node], xs: list[fx.Node], _: list[fx.Node]) -> Any:
            following = xs[len(places) :]
            for (i, j), rate in zip(places, xs, strict=False):
                following[i] = inner(aten.add.Tensor, following[i], inner(aten.mul.Tensor, rate, d[j]))
            return following, following

        values = write_loop(emit, step, self.loop.trip, zeros, [*rates.values(), *residuals], reverse=reverse)
        return values[len(zeros) :]

    def results(self, h: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """The states after each step once more, from ``h`` in front of it, and the loop's results with these."""
        loop, emit = self.loop, self.emit
        for (_, inner), before in zip(loop.carries, self.before(h), strict=True):
            self.outside.known[inner] = Value(before, True)
        after = [self._every_step(self._value(node)) for node in loop.next_carries]
        ends = self.with_ends(after)
        finals = [emit(aten.select.int, x, 0, 0 if loop.reverse else loop.trip) for x in ends]
        return after, finals + [self._every_step(self._value(node)) for node in loop.ys]

    def failed(self, h: Sequence[fx.Node], after: Sequence[fx.Node], tolerance: float) -> fx.Node:
        """A Boolean: whether the equation of any step is off by more than ``tolerance`` of the states' scale, or NaN."""
        emit = self.emit
        tolerance = max(tolerance, _ROUNDINGS * torch.finfo(h[0].meta["val"].dtype).eps)
        found: fx.Node | None = None
        for x, again, ends in zip(h, after, self.with_ends(after), strict=True):
            axes = list(range(ends.meta["val"].dim()))
            most = emit(aten.mul.Tensor, emit(aten.amax.default, emit(aten.abs.default, ends), axes), tolerance)
            residual = emit(aten.abs.default, emit(aten.sub.Tensor, again, x))
            # Compared element by element: a maximum need not keep a NaN, a comparison with one is always False.
            small = emit(aten.le.Tensor, residual, most)
            off = emit(aten.any.default, emit(aten.logical_not.default, small))
            found = off if found is None else emit(aten.logical_or.default, found, off)
        assert found is not None
        return found


def _unless(emit: Emitter, failed: fx.Node, results: list[fx.Node], loop: Loop) -> list[fx.Node]:
    """``results``, or where ``failed`` those of the loop: it stands in a loop of at most one step, which is a branch."""
    times = emit(aten._local_scalar_dense.default, emit(aten._to_copy.default, failed, dtype=torch.int64))
    _torch.set_largest(_torch.size_expr(times.meta["val"]), emit.mode, 1)
    groups = [[outer for outer, _ in group] for group in (loop.carries, loop.xs, loop.invariants)]

    def step(inner: Emitter, _: list[fx.Node], __: list[fx.Node], read: list[fx.Node]) -> Any:
        carries, xs, invariants = (
            read[: len(groups[0])],
            read[len(groups[0]) : len(groups[0]) + len(groups[1])],
            read[len(groups[0]) + len(groups[1]) :],
        )
        inner.gm.add_submodule("body_0", loop.body)
        trip = inner(aten.sym_size.int, xs[0], 0) if xs else loop.trip
        steps = trip.meta["val"] if isinstance(trip, fx.Node) else trip
        values = [[n.meta["val"] for n in group] for group in (carries, xs, invariants)]
        val = inner.compute(lambda: recurrence_shapes(loop.body, steps, values[0], values[1], values[2], loop.reverse))
        args = (inner.graph.get_attr("body_0"), trip, tuple(carries), tuple(xs), tuple(invariants), loop.reverse)
        node = inner.written(recurrence, args, val)
        return [inner(operator.getitem, node, i) for i in range(len(val))], []

    return write_loop(emit, step, times, results, [], [n for group in groups for n in group])


LOWERINGS = (
    Lowering(
        "seqc::recurrence",
        "newton",
        "Newton's method over all steps at once, and the loop where the graph finds that it did not converge",
        newton,
    ),
)
