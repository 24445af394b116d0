"""Forms of ``seqc::softmax_scan``."""

from __future__ import annotations

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import Lowering, trip_of
from seqc.program import named_args
from seqc.write_loop import write_loop

aten = torch.ops.aten

_STATES = 3


def sequential(emit: Emitter, node: fx.Node) -> list[fx.Node]:
    """A loop over the maximum and, of numerator and denominator, what is read."""
    score, value, decay, *initial, reverse = named_args(node).values()
    read = {int(user.args[1]) for user in node.users if user.users}  # type: ignore[arg-type]
    kept_up = [i for i in range(_STATES) if i == 0 or not read.isdisjoint((i, i + _STATES))]
    walked = [i for i in kept_up if i in read]
    xs = {"score": score, "value": value if 1 in kept_up else None, "decay": decay}
    constant = decay is not None and decay.meta["val"].shape[0] == 1
    invariants = [emit(aten.squeeze.dim, xs.pop("decay"), 0)] if constant else []
    xs = {name: x for name, x in xs.items() if x is not None}

    def step(
        inner: Emitter, carries: list[fx.Node], given: list[fx.Node], fixed: list[fx.Node]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        states, operands = dict(zip(kept_up, carries, strict=True)), dict(zip(xs, given, strict=True))
        late = fixed[0] if fixed else operands.get("decay")
        before = states[0] if late is None else inner(aten.add.Tensor, states[0], late)
        top, old, new = weights(inner, before, operands["score"])
        following = {0: top}
        for i in kept_up[1:]:
            added = inner(aten.mul.Tensor, new, operands["value"]) if i == 1 else new
            following[i] = inner(aten.add.Tensor, inner(aten.mul.Tensor, old, states[i]), added)
        return list(following.values()), [following[i] for i in walked]

    states = [initial[i] for i in kept_up]
    out = write_loop(emit, step, trip_of(emit, score), states, list(xs.values()), invariants, bool(reverse))
    found = dict(zip([*(i + _STATES for i in kept_up), *walked], out, strict=True))
    return [found.get(i, score) for i in range(2 * _STATES)]  # nothing reads the others


def weights(emit: Emitter, before: fx.Node, score: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The new maximum, the factor of what was summed before, and that of the value which ``score`` weighs."""
    top = emit(aten.maximum.default, before, score)
    finite = emit(aten.clamp_min.default, top, torch.finfo(top.meta["val"].dtype).min)
    old, new = (emit(aten.exp.default, emit(aten.sub.Tensor, a, finite)) for a in (before, score))
    return top, old, new


LOWERINGS = (
    Lowering(
        "seqc::softmax_scan",
        "sequential",
        "a loop over the maximum, the numerator and the denominator",
        sequential,
    ),
)
