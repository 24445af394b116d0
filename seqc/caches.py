"""How the rows of a cache are stored: the tensors that a row becomes, and what is made of them again where they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.fx as fx

from seqc.emit import Emitter

aten = torch.ops.aten


@dataclass(frozen=True)
class Stored:
    """One of the tensors that rows become: what is put behind the name of its state, its type, and how long its rows are."""

    suffix: str
    dtype: torch.dtype
    size: int


class Scheme(Protocol):
    """A way to store rows: vectors along one axis, each by itself, so that rows can be moved without being rounded again."""

    @property
    def name(self) -> str: ...

    def stored(self, size: int) -> Sequence[Stored]:
        """The tensors that rows of so many numbers become; they have the shape of the rows but along the axis of these."""
        ...

    def row_bytes(self, size: int) -> int:
        """The bytes of a row of so many numbers."""
        ...

    def quantise(self, emit: Emitter, rows: fx.Node, axis: int) -> list[fx.Node]:
        """Write the tensors of floating-point ``rows``, vectors along ``axis``."""
        ...

    def dequantise(self, emit: Emitter, stored: Sequence[fx.Node], dtype: torch.dtype) -> fx.Node:
        """Write the rows again, in the type ``dtype``."""
        ...


@dataclass(frozen=True)
class Int8:
    """Whole numbers from -127 to 127 and a float32 scale, max|row| / 127, for each row: symmetric, rounded to nearest (even).

    A row is off by half a scale at most. ``rounded`` False leaves the rounding out, and stores floats: what shows that all the
    rest computes what it did before.
    """

    rounded: bool = True

    @property
    def name(self) -> str:
        return "int8"

    def stored(self, size: int) -> tuple[Stored, ...]:
        return Stored("", torch.int8 if self.rounded else torch.float32, size), Stored("_scale", torch.float32, 1)

    def row_bytes(self, size: int) -> int:
        return size + 4

    def quantise(self, emit: Emitter, rows: fx.Node, axis: int) -> list[fx.Node]:
        wide = (
            rows if rows.meta["val"].dtype is torch.float32 else emit(aten._to_copy.default, rows, dtype=torch.float32)
        )
        largest = emit(aten.amax.default, emit(aten.abs.default, wide), [axis], True)
        # of rows of zeros the scale is not 0, by which they are divided
        scale = emit(aten.div.Tensor, emit(aten.clamp.default, largest, 1e-30), 127.0)
        data = emit(aten.div.Tensor, wide, scale)
        if self.rounded:
            data = emit(aten._to_copy.default, emit(aten.round.default, data), dtype=torch.int8)
        return [data, scale]

    def dequantise(self, emit: Emitter, stored: Sequence[fx.Node], dtype: torch.dtype) -> fx.Node:
        data, scale = stored
        wide = emit(aten._to_copy.default, data, dtype=torch.float32) if self.rounded else data
        rows = emit(aten.mul.Tensor, wide, scale)
        return rows if dtype is torch.float32 else emit(aten._to_copy.default, rows, dtype=dtype)


SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (Int8(),)}
"""By their names, which are those that the option ``cache`` takes (:data:`seqc.options.CACHES`)."""
