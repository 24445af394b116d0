"""What can be asked of an engine: compute capabilities, ranges of dimensions, memory. Parsed from texts or Python values."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Range:
    """The sizes of a dimension that an engine takes, ends included, and the one that it is made fast for."""

    min: int
    opt: int
    max: int


def parse_sms(value: Any) -> tuple[int, ...]:
    """``"89,120"``, 89 or [89, 120] as (89, 120); ``"all"`` as (). Raises ValueError."""
    if value in ("all", ()):
        return ()
    if isinstance(value, bool):
        raise ValueError
    items: Iterable[Any] = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value
    return tuple(sorted({int(item) for item in items}))


def parse_range(value: Any) -> Range:
    """``"1,16,4096"`` or (1, 16, 4096) as minimum, optimum and maximum; one number is all three. Raises ValueError."""
    if isinstance(value, Range):
        return value
    items = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else list(value)
    sizes = [int(item) for item in items]
    low, best, high = sizes * 3 if len(sizes) == 1 else sizes
    if isinstance(value, bool) or not 1 <= low <= best <= high:
        raise ValueError
    return Range(low, best, high)


def parse_bytes(value: Any) -> int:
    """``"2GiB"``, ``"500MB"`` or a number of bytes; 0 stands for no limit. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\w*)", str(value).strip())
    if isinstance(value, bool) or found is None or found[2] not in _UNITS:
        raise ValueError
    return int(float(found[1]) * _UNITS[found[2]])
