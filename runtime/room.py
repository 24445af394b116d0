"""Room in the buffers of growing states, which new steps are written to in place."""

from __future__ import annotations

import threading

_LEAST = 32


def places(steps: int) -> int:
    """How many places a new buffer for ``steps`` has: an eighth more, since all of them are read in each step.

    Growing by a constant factor copies each step a bounded number of times, eight here; twice the room would make every step
    read up to twice as much.
    """
    return steps + max(_LEAST, steps // 8)


class Room:
    """How far the buffers of some growing states are filled. Streams that went on from one share them.

    The first of these that takes the next places may write there; the others, which would write to the same, cannot claim
    them and go on in buffers of their own. Nobody reads places behind his own position. Safe between threads.
    """

    def __init__(self, places: int, taken: int) -> None:
        self._places, self._taken = places, taken
        self._lock = threading.Lock()

    def claim(self, at: int, steps: int) -> bool:
        """Take the places of ``steps`` from position ``at`` on; False where they are taken, or are not there."""
        with self._lock:
            if at != self._taken or at + steps > self._places:
                return False
            self._taken = at + steps
            return True
