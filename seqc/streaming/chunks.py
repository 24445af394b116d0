"""A streaming artifact, given whole sequences piece by piece."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from seqc.program import Program
from seqc.runtime import Session
from seqc.runtime.states import to_json
from seqc.streaming.time import time_of

Arrays = dict[str, np.ndarray[Any, Any]]

# One step at a time, few, and many: what differs between them are the forms for one step and for several.
_PIECES = (1, 1, 2, 3, 7, 16, 64)


def in_chunks(session: Session, seed: int = 0) -> Callable[[Arrays], Arrays]:
    """The session as a function of whole sequences, which it is given in pieces of random lengths."""
    steps_dim = session.manifest.steps_dim
    assert steps_dim is not None
    axes = {p.name: list(p.shape).index(steps_dim) for p in session.inputs if steps_dim in p.shape}

    def run(inputs: Arrays) -> Arrays:
        length = min(inputs[name].shape[axis] for name, axis in axes.items())
        generator = random.Random(f"{seed} {length}")
        stream = session.stream(session.rows_in(inputs))
        pieces: list[Arrays] = []
        at = 0
        while at < length:
            steps = min(generator.choice(_PIECES), length - at)
            piece = {n: _part(v, axes[n], at, steps) if n in axes else v for n, v in inputs.items()}
            pieces.append(stream.step(piece))
            at += steps
        return {
            port.name: np.concatenate([p[port.name] for p in pieces], list(port.shape).index(steps_dim))
            if steps_dim in port.shape
            else pieces[-1][port.name]
            for port in session.outputs
        }

    return run


def _part(value: np.ndarray[Any, Any], axis: int, start: int, count: int) -> np.ndarray[Any, Any]:
    return value[(slice(None),) * axis + (slice(start, start + count),)]


def first_states(program: Program, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The states before the first step, for as many rows as ``inputs`` have."""
    steps = time_of(program).name
    rows = 1
    for port in program.given_inputs:
        for axis, size in enumerate(port.shape):
            if isinstance(size, str) and size != steps:
                rows = inputs[port.name].shape[axis]
    return [s.initial if s.batch_axis is None else torch.cat([s.initial] * rows, s.batch_axis) for s in program.states]


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
            "reset": "initial",
        }
        for state, port in zip(program.states, ports, strict=True)
    ]
