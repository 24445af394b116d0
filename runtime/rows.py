"""Which axis of each input and output is the rows (independent sequences), and which the steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from seqc.runtime.inputs import Array
from seqc.runtime.manifest import Manifest, Port

_NAME = re.compile(r"[A-Za-z_]\w*")


class Rows:
    """The rows of an artifact's inputs and outputs. ``batch`` is the name of their dimension; None where there is one row."""

    def __init__(self, manifest: Manifest) -> None:
        self.steps_dim = manifest.steps_dim
        self.inputs, self.outputs = manifest.inputs, manifest.outputs
        names = [n for p in manifest.inputs for s in p.shape for n in _NAME.findall(str(s))]
        others = [n for n in dict.fromkeys(names) if n in manifest.dims and n != manifest.steps_dim]
        self.batch = others[0] if others else None

    def count(self, arrays: Mapping[str, Array]) -> int:
        """The number of rows of checked inputs."""
        return self._size(arrays, self.batch)

    def steps(self, arrays: Mapping[str, Array]) -> int:
        """The number of steps of checked inputs."""
        return self._size(arrays, self.steps_dim)

    def taken(self, arrays: Mapping[str, Array], rows: Sequence[int], count: int) -> dict[str, Array]:
        """Some of ``count`` rows of the inputs."""
        if list(rows) == list(range(count)):
            return dict(arrays)
        found = {}
        for port in self.inputs:
            axis = self._axis(port)
            found[port.name] = arrays[port.name] if axis is None else _take(arrays[port.name], axis, rows, count)
        return found

    def put_together(self, parts: Sequence[tuple[list[int], dict[str, Array]]], count: int) -> dict[str, Array]:
        """The outputs of all rows, from those of some rows each."""
        if len(parts) == 1 and parts[0][0] == list(range(count)):
            return parts[0][1]
        found = {}
        for port in self.outputs:
            axis = self._axis(port)
            values = [outputs[port.name] for _, outputs in parts]
            if axis is None:
                found[port.name] = values[-1]
                continue
            order = [row for rows, _ in parts for row in rows]
            found[port.name] = _take(np.concatenate(values, axis), axis, np.argsort(order).tolist(), len(order))
        return found

    def _size(self, arrays: Mapping[str, Array], dim: str | None) -> int:
        for port in self.inputs:
            if dim in port.shape:
                return int(arrays[port.name].shape[port.shape.index(dim)])
        return 1

    def _axis(self, port: Port) -> int | None:
        for axis, size in enumerate(port.shape):
            if self.batch in _NAME.findall(str(size)):
                return axis
        return None


def _take(value: Array, axis: int, rows: Sequence[int], count: int) -> Array:
    """Some of ``count`` rows, each of which may be several entries along ``axis``."""
    width = value.shape[axis] // count
    return np.take(value, [row * width + i for row in rows for i in range(width)], axis)
