"""How far two sets of outputs are apart, relative to the scale of the reference. Needs numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

DEFAULT_TOLERANCE = 1e-4
"""Largest accepted error relative to an output's scale."""

# Four units in the last place of types that cannot hold that.
_NARROW = {"float16": 2.0**-8, "bfloat16": 2.0**-5}


def default_tolerance(dtype: str) -> float:
    """The largest accepted error of an output of that type, relative to its scale."""
    return _NARROW.get(dtype, DEFAULT_TOLERANCE)


# The scale of an output that is zero everywhere: any difference from it that matters is then a large error.
_TINY = float(np.finfo(np.float32).tiny)
# Elements compared at a time, so that the float64 copies of a large output stay small.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Comparison:
    """One output of two models.

    ``relative`` is ``max|a - b| / max|reference|``, infinite where the outputs cannot be compared or must be equal and
    are not; ``detail`` then says why. ``where`` is the index of the largest difference, None where there is none.
    """

    name: str
    max_abs: float
    relative: float
    ok: bool
    tolerance: float
    where: tuple[int, ...] | None = None
    detail: str = ""

    def __str__(self) -> str:
        if self.detail:
            return f"{self.name}: {self.detail}"
        at = f" at {list(self.where)}" if self.where and not self.ok else ""
        return f"{self.name}: error {self.relative:.2g} of its scale{at}, tolerance {self.tolerance:.2g}"


def compare(name: str, reference: Array, actual: Array, tolerance: float = DEFAULT_TOLERANCE) -> Comparison:
    """Compare ``actual`` with ``reference``, which must have the same dtype and shape.

    Float and complex outputs: the largest difference relative to the largest finite magnitude in ``reference``; NaN and
    infinities must sit at the same places with the same sign. All other dtypes must be equal. Empty outputs are equal.
    """
    reference, actual = np.asarray(reference), np.asarray(actual)
    if reference.dtype != actual.dtype:
        return _failed(name, tolerance, f"dtype is {actual.dtype}, the reference has {reference.dtype}")
    if reference.shape != actual.shape:
        return _failed(name, tolerance, f"shape is {actual.shape}, the reference has {reference.shape}")
    a, b = _flat(reference), _flat(actual)
    parts = a.size // max(reference.size, 1)

    def index(flat: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(flat // parts, reference.shape))

    compare_flat = _compare_floats if a.dtype.kind == "f" else _compare_exactly
    return compare_flat(name, a, b, tolerance, index)


def compare_all(
    reference: Mapping[str, Array],
    actual: Mapping[str, Array],
    tolerance: float | Mapping[str, float] = DEFAULT_TOLERANCE,
) -> tuple[Comparison, ...]:
    """Compare outputs by name; one that only one side has is a failure. ``tolerance`` may be given per output."""
    results = []
    for name in dict.fromkeys((*reference, *actual)):
        limit = tolerance.get(name, DEFAULT_TOLERANCE) if isinstance(tolerance, Mapping) else tolerance
        if name not in actual:
            results.append(_failed(name, limit, "is missing"))
        elif name not in reference:
            results.append(_failed(name, limit, "is not an output of the reference"))
        else:
            results.append(compare(name, reference[name], actual[name], limit))
    return tuple(results)


def _flat(array: Array) -> Array:
    """One axis; complex numbers become pairs of reals."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat


def _failed(name: str, tolerance: float, detail: str, where: tuple[int, ...] | None = None) -> Comparison:
    return Comparison(name, math.inf, math.inf, False, tolerance, where, detail)


def _compare_floats(name: str, a: Array, b: Array, tolerance: float, index: Any) -> Comparison:
    scale, max_abs, worst = 0.0, 0.0, None
    for start in range(0, a.size, _BLOCK):
        x, y = a[start : start + _BLOCK].astype(np.float64), b[start : start + _BLOCK].astype(np.float64)
        finite = np.isfinite(x)
        special = np.flatnonzero(~(finite & np.isfinite(y)) & (x != y) & ~(np.isnan(x) & np.isnan(y)))
        if special.size:
            i = int(special[0])
            at = index(start + i)
            return _failed(name, tolerance, f"is {y[i]:g} at {list(at)}, the reference is {x[i]:g}", at)
        x, y = np.where(finite, x, 0.0), np.where(finite, y, 0.0)
        scale = max(scale, float(np.abs(x).max()))
        difference = np.abs(x - y)
        i = int(difference.argmax())
        if difference[i] > max_abs:
            max_abs, worst = float(difference[i]), start + i
    relative = max_abs / max(scale, _TINY)
    return Comparison(
        name, max_abs, relative, relative <= tolerance, tolerance, None if worst is None else index(worst)
    )


def _compare_exactly(name: str, a: Array, b: Array, tolerance: float, index: Any) -> Comparison:
    different = np.flatnonzero(a != b)
    if not different.size:
        return Comparison(name, 0.0, 0.0, True, tolerance)
    first = int(different[0])
    at = index(first)
    detail = (
        f"{different.size} of {a.size} {a.dtype} values differ and must be equal, "
        f"the first at {list(at)} is {b[first]}, the reference is {a[first]}"
    )
    if a.dtype.kind not in "biu":
        return _failed(name, tolerance, detail, at)
    gaps = np.abs(a[different].astype(np.float64) - b[different].astype(np.float64))
    worst = int(gaps.argmax())
    # float64 cannot tell neighbouring large integers apart, but different integers are at least 1 apart
    max_abs = max(float(gaps[worst]), 1.0)
    return Comparison(name, max_abs, math.inf, False, tolerance, index(int(different[worst])), detail)
