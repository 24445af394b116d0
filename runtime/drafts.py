"""Proposals for the next tokens, from the text so far alone: for speculative decoding without a second model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

_LONGEST_SUFFIX = 6
_SHORTEST_SUFFIX = 2


class Drafts:
    """Remembers a text, and proposes how it may go on.

    The first proposal is what followed the last time that the longest suffix of the text occurred (Saxena 2023, "Prompt lookup
    decoding"); the others, from a tree of which token has followed which, start with the likeliest next tokens and go on
    greedily.
    """

    def __init__(self, text: Iterable[int]) -> None:
        self.text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._followers: defaultdict[int, Counter[int]] = defaultdict(Counter)
        for token in text:
            self.append(token)

    def append(self, token: int) -> None:
        """Go on with ``token``."""
        at = len(self.text)
        if self.text:
            self._followers[self.text[-1]][token] += 1
        for size in range(_SHORTEST_SUFFIX, min(_LONGEST_SUFFIX, at) + 1):
            self._ends[tuple(self.text[at - size :])] = at
        self.text.append(token)

    def propose(self, length: int, count: int) -> list[list[int]]:
        """Up to ``count`` different continuations of the same length, ``length`` tokens or fewer."""
        copied = self._copied(length)
        found = [copied] if copied else []
        if self.text:
            for token, _ in self._followers[self.text[-1]].most_common(count):
                path = self._path(token, len(copied) or length)
                if len(found) < count and not any(path == other[: len(path)] for other in found):
                    found.append(path)
        shortest = min(map(len, found), default=0)
        return [list(path) for path in dict.fromkeys(tuple(path[:shortest]) for path in found)]

    def _copied(self, length: int) -> list[int]:
        for size in range(_LONGEST_SUFFIX, _SHORTEST_SUFFIX - 1, -1):
            at = self._ends.get(tuple(self.text[-size:]))
            if at is not None and len(self.text) >= size:
                return self.text[at : at + length]
        return []

    def _path(self, token: int, length: int) -> list[int]:
        path = [token]
        while len(path) < length and self._followers[path[-1]]:
            path.append(self._followers[path[-1]].most_common(1)[0][0])
        return path
