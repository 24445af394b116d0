"""Comparing outputs: relative to the scale, exact for integers, strict about NaN, infinities, shapes and dtypes."""

from __future__ import annotations

import math

import numpy as np
import pytest

import seqc.compare
from seqc.compare import compare, compare_all


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def test_the_error_is_relative_to_the_scale_of_the_reference() -> None:
    result = compare("y", f32(0.001, -100), f32(0.006, -100), 1e-4)
    assert result.max_abs == pytest.approx(0.005, rel=1e-3)
    assert result.relative == pytest.approx(5e-5, rel=1e-3)
    assert result.ok
    assert result.where == (0,)
    assert not compare("y", f32(0.001, -100), f32(0.006, -100), 1e-5).ok


def test_equal_outputs_have_no_error_and_no_place() -> None:
    result = compare("y", f32(1, 2), f32(1, 2))
    assert (result.max_abs, result.relative, result.ok, result.where) == (0.0, 0.0, True, None)


def test_the_worst_place_is_found_beyond_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seqc.compare, "_BLOCK", 4)
    reference = np.ones((3, 5), np.float32)
    actual = reference.copy()
    actual[0, 1], actual[2, 3] = 1.5, 3
    result = compare("y", reference, actual.T.copy().T)
    assert result.where == (2, 3)
    assert result.relative == 2.0
    assert str(result) == "y: error 2 of its scale at [2, 3], tolerance 0.0001"


def test_a_zero_reference_accepts_only_zeros() -> None:
    assert compare("y", f32(0, 0), f32(0, 0)).ok
    assert not compare("y", f32(0, 0), f32(0, 1e-6)).ok


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("values", [f32(NAN, 1), f32(INF, -INF, 2), f32(NAN, NAN), f32(INF)])
def test_nan_and_infinities_at_the_same_places_are_equal(values: np.ndarray) -> None:
    assert compare("y", values, values.copy()).ok


@pytest.mark.parametrize(
    ("reference", "actual"),
    [(f32(1, 2), f32(1, NAN)), (f32(1, NAN), f32(1, 2)), (f32(1, INF), f32(1, -INF)), (f32(1, INF), f32(1, 3e38))],
)
def test_nan_and_infinities_elsewhere_are_an_infinite_error(reference: np.ndarray, actual: np.ndarray) -> None:
    result = compare("y", reference, actual, 1e9)
    assert not result.ok
    assert result.relative == math.inf
    assert result.where == (1,)
    assert "at [1], the reference is" in result.detail


def test_an_infinity_does_not_hide_a_difference() -> None:
    assert not compare("y", f32(INF, 1.0), f32(INF, 1.1)).ok


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_integers_must_be_equal(dtype: type) -> None:
    reference = np.array([[100, 7], [50, 3]], dtype)
    assert compare("ids", reference, reference.copy(), 1.0).ok
    actual = reference.copy()
    actual[0, 1], actual[1, 0] = 8, 10
    result = compare("ids", reference, actual, 1.0)
    assert not result.ok
    assert result.max_abs == 40
    assert result.where == (1, 0)
    assert "2 of 4" in result.detail
    assert "at [0, 1] is 8, the reference is 7" in result.detail


def test_neighbouring_large_integers_differ() -> None:
    result = compare("ids", np.array([2**62], np.int64), np.array([2**62 + 1], np.int64))
    assert not result.ok
    assert result.max_abs >= 1


def test_booleans_must_be_equal() -> None:
    assert compare("m", np.array([True, False]), np.array([True, False])).ok
    assert not compare("m", np.array([True, False]), np.array([True, True])).ok


def test_complex_numbers_compare_part_by_part() -> None:
    reference = np.array([[1 + 1j, 2 - 3j]], np.complex64)
    assert compare("z", reference, reference.copy()).ok
    actual = reference.copy()
    actual[0, 1] = 2 + 3j
    result = compare("z", reference, actual)
    assert not result.ok
    assert result.where == (0, 1)


def test_half_precision_does_not_overflow_in_the_comparison() -> None:
    result = compare("y", np.array([65000], np.float16), np.array([-65000], np.float16))
    assert result.relative == pytest.approx(2.0)


def test_different_dtypes_and_shapes_name_both() -> None:
    result = compare("y", f32(1), np.array([1.0]))
    assert not result.ok
    assert result.detail == "dtype is float64, the reference has float32"
    result = compare("y", np.zeros((2, 3)), np.zeros((3, 2)))
    assert not result.ok
    assert str(result) == "y: shape is (3, 2), the reference has (2, 3)"


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.complex64, np.bool_])
def test_empty_and_scalar_outputs(dtype: type) -> None:
    assert compare("y", np.zeros((0, 3), dtype), np.zeros((0, 3), dtype)).ok
    assert not compare("y", np.zeros((0, 3), dtype), np.zeros((3, 0), dtype)).ok
    scalar = compare("y", np.array(1, dtype), np.array(0, dtype))
    assert not scalar.ok
    assert scalar.where == ()


def test_outputs_are_matched_by_name_with_a_tolerance_each() -> None:
    reference = {"a": f32(1), "b": f32(1), "c": f32(1)}
    actual = {"b": f32(1.01), "a": f32(1.01), "d": f32(1)}
    results = {c.name: c for c in compare_all(reference, actual, {"a": 0.1})}
    assert list(results) == ["a", "b", "c", "d"]
    assert [c.ok for c in results.values()] == [True, False, False, False]
    assert results["c"].detail == "is missing"
    assert results["d"].detail == "is not an output of the reference"
