"""The optimisation profile of an engine: the range of each dimension, and the shapes of the inputs that follow from it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from seqc.backends.tensorrt.settings import Range
from seqc.errors import UsageError
from seqc.frontend.signature import Axis, Signature
from seqc.runtime.shapes import evaluate

CAPACITY = "capacity"
"""The places in buffers of growing states: a dimension that arises where the step form is derived."""

MOST_ROWS, MOST_STEPS = 8, 4096
"""The largest sizes of dimensions without an upper bound of their own: an engine reserves memory for its largest shapes."""

TRACED_ROWS, TRACED_STEPS = 2, 32
"""What is compiled takes at least so many, however few the engine takes: torch.export knows no dimension that is always 1, and
loops show at several lengths."""


def asked_ranges(options: Mapping[str, Any], signature: Signature, stateful: bool) -> dict[str, Range]:
    """The ranges given by options ``profile.DIM``. Raises UsageError for a dimension that the model has not."""
    ranges = {key.removeprefix("profile."): value for key, value in options.items() if key.startswith("profile.")}
    known = [*signature.dims, *([CAPACITY] if stateful else [])]
    for name, asked in ranges.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"dimensions: {', '.join(known) or 'none'}"
            raise UsageError(f"profile.{name} names no dimension of the model; {hint}")
        axis = signature.dims.get(name)
        if axis is not None and (asked.min < axis.min or (axis.max is not None and asked.max > axis.max)):
            top = "on" if axis.max is None else f"to {axis.max}"
            raise UsageError(f"profile.{name} is {asked.min} to {asked.max}, but {name} goes from {axis.min} {top}")
    return ranges


def bounded(signature: Signature, asked: Mapping[str, Range]) -> Signature:
    """The signature with an upper bound of every dimension, so that what is compiled and checked is what the engine takes."""
    sizes = signature.example_sizes()
    room = asked[CAPACITY].max if CAPACITY in asked else 0

    def bound(axis: Axis) -> Axis:
        rows = _is_rows(axis.name, signature)
        if axis.name in asked:
            most = asked[axis.name].max
        elif axis.max is not None:
            return axis
        else:
            most = max(MOST_ROWS if rows else MOST_STEPS, sizes.get(axis.name, 1))
        most = max(most, TRACED_ROWS if rows else max(TRACED_STEPS, room))
        return replace(axis, max=most if axis.max is None else min(axis.max, most))

    return replace(signature, dims={name: bound(axis) for name, axis in signature.dims.items()})


def _is_rows(name: str, signature: Signature) -> bool:
    """Whether a dimension counts rows: it is axis 0 wherever it is."""
    return all(a == 0 for axes in signature.axes.values() for a, d in axes.items() if d == name)


def ranges_of(
    dims: Mapping[str, Mapping[str, Any]], sizes: Mapping[str, int], asked: Mapping[str, Range]
) -> dict[str, Range]:
    """The range of every dimension of the manifest's ``dims``: as asked, else all of it, best at the example's size.

    Buffers of growing states are best where they are full: that is when attention costs most.
    """
    found = {}
    for name, dim in dims.items():
        low, high = max(dim["min"], 1), dim["max"]
        best = high if name == CAPACITY else min(max(sizes.get(name, dim["traced"]), low), high)
        found[name] = asked.get(name, Range(low, best, high))
        if found[name].max > high:
            raise UsageError(f"profile.{name} goes to {found[name].max}, but {name} is at most {high}")
    return found


def sizes(value: ir.Value) -> list[int | str]:
    """The symbolic shape of an input of a model."""
    assert value.shape is not None, "inputs have shapes"
    return [size if isinstance(size, int) else str(size.value) for size in value.shape]


def shapes(ports: Iterable[tuple[str, Sequence[int | str]]], ranges: Mapping[str, Range]) -> dict[str, list[list[int]]]:
    """The smallest, best and largest shape of each input, given its name and symbolic shape."""
    return {
        name: [
            [
                size if isinstance(size, int) else _value(size, {n: getattr(r, which) for n, r in ranges.items()})
                for size in shape
            ]
            for which in ("min", "opt", "max")
        ]
        for name, shape in ports
    }


def _value(expression: str, sizes: Mapping[str, int]) -> int:
    """A size such as ``sequence`` or ``2*sequence + 1``. Raises UsageError where it is none of the kind."""
    found = evaluate(expression, sizes)
    if found is None:
        raise UsageError(
            f"no range is known for an input of size {expression!r}: compile it with a dimension of its own"
        )
    return found
