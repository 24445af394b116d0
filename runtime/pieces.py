"""A sequence that is already there, taken piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from seqc.runtime.inputs import Array

if TYPE_CHECKING:
    from seqc.runtime.session import Session
    from seqc.runtime.stream import Stream


def length(session: Session, inputs: Mapping[str, Array]) -> int:
    """The number of steps in checked ``inputs``."""
    return min(int(inputs[name].shape[axis]) for name, axis in _axes(session).items())


def in_pieces(session: Session, stream: Stream, inputs: Mapping[str, Array], counts: Iterable[int]) -> dict[str, Array]:
    """The outputs of ``stream`` for all steps of ``inputs``, taken as many at a time as ``counts`` says, up to the last one.

    Outputs with an axis of steps are put together along it; the others are those of the last piece.
    """
    axes, steps_dim = _axes(session), session.manifest.steps_dim
    total, at = length(session, inputs), 0
    pieces: list[dict[str, Array]] = []
    for count in counts:
        if at >= total:
            break
        piece = {n: _part(v, axes[n], at, min(count, total - at)) if n in axes else v for n, v in inputs.items()}
        pieces.append(stream.step(piece))
        at += count
    return {
        port.name: np.concatenate([p[port.name] for p in pieces], port.shape.index(steps_dim))
        if steps_dim in port.shape
        else pieces[-1][port.name]
        for port in session.outputs
    }


def _axes(session: Session) -> dict[str, int]:
    steps_dim = session.manifest.steps_dim
    return {p.name: p.shape.index(steps_dim) for p in session.inputs if steps_dim in p.shape}


def _part(value: Array, axis: int, start: int, count: int) -> Array:
    return value[(slice(None),) * axis + (slice(start, start + count),)]
