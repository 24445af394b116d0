"""A streaming artifact, given whole sequences piece by piece."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from seqc.program import Program, State
from seqc.runtime import Session
from seqc.runtime.pieces import in_pieces, length
from seqc.runtime.states import to_json
from seqc.streaming.time import time_of

Arrays = dict[str, np.ndarray[Any, Any]]

# One step at a time, few, and many: what differs between them are the forms for one step and for several.
_PIECES = (1, 1, 2, 3, 7, 16, 64)


def in_chunks(session: Session, seed: int = 0) -> Callable[[Arrays], Arrays]:
    """The session as a function of whole sequences, which it is given in pieces of random lengths."""

    def run(inputs: Arrays) -> Arrays:
        generator = random.Random(f"{seed} {length(session, inputs)}")
        counts = iter(lambda: generator.choice(_PIECES), None)
        return in_pieces(session, session.stream(session.rows_in(inputs)), inputs, counts)

    return run


def first_states(program: Program, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The states before the first step, for as many rows and steps as ``inputs`` have."""
    steps = time_of(program).name
    rows = places = 1
    for port in program.given_inputs:
        for axis, size in enumerate(port.shape):
            if size == steps:
                places = inputs[port.name].shape[axis]
            elif isinstance(size, str):
                rows = inputs[port.name].shape[axis]
    return [first_state(state, rows, places) for state in program.states]


def first_state(state: State, rows: int, places: int) -> torch.Tensor:
    """A state before the first step, of ``rows`` streams and with so many places where it grows."""
    value = state.initial if state.batch_axis is None else torch.cat([state.initial] * rows, state.batch_axis)
    if state.grows is None:
        return value
    return value.new_zeros([places if a == state.grows else n for a, n in enumerate(value.shape)])


def states_json(program: Program) -> list[dict[str, Any]]:
    """The states as the manifest describes them."""
    ports = program.inputs[len(program.given_inputs) :]
    return [
        {
            "name": state.name,
            "next": state.next_name,
            "dtype": str(port.dtype).removeprefix("torch."),
            "shape": list(port.shape),
            "initial": to_json(state.initial.numpy()),
            "batch_axis": state.batch_axis,
            "grows": state.grows,
            "pending": state.pending,
            "reset": "initial",
        }
        for state, port in zip(program.states, ports, strict=True)
    ]
