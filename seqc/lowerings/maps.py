"""Linear maps of a group of states, one for each block of steps, and the prefix scan over the blocks.

A block makes A h + b of the states h in front of it; two in a row are (A2 A1, A2 b1 + b2). Nothing is divided, so maps that
are singular, such as decays of 0, are exact. Sources as in :mod:`seqc.lowerings.prefix`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from seqc.emit import Emitter

aten = torch.ops.aten

Entries = tuple[tuple[fx.Node | None, ...], ...]
"""``entries[i][j]`` is what state j adds to state i, None for nothing."""


@dataclass(frozen=True)
class Maps:
    """The algebra of maps with ``entries`` that act element by element, or (``mixed``) are matrices [.., to, from].

    States are [blocks, ...]; where ``mixed`` their last axis is the one whose elements are mixed. Entries have the same
    axes in front, or, where a map is the same for all blocks, all but the first.
    """

    emit: Emitter
    mixed: bool

    def product(self, after: Entries, before: Entries) -> Entries:
        """First ``before``, then ``after``."""
        return tuple(
            tuple(self._sum(self._times(row[k], before[k][j]) for k in range(len(before))) for j in range(len(before)))
            for row in after
        )

    def added(self, entries: Entries, states: Sequence[fx.Node], added: Sequence[fx.Node]) -> list[fx.Node]:
        """The map of ``states``, plus ``added``."""
        result = []
        for row, value in zip(entries, added, strict=True):
            total = self._sum(self._applied(entry, state) for entry, state in zip(row, states, strict=True))
            result.append(value if total is None else self.emit(aten.add.Tensor, total, value))
        return result

    def _sum(self, values: Any) -> fx.Node | None:
        total: fx.Node | None = None
        for value in values:
            if value is not None:
                total = value if total is None else self.emit(aten.add.Tensor, total, value)
        return total

    def _times(self, after: fx.Node | None, before: fx.Node | None) -> fx.Node | None:
        if after is None or before is None:
            return None
        return self.emit(aten.matmul.default if self.mixed else aten.mul.Tensor, after, before)

    def _applied(self, entry: fx.Node | None, state: fx.Node) -> fx.Node | None:
        if entry is None:
            return None
        if not self.mixed:
            return self.emit(aten.mul.Tensor, entry, state)
        emit, shape = self.emit, entry.meta["val"].shape
        if len(shape) > 2 and isinstance(shape[-3], int) and shape[-3] == 1:  # one matrix for several rows of states
            rows = emit(aten.transpose.int, emit(aten.squeeze.dim, entry, -3), -1, -2)
            return emit(aten.matmul.default, state, rows)
        column = emit(aten.matmul.default, entry, emit(aten.unsqueeze.default, state, -1))
        return emit(aten.squeeze.dim, column, -1)

    def entering(
        self,
        entries: Entries,
        constant: bool,
        added: Sequence[fx.Node],
        first: Sequence[fx.Node],
        count: Any,
        most: int,
        reverse: bool,
    ) -> list[fx.Node]:
        """The states in front of each of ``count`` blocks, at most ``most``: ``first``, then what each makes of those.

        With ``constant`` the entries are those of every block, without an axis of blocks.
        """
        emit = self.emit
        states = [self._behind(b, start, count, reverse) for b, start in zip(added, first, strict=True)]
        if all(entry is None for row in entries for entry in row):
            return states
        number = emit(aten.arange.default, count)
        if reverse:
            number = emit(aten.flip.default, number, [0])
        if not constant:
            entries = self._each(lambda a: self._shifted(a, 1, count, reverse), entries)
        distance = 1
        while distance < most:
            reached = emit(aten.ge.Scalar, number, distance)
            before = [self._shifted(b, distance, count, reverse) for b in states]
            further = self.added(entries, before, states)
            states = [self._where(reached, a, b) for a, b in zip(further, states, strict=True)]
            distance *= 2
            if distance >= most:
                break
            if constant:
                entries = self.product(entries, entries)
                continue
            earlier = self._each(lambda a, by=distance // 2: self._shifted(a, by, count, reverse), entries)
            longer = self.product(entries, earlier)
            entries = tuple(
                tuple(self._longer(reached, new, old) for new, old in zip(*rows, strict=True))
                for rows in zip(longer, entries, strict=True)
            )
        return states

    def _longer(self, reached: fx.Node, new: fx.Node | None, old: fx.Node | None) -> fx.Node | None:
        if new is None and old is None:
            return None
        new, old = (self.emit(aten.zeros_like.default, b) if a is None else a for a, b in ((new, old), (old, new)))
        return self._where(reached, new, old)

    def _each(self, function: Any, entries: Entries) -> Entries:
        return tuple(tuple(None if a is None else function(a) for a in row) for row in entries)

    def _behind(self, ends: fx.Node, first: fx.Node, count: Any, reverse: bool) -> fx.Node:
        """``ends`` [count, ...] of the blocks before, ``first`` in front of the first block."""
        lead = self.emit(aten.unsqueeze.default, first, 0)
        if reverse:
            return self.emit(aten.slice.Tensor, self.emit(aten.cat.default, [ends, lead], 0), 0, 1, 2**63 - 1)
        return self.emit(aten.slice.Tensor, self.emit(aten.cat.default, [lead, ends], 0), 0, 0, count)

    def _shifted(self, x: fx.Node, distance: int, count: Any, reverse: bool) -> fx.Node:
        """``x`` [count, ...] as it was ``distance`` blocks before, 0 where there was none."""
        emit, others = self.emit, [0, 0] * (x.meta["val"].dim() - 1)
        if reverse:
            padded = emit(aten.constant_pad_nd.default, x, [*others, 0, distance])
            return emit(aten.slice.Tensor, padded, 0, distance, 2**63 - 1)
        return emit(aten.slice.Tensor, emit(aten.constant_pad_nd.default, x, [*others, distance, 0]), 0, 0, count)

    def _where(self, condition: fx.Node, yes: fx.Node, no: fx.Node) -> fx.Node:
        shape = [-1] + [1] * (no.meta["val"].dim() - 1)
        return self.emit(aten.where.self, self.emit(aten.reshape.default, condition, shape), yes, no)
