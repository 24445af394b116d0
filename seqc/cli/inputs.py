"""Example inputs and dynamic dimensions from the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seqc.errors import UsageError

if TYPE_CHECKING:
    import torch

EXAMPLE_SIZE = 16
"""Size of a named dimension in the example inputs that seqc makes up."""
_SPEC = re.compile(r"(?P<name>[^=\s]+)=(?P<dtype>[A-Za-z]\w*)(?:<(?P<high>\d+)>)?\[(?P<dims>[^\]]*)\]")
_DIM = re.compile(r"(?P<name>[A-Za-z_]\w*)(?::(?P<min>\d+):(?P<max>\d*))?")
_DYNAMIC = re.compile(r"(?P<input>.+):(?P<axis>-?\d+)=(?P<dim>.+)")
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")


@dataclass(frozen=True)
class Dimension:
    """A dynamic dimension with its inclusive range (``max`` None: unbounded)."""

    name: str
    min: int = 1
    max: int | None = None

    def example_size(self) -> int:
        size = max(EXAMPLE_SIZE, self.min)
        return size if self.max is None else min(size, self.max)

    def to_torch(self) -> Any:
        """The form that dynamic_shapes takes."""
        if self.min <= 1 and self.max is None:
            return self.name
        import torch

        return torch.export.Dim(self.name, min=self.min, max=self.max)


@dataclass(frozen=True)
class InputSpec:
    """``NAME=DTYPE<HIGH>[SIZES]``: integers are drawn from [0, high); a named size is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | Dimension, ...]
    high: int | None = None

    @property
    def dynamic(self) -> dict[int, Any]:
        return {axis: size.to_torch() for axis, size in enumerate(self.shape) if isinstance(size, Dimension)}


def parse_input(text: str) -> InputSpec:
    """Read ``x=float32[batch,seq,4]`` or ``ids=int64<50280>[1,seq:1:512]``. Raises UsageError, one line."""
    found = _SPEC.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"--input takes NAME=DTYPE[SIZES] such as x=float32[batch,seq,4], not {text!r}")
    if found["dtype"] not in _DTYPES:
        raise UsageError(f"--input {text!r}: unknown dtype {found['dtype']!r}; known are {', '.join(_DTYPES)}")
    high = int(found["high"]) if found["high"] else None
    if high is not None and ("int" not in found["dtype"] or high < 1):
        raise UsageError(f"--input {text!r}: <N> is the number of values of an integer input, at least 1")
    sizes = [size.strip() for size in found["dims"].split(",")] if found["dims"].strip() else []
    shape = tuple(int(size) if size.isdecimal() else parse_dimension(size, f"--input {text!r}") for size in sizes)
    return InputSpec(found["name"], found["dtype"], shape, high)


def parse_dimension(text: str, where: str) -> Dimension:
    """Read ``seq`` or ``seq:MIN:MAX`` (``seq:2:`` has no upper end)."""
    found = _DIM.fullmatch(text)
    if found is None:
        raise UsageError(f"{where}: a size is a number or a name, optionally NAME:MIN:MAX, not {text!r}")
    low, high = int(found["min"] or 1), int(found["max"]) if found["max"] else None
    if low < 1 or (high is not None and high < low):
        raise UsageError(f"{where}: dimension {text!r} has an empty range")
    return Dimension(found["name"], low, high)


def parse_dynamic(items: Iterable[str]) -> dict[str, dict[int, Any]]:
    """Read ``NAME:AXIS=DIM`` items into the form of dynamic_shapes."""
    shapes: dict[str, dict[int, Any]] = {}
    for item in items:
        found = _DYNAMIC.fullmatch(item.strip())
        if found is None:
            raise UsageError(f"--dynamic takes NAME:AXIS=DIM such as ids:1=seq, not {item!r}")
        dimension = parse_dimension(found["dim"].strip(), f"--dynamic {item!r}")
        shapes.setdefault(found["input"], {})[int(found["axis"])] = dimension.to_torch()
    return shapes


def read_npz(path: str | Path) -> dict[str, np.ndarray[Any, Any]]:
    """The named arrays of an .npz file; pickled arrays are refused. Raises UsageError, one line."""
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("a single array without a name")
        with archive:
            arrays = {name: archive[name] for name in archive.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("a zip archive of something else")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{path}: not a readable .npz file of plain arrays ({reason})") from error
    if not arrays:
        raise UsageError(f"{path}: the .npz file holds no arrays")
    return arrays


def draw(specs: Iterable[InputSpec], vocabulary: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random example tensors: normal floats, integers in [0, high or ``vocabulary``), booleans."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for spec in specs:
        dtype = getattr(torch, spec.dtype)
        shape = [size.example_size() if isinstance(size, Dimension) else size for size in spec.shape]
        if dtype.is_floating_point or dtype.is_complex:
            kind = torch.complex64 if dtype.is_complex else torch.float32
            tensors[spec.name] = torch.randn(shape, generator=generator, dtype=kind).to(dtype)
        else:
            high = 2 if dtype is torch.bool else spec.high or vocabulary
            tensors[spec.name] = torch.randint(_fitting(high, dtype), shape, generator=generator).to(dtype)
    return tensors


def _fitting(high: int, dtype: Any) -> int:
    import torch

    return high if dtype is torch.bool else min(high, torch.iinfo(dtype).max)


def fixed_sizes(name: str, rank: int, dynamic: Mapping[int, Any], shape: Iterable[Any]) -> str | None:
    """A sentence where the batch or the length (axes 0 and 1) of an input is fixed; None where neither is."""
    sizes = list(shape)
    fixed = [axis for axis in range(min(rank - 1, 2)) if axis not in dynamic and axis - rank not in dynamic]
    leading = [axis for axis in fixed if axis == 0 or sizes[axis] != 1]  # a second axis of 1 is there to broadcast
    if not leading:
        return None
    spelled = " and ".join(f"axis {axis} at {sizes[axis]}" for axis in leading)
    return f"input {name!r} is fixed along {spelled}; give the size a name to make it dynamic"
