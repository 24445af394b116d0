"""The error of a model's outputs against the reference, relative to each output's scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

TOLERANCE = 1e-4
"""The largest error accepted in float32, relative to the largest magnitude of the reference output."""


def relative_error(got: Sequence[Any], reference: Sequence[Any]) -> float:
    """max |got - reference| / max |reference| over the outputs, the worst of them; inf where they cannot be compared.

    Outputs whose number or shapes differ, or whose NaN or infinity sit in other places, cannot be compared.
    """
    if len(got) != len(reference):
        return math.inf
    return max((_one(np.asarray(a), np.asarray(b)) for a, b in zip(got, reference, strict=True)), default=math.inf)


def _one(got: np.ndarray, reference: np.ndarray) -> float:
    if got.shape != reference.shape or got.dtype != reference.dtype:
        return math.inf
    if reference.size == 0:
        return 0.0
    a, b = got.astype(np.complex128), reference.astype(np.complex128)
    finite = np.isfinite(b)
    if not np.array_equal(finite, np.isfinite(a)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return math.inf
    if not finite.any():
        return 0.0
    scale = max(float(np.abs(b[finite]).max()), 1e-30)
    return float(np.abs(a[finite] - b[finite]).max()) / scale
