"""A stream: sequences that come piece by piece, and their states in between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from seqc.errors import ArtifactError
from seqc.runtime import saved
from seqc.runtime.backend import Kept
from seqc.runtime.inputs import Array
from seqc.runtime.room import Room, places

if TYPE_CHECKING:
    from seqc.runtime.session import Session

_FORMAT = 1


@dataclass(frozen=True)
class Group:
    """Rows that go through the model together: where it counts steps, all of them have seen equally many.

    ``positions`` has the steps that each row has seen, ``states`` one value per state of the artifact, whose rows are in the
    order of ``rows``. They are never written to, but for places of ``room`` in growing states that were claimed there.
    """

    rows: tuple[int, ...]
    positions: tuple[int, ...]
    states: tuple[Kept, ...]
    room: Room

    @property
    def position(self) -> int:
        """The steps that the rows have seen where the model counts these."""
        return self.positions[0]


class Stream:
    """The states of ``batch_size`` independent sequences; make one with :meth:`Session.stream`.

    A stream belongs to one thread at a time; several streams of one session may run at once.
    """

    def __init__(self, session: Session, batch_size: int = 1) -> None:
        if batch_size < 1:
            raise ArtifactError(f"a stream has at least one row, not {batch_size}")
        self._session = session
        self._size = batch_size
        self._groups: tuple[Group, ...] = (self._fresh(tuple(range(batch_size))),)

    @property
    def batch_size(self) -> int:
        """The number of independent sequences."""
        return self._size

    @property
    def positions(self) -> tuple[int, ...]:
        """How many steps each row has seen."""
        found = {row: n for group in self._groups for row, n in zip(group.rows, group.positions, strict=True)}
        return tuple(found[row] for row in range(self._size))

    def step(self, inputs: Mapping[str, Array], rows: Sequence[int] | None = None) -> dict[str, Array]:
        """Take the next steps, one or more of them, of every row, or of ``rows`` only; the others stay as they are.

        Args:
            inputs: one array per input of the artifact, of the new steps alone; its rows are those asked for, in order.

        Returns:
            One array per output, of the new steps. Outputs without an axis of steps are what they are at the end.

        Raises:
            ArtifactError: an input does not fit, or the model failed; the stream is then as it was.
        """
        asked = list(range(self._size)) if rows is None else self._checked(rows)
        arrays, steps = self._session.prepare_step(inputs, len(asked))
        place = {row: i for i, row in enumerate(asked)}
        groups: list[Group] = []
        results: list[tuple[list[int], dict[str, Array]]] = []
        for group in self._groups:
            moving = [row for row in group.rows if row in place]
            groups += self._part(group, [row for row in group.rows if row not in place])
            for given_part in self._part(group, moving):
                part = self._with_room(given_part, steps)
                at = [place[row] for row in part.rows]
                given = self._session.rows_of_inputs(arrays, at, len(asked))
                outputs, states = self._session.run_step(given, part.states, steps)
                groups.append(replace(part, positions=tuple(n + steps for n in part.positions), states=states))
                results.append((at, outputs))
        merged = self._session.rows_of_outputs(results, len(asked))
        self._groups = self._joined(groups)
        return merged

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Let all rows, or ``rows``, begin anew."""
        chosen = set(range(self._size)) if rows is None else set(self._checked(rows))
        left = [part for g in self._groups for part in self._part(g, [r for r in g.rows if r not in chosen])]
        fresh = [self._fresh(tuple(sorted(chosen)))] if chosen else []
        self._groups = self._joined([*left, *fresh])

    def fork(self, rows: Sequence[int] | None = None) -> Stream:
        """An independent stream that goes on from here: of all rows, or of ``rows`` in that order, each as often as named.

        For beams, whose order changes, and for prefixes that several sequences share.
        """
        copy = Stream.__new__(Stream)
        copy._session, copy._size, copy._groups = self._session, self._size, self._groups
        if rows is not None:
            copy._choose(self._checked(rows, repeated=True))
        return copy

    def _choose(self, rows: list[int]) -> None:
        groups = []
        for group in self._groups:
            places = [i for i, row in enumerate(rows) if row in group.rows]
            if places:
                groups.append(self._taken(group, [group.rows.index(rows[i]) for i in places], places))
        self._groups, self._size = tuple(groups), len(rows)

    def rewind(self, checkpoint: Stream) -> None:
        """Go back to ``checkpoint``, a :meth:`fork` made earlier (of this stream, or of another of the same session)."""
        if checkpoint._session is not self._session or checkpoint._size != self._size:
            raise ArtifactError("a stream can be rewound to a fork of a stream of the same session and batch size only")
        self._groups = checkpoint._groups

    def memory(self) -> int:
        """Bytes of all states, with the room that growing ones have for more steps."""
        return sum(value.tensor_size_in_bytes() for group in self._groups for value in group.states)

    def save(self, path: str | Path) -> None:
        """Write the states to one file, which appears complete or not at all."""
        header = {
            "format": _FORMAT,
            "model": self._session.identity,
            "batch_size": self._size,
            "groups": [{"rows": list(g.rows), "positions": list(g.positions)} for g in self._groups],
        }
        arrays = {
            f"{i}.{j}": state.taken(value, g.position)
            for i, g in enumerate(self._groups)
            for j, (state, value) in enumerate(zip(self._session.states, g.states, strict=True))
        }
        saved.write(Path(path), header, arrays)

    def load(self, path: str | Path) -> None:
        """Go on from what :meth:`save` wrote. Raises ArtifactError, the stream then being as it was, where that is damaged,
        of another model, or of another batch size."""
        header, arrays = saved.read(Path(path))
        try:
            if header["format"] != _FORMAT:
                raise ArtifactError(f"{path} has format {header['format']!r}, this seqc reads {_FORMAT}")
            if header["model"] != self._session.identity:
                raise ArtifactError(f"{path} is the state of another model")
            if header["batch_size"] != self._size:
                raise ArtifactError(f"{path} is the state of {header['batch_size']} rows, this stream has {self._size}")
            groups = tuple(
                Group(
                    tuple(g["rows"]),
                    tuple(g["positions"]),
                    tuple(state.keep(arrays[f"{i}.{j}"]) for j, state in enumerate(self._session.states)),
                    Room(0, 0),
                )
                for i, g in enumerate(header["groups"])
            )
        except KeyError as error:
            raise ArtifactError(f"{path} is no saved state: it lacks {error}") from None
        except TypeError as error:
            raise ArtifactError(f"{path} is no saved state: {error}") from None
        self._check_groups(groups, path)
        self._groups = groups

    def _check_groups(self, groups: tuple[Group, ...], path: str | Path) -> None:
        """Raise ArtifactError where ``groups``, read from a file, are not of this stream."""
        rows = [row for group in groups for row in group.rows]
        if any(type(row) is not int for row in rows) or sorted(rows) != list(range(self._size)):
            raise ArtifactError(f"{path} is no saved state: its rows are {rows}")
        for group in groups:
            seen = group.positions
            if len(seen) != len(group.rows) or any(type(n) is not int or n < 0 for n in seen):
                raise ArtifactError(f"{path} is no saved state: rows {list(group.rows)} are at steps {list(seen)}")
            for state, value in zip(self._session.states, group.states, strict=True):
                fault = state.fault(value.numpy(), len(group.rows), group.position)
                if fault:
                    raise ArtifactError(f"{path}: {fault}")

    def _fresh(self, rows: tuple[int, ...]) -> Group:
        states = tuple(state.keep(state.start(len(rows))) for state in self._session.states)
        return Group(rows, (0,) * len(rows), states, Room(0, 0))

    def _with_room(self, group: Group, steps: int) -> Group:
        """``group`` with places for its next steps that no other stream has."""
        if not self._session.grows or group.room.claim(group.position, steps):
            return group
        seen = group.position + steps
        most = self._session.most_steps
        if most is not None and seen > most:
            raise ArtifactError(f"the model takes {most} steps in all at most, and these would be {seen}")
        count = max(places(seen) if most is None else min(places(seen), most), self._session.least_places)
        states = zip(self._session.states, group.states, strict=True)
        moved = tuple(state.moved(value, group.position, count) for state, value in states)
        return replace(group, states=moved, room=Room(count, seen))

    def _part(self, group: Group, rows: list[int]) -> list[Group]:
        """The group of some of its rows: one, or none where there are none."""
        if not rows or len(rows) == len(group.rows):
            return [group] if rows else []
        return [self._taken(group, [group.rows.index(row) for row in rows], rows)]

    def _taken(self, group: Group, at: list[int], rows: Iterable[int]) -> Group:
        """What ``group`` has ``at`` these places, as the group of ``rows``."""
        if at == list(range(len(group.rows))):
            return replace(group, rows=tuple(rows))
        states = zip(self._session.states, group.states, strict=True)
        values = tuple(state.take(value, at, group.position) for state, value in states)
        return Group(tuple(rows), tuple(group.positions[i] for i in at), values, Room(0, 0))

    def _joined(self, groups: list[Group]) -> tuple[Group, ...]:
        """Rows that are in step go together. Where no state depends on the number of steps, all are."""
        together: dict[int, list[Group]] = {}
        for group in groups:
            together.setdefault(group.position if self._session.counts_steps else 0, []).append(group)
        found = []
        for members in together.values():
            if len(members) == 1:
                found += members
                continue
            rows = tuple(row for m in members for row in m.rows)
            states = zip(self._session.states, *(m.states for m in members), strict=True)
            joined = tuple(state.join(values, members[0].position) for state, *values in states)
            found.append(Group(rows, tuple(n for m in members for n in m.positions), joined, Room(0, 0)))
        return tuple(found)

    def _checked(self, rows: Iterable[int], repeated: bool = False) -> list[int]:
        chosen = list(rows)
        for row in chosen:
            if not isinstance(row, int | np.integer) or not 0 <= row < self._size:
                raise ArtifactError(f"row {row!r} is not one of 0 to {self._size - 1}")
        if not repeated and len(set(chosen)) != len(chosen):
            raise ArtifactError(f"a row is named twice in {chosen}")
        return [int(row) for row in chosen]
