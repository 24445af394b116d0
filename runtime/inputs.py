"""Checks what the caller gives a session against what the manifest says it takes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from seqc.errors import ArtifactError
from seqc.runtime import shapes
from seqc.runtime.manifest import DimRange, Port, spell

Array = np.ndarray[Any, Any]


def prepare(ports: tuple[Port, ...], dims: Mapping[str, DimRange], given: Mapping[str, Array]) -> dict[str, Array]:
    """The given arrays, checked, and laid out as onnxruntime needs them (contiguous, native byte order).

    Raises:
        ArtifactError: a missing or unknown name, a wrong dtype, rank or size, one dimension with two sizes, or a
            dimension outside its range. One line: what was expected and what was given.
    """
    if not isinstance(given, Mapping):
        raise ArtifactError(f"inputs are a dict of arrays by name ({_names(ports)}), not a {type(given).__name__}")
    _check_names(ports, given)
    for port in ports:
        _check_array(port, given[port.name])
    _check_dims(ports, dims, given)
    # onnxruntime ignores the byte order of what it is given, and would read big-endian numbers as garbage
    return {port.name: np.asarray(given[port.name], dtype=np.dtype(port.dtype), order="C") for port in ports}


def nearest(name: str, names: Iterable[str]) -> str:
    """``": did you mean 'x'?"`` with the closest of ``names``, or nothing where none is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else ""


def _names(ports: Iterable[Port]) -> str:
    return ", ".join(port.name for port in ports)


def _check_names(ports: tuple[Port, ...], given: Mapping[str, Array]) -> None:
    missing = [port.name for port in ports if port.name not in given]
    for name in given:
        if all(port.name != name for port in ports):
            hint = nearest(str(name), missing or [port.name for port in ports])
            raise ArtifactError(f"unknown input {name!r}{hint or ':'} the model takes {_names(ports)}")
    if missing:
        got = ", ".join(given) or "nothing"
        raise ArtifactError(
            f"missing input {', '.join(map(repr, missing))}: the model takes {_names(ports)}, got {got}"
        )


def _check_array(port: Port, array: Array) -> None:
    if not isinstance(array, np.ndarray | np.generic):
        raise ArtifactError(f"input {port.name!r} must be a numpy array of {port.dtype}, not a {type(array).__name__}")
    if array.dtype.name != port.dtype:
        raise ArtifactError(f"input {port.name!r} must be {port.dtype}, got {array.dtype.name}")
    if array.ndim != len(port.shape):
        raise _misshapen(port, array, f"must have rank {len(port.shape)}, got rank {array.ndim}")
    for axis, (size, expected) in enumerate(zip(array.shape, port.shape, strict=True)):
        if isinstance(expected, int) and size != expected:
            raise _misshapen(port, array, f"must have size {expected} at axis {axis}, got {size}")


def _misshapen(port: Port, array: Array, problem: str) -> ArtifactError:
    return ArtifactError(f"input {port.name!r} {problem}: expected shape {spell(port.shape)}, got {spell(array.shape)}")


def _check_dims(ports: tuple[Port, ...], dims: Mapping[str, DimRange], given: Mapping[str, Array]) -> None:
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    axes = [(p, axis, str(s)) for p in ports for axis, s in enumerate(p.shape) if isinstance(s, str)]
    # plain names first: they give the sizes that the expressions are checked with
    for port, axis, expected in sorted(axes, key=lambda item: item[2] not in dims):
        size, where = given[port.name].shape[axis], f"input {port.name!r} axis {axis}"
        if expected in dims:
            solved: tuple[str, int] | None = (expected, size)
        else:
            value = shapes.evaluate(expected, sizes)
            if value is not None and value != size:
                known = ", ".join(f"{d} = {sizes[d]} in {origin[d]}" for d in sizes if d in expected)
                raise ArtifactError(f"{where} must be {expected} = {value} ({known}), got {size}")
            solved = shapes.solve(expected, size, sizes) if value is None else None
        if solved is None:
            continue
        dim, found = solved
        if dim not in dims:
            continue
        if dim in sizes and sizes[dim] != found:
            raise ArtifactError(f"dimension {dim!r} is {sizes[dim]} in {origin[dim]} but {found} in {where}")
        low, high = dims[dim].min, dims[dim].max
        if found < low or (high is not None and found > high):
            raise ArtifactError(f"dimension {dim!r} must be {dims[dim]}, got {found} in {where}")
        sizes[dim], origin[dim] = found, where
