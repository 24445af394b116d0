"""Interleaved timing: every candidate runs once per round, so that what else the machine does hits all alike."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping


def medians(candidates: Mapping[str, Callable[[], object]], rounds: int = 7, warmup: int = 2) -> dict[str, float]:
    """Median seconds per call of each candidate over ``rounds`` interleaved rounds; ``warmup`` rounds come before."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def repeated(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 7,
    least: float = 4e-3,
    hopeless: float = 10.0,
    long: float = 0.2,
) -> dict[str, float]:
    """Median seconds per call over ``rounds`` rounds in each of which every candidate runs for at least ``least`` seconds.

    Calls of microseconds are timed many in a row, and as many go before them untimed (one, where a call takes at least
    ``least``, none beyond ``long``), so that none pays for the caches and the spinning or sleeping threads that the candidate
    in front of it left. Who that is changes from round to round. What takes more than ``hopeless`` times as long as the
    fastest in its first calls is told by these alone.
    """
    first = {name: min(_seconds(call, 1) for _ in range(3)) for name, call in candidates.items()}
    limit = hopeless * min(first.values())
    seconds: dict[str, list[float]] = {name: [] for name, once in first.items() if once <= limit}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(seconds), len(seconds)):
            count = math.ceil(least / first[name])
            _seconds(candidates[name], max(count - 1, first[name] < long))
            seconds[name].append(_seconds(candidates[name], count) / count)
    return {name: statistics.median(seconds[name]) if name in seconds else once for name, once in first.items()}


def _seconds(call: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start
