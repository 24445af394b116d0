"""Running maxima, top = max(top + decay, score), over chunks: as many steps of a loop as there are chunks.

The monoid is max-plus: of two stretches of steps, (m1, d1) and (m2, d2), the maximum is max(m1 + d2, m2) and the decay d1 + d2.
Within a chunk it is scanned in logarithmic depth (Hillis and Steele, "Data parallel algorithms", 1986), for all chunks at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from seqc.emit import Emitter
from seqc.lowerings.base import size_of, trip_of
from seqc.lowerings.blocks import padded, whole_blocks
from seqc.write_loop import write_loop

aten = torch.ops.aten

CHUNK = 64


def maxima(emit: Emitter, score: fx.Node, decay: fx.Node | None, top: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(``top`` in front of each step, its decay added; behind each step), like ``score`` [T, ...].

    ``decay`` is [T, ...], or [1, ...] and the same at every step; ``top`` [...] what there was before the first.
    """
    trip = trip_of(emit, score)
    count, whole, missing = whole_blocks(emit, trip, CHUNK)
    rest = [size_of(emit, score, axis) for axis in range(1, score.meta["val"].dim())]

    def split(x: fx.Node, fill: float) -> fx.Node:
        sizes = [size_of(emit, x, axis) for axis in range(1, x.meta["val"].dim())]
        x = x if missing == 0 else padded(emit, x, missing, fill)
        return emit(aten.reshape.default, x, [count, CHUNK, *sizes])

    timed = decay is not None and decay.meta["val"].shape[0] != 1
    best = split(score, -torch.inf)
    total = split(decay, 0.0) if decay is not None and timed else None
    distance = 1
    while distance < CHUNK:
        before = _shifted(emit, best, distance, -torch.inf)
        if total is not None:
            before = emit(aten.add.Tensor, before, total)
            total = emit(aten.add.Tensor, total, _shifted(emit, total, distance, 0.0))
        elif decay is not None:
            before = emit(aten.add.Tensor, before, emit(aten.mul.Tensor, decay, float(distance)))
        best = emit(aten.maximum.default, best, before)
        distance *= 2
    if total is None and decay is not None:
        steps = emit(aten.arange.start, 1, CHUNK + 1, dtype=decay.meta["val"].dtype)
        steps = emit(aten.reshape.default, steps, [CHUNK, *(1 for _ in rest)])
        total = emit(aten.unsqueeze.default, emit(aten.mul.Tensor, steps, decay), 0)
    entering = _between_chunks(emit, best, total, top, count)
    if total is not None:
        entering = emit(aten.add.Tensor, entering, total)
    tops = emit(aten.reshape.default, emit(aten.maximum.default, best, entering), [whole, *rest])
    tops = tops if missing == 0 else emit(aten.slice.Tensor, tops, 0, 0, trip)
    before = emit(aten.cat.default, [emit(aten.unsqueeze.default, top, 0), emit(aten.slice.Tensor, tops, 0, 0, -1)], 0)
    return before if decay is None else emit(aten.add.Tensor, before, decay), tops


def _between_chunks(emit: Emitter, best: fx.Node, total: fx.Node | None, top: fx.Node, count: Any) -> fx.Node:
    """The maximum in front of each chunk [count, 1, ...]; chunks that decay alike have one ``total`` [1, CHUNK, ...]."""
    last = [emit(aten.select.int, x, 1, CHUNK - 1) for x in (best, total) if x is not None]
    alike = total is not None and total.meta["val"].shape[0] == 1
    fixed = [emit(aten.select.int, last.pop(), 0, 0)] if alike else []

    def step(
        inner: Emitter, carries: list[fx.Node], xs: list[fx.Node], invariants: list[fx.Node]
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        late = [*xs[1:], *invariants]
        before = inner(aten.add.Tensor, carries[0], late[0]) if late else carries[0]
        return [inner(aten.maximum.default, before, xs[0])], [inner(aten.clone.default, carries[0])]

    _, entering = write_loop(emit, step, count, [top], last, fixed)
    return emit(aten.unsqueeze.default, entering, 1)


def _shifted(emit: Emitter, x: fx.Node, distance: int, fill: float) -> fx.Node:
    """``x`` [count, CHUNK, ...] as it was ``distance`` steps before in its chunk, ``fill`` where there was none."""
    kept = emit(aten.slice.Tensor, x, 1, 0, CHUNK - distance)
    return emit(aten.constant_pad_nd.default, kept, [0, 0] * (x.meta["val"].dim() - 2) + [distance, 0], fill)
