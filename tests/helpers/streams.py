"""Streaming Programs: deriving one, and running it piece by piece."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from seqc.passes import MakeStateful
from seqc.program import Port, Program
from seqc.streaming.chunks import first_state
from seqc.verify import verify


def stream_form(program: Program, steps: int | None = None) -> Program:
    """The derived step form of a traced Program, verified."""
    derived = program.copy()
    MakeStateful(steps=steps)(derived)
    verify(derived)
    return derived


def random_pieces(length: int, seed: int = 0) -> list[int]:
    """Lengths of pieces, few steps each, that make up ``length``."""
    generator, pieces = random.Random(seed), list[int]()
    while (left := length - sum(pieces)) > 0:
        pieces.append(min(generator.choice([1, 1, 2, 5]), left))
    return pieces


def in_pieces(program: Program, inputs: Mapping[str, torch.Tensor], pieces: Sequence[int]) -> list[torch.Tensor]:
    """The outputs over all steps of ``inputs``, taken in pieces of these lengths; those without steps from the last one.

    Steps are along the axis called sequence; along axis 1 where the Program takes a fixed number.
    """
    rows = next(iter(inputs.values())).shape[0]
    states = [first_state(s, rows, sum(pieces)) for s in program.states]
    # what is in places that were not written must not matter
    states = [value if s.grows is None else value + 7 for s, value in zip(program.states, states, strict=True)]
    found: list[tuple[torch.Tensor, ...]] = []
    at, count = 0, len(program.own_outputs)
    for steps in pieces:
        given = [inputs[p.name].narrow(_axis(program, p) or 0, at, steps) for p in program.given_inputs]
        results = program(*given, *states)
        found.append(results[:count])
        states = list(results[count:])
        at += steps
    axes = [_axis(program, port) for port in program.own_outputs]
    return [found[-1][i] if axis is None else torch.cat([f[i] for f in found], axis) for i, axis in enumerate(axes)]


def _axis(program: Program, port: Port) -> int | None:
    """The axis over the steps."""
    if any(d.name == "sequence" for d in program.dims):
        return port.shape.index("sequence") if "sequence" in port.shape else None
    return 1
