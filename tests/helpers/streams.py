"""Running a streaming Program piece by piece."""

from __future__ import annotations

import random

import torch

from seqc.program import Program
from seqc.streaming.chunks import first_state


def in_pieces(
    program: Program, inputs: dict[str, torch.Tensor], seed: int = 0, steps: int | None = None
) -> list[torch.Tensor]:
    """The outputs over all steps of ``inputs``, taken ``steps`` at a time, or few at random.

    Inputs and outputs have the batch at axis 0 and the sequence at axis 1; outputs without it are those of the last piece.
    """
    rows, length = next(iter(inputs.values())).shape[:2]
    # what is in places that were not written must not matter
    states = [
        first_state(s, rows, length) if s.grows is None else first_state(s, rows, length) + 7 for s in program.states
    ]
    generator = random.Random(seed)
    pieces: list[tuple[torch.Tensor, ...]] = []
    at = 0
    while at < length:
        count = min(steps or generator.choice([1, 1, 2, 5]), length - at)
        given = [inputs[p.name][:, at : at + count] for p in program.given_inputs]
        results = program(*given, *states)
        split = len(program.own_outputs)
        pieces.append(results[:split])
        states = list(results[split:])
        at += count
    return [
        pieces[-1][i]
        if port.shape[1:2] and isinstance(port.shape[1], int) and any(d.name == "sequence" for d in program.dims)
        else torch.cat([p[i] for p in pieces], 1)
        for i, port in enumerate(program.own_outputs)
    ]
