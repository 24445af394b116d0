"""The states of a streaming artifact, as its manifest describes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from seqc.errors import ArtifactError
from seqc.runtime.backend import Kept
from seqc.runtime.inputs import Array
from seqc.runtime.manifest import DimRange, Port, State, spell
from seqc.runtime.ort import keep
from seqc.runtime.shapes import evaluate


@dataclass(frozen=True)
class StatePort:
    """A state: the input ``port`` that takes it, and ``following``, the output that gives it for the next call.

    ``initial`` is its value before the first step, of one row (one stream) along ``batch_axis``; a state without that axis is
    shared by all rows that are in step. ``grows`` is the axis of a growing state's places, one for each step; ``initial`` has
    none of these. ``pending`` is the axis of its steps since the beginning of the last chunk, ``most_pending`` at most;
    ``initial`` has none of these either. ``put`` takes an array to where the model computes.
    """

    port: Port
    following: str
    initial: Array
    batch_axis: int | None
    grows: int | None = None
    pending: int | None = None
    most_pending: int = 0
    put: Callable[[Array], Kept] = keep

    def start(self, rows: int, places: int = 0) -> Array:
        """The state of ``rows`` streams before their first step, with room for so many where it grows."""
        value = self.initial if self.batch_axis is None else np.repeat(self.initial, rows, self.batch_axis)
        return self._with_room(value, 0, places)

    def _with_room(self, value: Array, taken: int, places: int) -> Array:
        """A copy with ``places``, of which those taken are filled; ``value`` itself where it does not grow."""
        if self.grows is None:
            return value
        shape = list(value.shape)
        shape[self.grows] = places
        result = np.zeros(shape, value.dtype)
        along = (slice(None),) * self.grows
        result[(*along, slice(taken))] = value[(*along, slice(taken))]
        return result

    def moved(self, value: Kept, taken: int, places: int) -> Kept:
        """The state in a new buffer of so many places, where it grows; what was taken of the old one is copied."""
        return value if self.grows is None else self.keep(self._with_room(value.numpy(), taken, places))

    def keep(self, value: Array) -> Kept:
        """``value`` where the model computes."""
        return self.put(value)

    def taken(self, value: Kept, taken: int) -> Array:
        """What is filled of the state."""
        return self._with_room(value.numpy(), taken, taken)

    def fault(self, value: Array, rows: int, steps: int) -> str:
        """What is wrong with ``value`` as this state of ``rows`` streams after ``steps``; empty where nothing is."""
        wanted = self.start(rows)
        if value.dtype == wanted.dtype and value.ndim == wanted.ndim:
            sizes = dict(enumerate(wanted.shape))
            if self.grows is not None:
                sizes[self.grows] = steps
            if self.pending is not None:
                sizes[self.pending] = steps if steps == 0 else (steps - 1) % self.most_pending + 1
            if value.shape == tuple(sizes.values()):
                return ""
        expected = f"{self.port.dtype}{spell(self.port.shape)}"
        return f"state {self.port.name!r} of {rows} rows must be {expected}, got {value.dtype}{spell(value.shape)}"

    def take(self, value: Kept, rows: list[int], taken: int) -> Kept:
        """The state of some of the streams of ``value``, with as many places as are taken."""
        if self.batch_axis is None:
            return self.moved(value, taken, taken)
        width = self.initial.shape[self.batch_axis]
        index = [row * width + i for row in rows for i in range(width)]
        return self.keep(np.take(self.taken(value, taken), index, self.batch_axis))

    def join(self, values: list[Kept], taken: int) -> Kept:
        """The state of the streams of all ``values``, in this order, with as many places as are taken."""
        if self.batch_axis is None:
            return self.moved(values[0], taken, taken)
        return self.keep(np.concatenate([self.taken(value, taken) for value in values], self.batch_axis))


@dataclass(frozen=True)
class StateMemory:
    """Bytes of the states of one row: ``fixed``, and ``per_step`` more for each step that was seen."""

    fixed: int
    per_step: int

    def total(self, rows: int = 1, steps: int = 0) -> int:
        """Bytes of ``rows`` rows that have seen ``steps`` steps each."""
        return rows * (self.fixed + steps * self.per_step)


def memory(states: Iterable[StatePort]) -> StateMemory:
    """What ``states`` take. One that all rows share is counted for each."""
    fixed = per_step = 0
    for state in states:
        sizes = [size for axis, size in enumerate(state.initial.shape) if axis not in (state.grows, state.pending)]
        count = math.prod(sizes) * state.initial.itemsize * (1 if state.pending is None else state.most_pending)
        fixed, per_step = (fixed + count, per_step) if state.grows is None else (fixed, per_step + count)
    return StateMemory(fixed, per_step)


def state_port(state: State, dims: Mapping[str, DimRange], put: Callable[[Array], Kept] = keep) -> StatePort:
    """The state that a manifest with these dimensions describes. Raises ArtifactError where its first value does not fit."""
    port, ones = state.port, dict.fromkeys(dims, 1)
    sizes = [size if isinstance(size, int) else evaluate(size, ones) for size in port.shape]
    none = (state.grows, state.pending)
    shape = tuple(0 if axis in none else 1 if size is None else size for axis, size in enumerate(sizes))
    try:
        initial = from_json(state.initial, shape, port.dtype)
    except ValueError as error:
        raise ArtifactError(f"the first value of state {port.name!r} does not fit {port}: {error}") from error
    most = 0 if state.pending is None else dims[str(port.shape[state.pending])].max or 0
    return StatePort(
        port, state.following, initial, state.batch_axis, state.grows, state.pending, most_pending=most, put=put
    )


def to_json(value: Array) -> Any:
    """A state's first value as strict JSON: one number where all are equal, else nested lists; infinities by name."""
    flat = value.reshape(-1)
    if flat.size == 0 or (flat == flat[0]).all():
        return _number(flat[0].item() if flat.size else 0.0)
    return [to_json(part) if part.ndim else _number(part.item()) for part in value]


def from_json(value: Any, shape: tuple[int, ...], dtype: str) -> Array:
    """The reverse of :func:`to_json`. Raises ValueError where it is not of that shape."""
    if isinstance(value, list):
        if not shape or len(value) != shape[0]:
            raise ValueError(f"expected {shape[0] if shape else 'a number'} entries, found {len(value)}")
        parts = [from_json(part, shape[1:], dtype) for part in value]
        return np.stack(parts) if parts else np.zeros(shape, dtype)
    if isinstance(value, str) and value not in ("inf", "-inf"):
        raise ValueError(f"{value!r} is no number")
    if not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is no number")
    return np.full(shape, float(value) if isinstance(value, str) else value, dtype)


def _number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
