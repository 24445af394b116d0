"""The manifest of an artifact: ``manifest.json`` parsed into frozen dataclasses, every field checked.

The file may come from anywhere, so nothing in it is trusted: types, names, ranges and file paths are all validated,
and every fault is one :class:`~seqc.errors.ArtifactError` line that names the field.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any, TypeVar

from seqc.errors import ArtifactError

FORMAT_VERSION = 3
MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
STEP_FILE = "step.onnx"
"""The form of a streaming artifact for one new step; it shares the weights of the other."""

DTYPES = frozenset(
    f"{kind}{bits}"
    for kind, widths in (
        ("bool", ("",)),
        ("int", (8, 16, 32, 64)),
        ("uint", (8, 16, 32, 64)),
        ("float", (16, 32, 64)),
        ("complex", (64, 128)),
    )
    for bits in widths
)
"""The numpy dtype names that an input or output may have."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REQUIRED: Any = object()
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Port:
    """An input or output: numpy dtype name, and a shape of ints, dimension names and expressions in them."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}{spell(self.shape)}"


@dataclass(frozen=True)
class DimRange:
    """The sizes a named dimension may have, ends included (``max`` None: unbounded), and the size it was traced at."""

    min: int
    max: int | None
    traced: int

    def __str__(self) -> str:
        return f"{self.min} or more" if self.max is None else f"{self.min} to {self.max}"


@dataclass(frozen=True)
class State:
    """What a stream keeps between calls: the input that takes it and the output, ``following``, that gives it.

    ``initial`` is its value before the first step: of one row, as JSON (see :mod:`seqc.runtime.states`). ``batch_axis`` is the
    axis of the rows (None: the same for all rows in step), ``grows`` the axis of its places, one for each step: as many
    as past and new steps together at least. Those of new steps are written, those behind them never read. ``pending`` is the
    axis of its steps since the beginning of the last chunk: none before the first step, another number after each call.
    """

    port: Port
    following: str
    initial: Any
    batch_axis: int | None
    grows: int | None = None
    pending: int | None = None


@dataclass(frozen=True)
class AppliedPass:
    """A pass that the compiler ran: how many changes it made, and why it did or refused what it did."""

    name: str
    changes: int
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class PeakActivations:
    """Estimated bytes of all activations alive at once at the sizes given, of the traced model and of the compiled one.

    ``at`` is the module, or source line, at which the compiled model needs the most; empty where unknown.
    """

    sizes: Mapping[str, int]
    before_passes: int
    after_passes: int
    at: str = ""


@dataclass(frozen=True)
class Quantization:
    """What an artifact holds in few bits: ``weights`` and ``cache`` name the form, empty where they are plain.

    ``drift`` is how far that took it from the source when it was compiled, relative to an output's scale; None: not measured.
    """

    weights: str = ""
    cache: str = ""
    drift: float | None = None


@dataclass(frozen=True)
class FileEntry:
    """SHA-256 (lower-case hex) and size in bytes of a file of the artifact."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything ``manifest.json`` says. Mappings are read-only."""

    format_version: int
    source: Mapping[str, Any]
    target: str
    opset: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    states: tuple[State, ...]
    dims: Mapping[str, DimRange]
    passes: tuple[AppliedPass, ...]
    tolerances: Mapping[str, float]
    notes: tuple[str, ...]
    files: Mapping[str, FileEntry]
    engines: tuple[Mapping[str, Any], ...]
    tools: Mapping[str, Any]
    peak_activations: PeakActivations | None = None
    steps_dim: str | None = None
    """The dimension along which a streaming artifact takes steps; None in an artifact of whole sequences."""
    quantization: Quantization | None = None
    computes_in: str = ""
    """The type of what it computes in where ONNX Runtime may lack kernels for that: ``bfloat16``; else empty."""


def spell(shape: tuple[int | str, ...]) -> str:
    """A shape for people: ``(batch, sequence, 4)``."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def read(directory: str | Path) -> Manifest:
    """Read and validate the manifest of an artifact directory.

    Raises:
        ArtifactError: there is no such directory or manifest, or it is not valid.
    """
    directory = Path(directory)
    if not directory.exists():
        raise ArtifactError(f"{directory} does not exist")
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is not a directory; an artifact is a directory with a {MANIFEST_FILE}")
    path = directory / MANIFEST_FILE
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{directory} is not a seqc artifact: it has no {MANIFEST_FILE}") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON (truncated or altered?): {error}".splitlines()[0]) from error
    try:
        return parse(data)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from None


def parse(data: object) -> Manifest:
    """Validate decoded JSON and build the :class:`Manifest`.

    Raises:
        ArtifactError: a missing key, a wrong type or value, an unknown format version, or a path that leaves the
            directory.
    """
    if not isinstance(data, dict):
        raise ArtifactError(f"expected a JSON object, got {_kind(data)}")
    root = _Fields(data)
    version = root.get("format_version", int)
    if version != FORMAT_VERSION:
        hint = "update seqc" if version > FORMAT_VERSION else "compile the model again"
        raise ArtifactError(f"format_version is {version}, this seqc reads {FORMAT_VERSION}: {hint}")
    dims = {name: _dim(fields) for name, fields in root.objects_by_name("dims")}
    manifest = Manifest(
        format_version=version,
        source=MappingProxyType(root.get("source", dict)),
        target=root.get("target", str),
        opset=root.get("opset", int),
        inputs=_ports(root, "inputs"),
        outputs=_ports(root, "outputs"),
        states=tuple(_state(fields) for fields in root.objects("states", [])),
        dims=MappingProxyType(dims),
        passes=tuple(_pass(fields) for fields in root.objects("passes")),
        tolerances=MappingProxyType({n: _tolerance(n, v) for n, v in root.get("tolerances", dict).items()}),
        notes=root.strings("notes", []),
        files=MappingProxyType({_file_name(name): _file(fields) for name, fields in root.objects_by_name("files")}),
        engines=tuple(_engine(fields) for fields in root.objects("engines", [])),
        tools=MappingProxyType(root.get("tools", dict, {})),
        peak_activations=_peak(root),
        steps_dim=root.get("steps_dim", str) if root.data.get("steps_dim") is not None else None,
        quantization=_quantization(root),
        computes_in=root.get("computes_in", str, ""),
    )
    if manifest.steps_dim is not None and manifest.steps_dim not in dims:
        raise ArtifactError(f"steps_dim is {manifest.steps_dim!r}, which dims does not define")
    for port in (*manifest.inputs, *(state.port for state in manifest.states)):
        for size in port.shape:
            if isinstance(size, str) and size.isidentifier() and size not in dims:
                raise ArtifactError(f"input {port.name!r} has dimension {size!r}, which dims does not define")
    return manifest


class _Fields:
    """A JSON object whose members are read with their expected type; ``where`` prefixes the error messages."""

    def __init__(self, data: dict[str, Any], where: str = "") -> None:
        self.data, self.where = data, where

    def get(self, key: str, kind: type[_T], default: Any = _REQUIRED) -> _T:
        value = self.data.get(key, default)
        if value is _REQUIRED:
            raise ArtifactError(f"{self.where or 'the manifest'} has no {key!r}")
        # bool is a subclass of int, and no field of ours is a bool
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ArtifactError(f"{self._at(key)} must be {_kind(kind())}, not {_kind(value)}")
        return value

    def objects(self, key: str, default: Any = _REQUIRED) -> Iterator[_Fields]:
        for i, item in enumerate(self.get(key, list, default)):
            if not isinstance(item, dict):
                raise ArtifactError(f"{self._at(key)}[{i}] must be an object, not {_kind(item)}")
            yield _Fields(item, f"{self._at(key)}[{i}]")

    def objects_by_name(self, key: str) -> Iterator[tuple[str, _Fields]]:
        for name, item in self.get(key, dict).items():
            if not isinstance(item, dict):
                raise ArtifactError(f"{self._at(key)}[{name!r}] must be an object, not {_kind(item)}")
            yield name, _Fields(item, f"{self._at(key)}[{name!r}]")

    def strings(self, key: str, default: Any = _REQUIRED) -> tuple[str, ...]:
        items = self.get(key, list, default)
        if not all(isinstance(item, str) for item in items):
            raise ArtifactError(f"{self._at(key)} must be a list of strings")
        return tuple(items)

    def fail(self, key: str, message: str) -> ArtifactError:
        return ArtifactError(f"{self._at(key)} {message}")

    def _at(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        int: "an integer",
        float: "a number",
        bool: "a boolean",
    }
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _ports(root: _Fields, key: str) -> tuple[Port, ...]:
    ports = [_port(fields) for fields in root.objects(key)]
    names = [port.name for port in ports]
    for name in names:
        if names.count(name) > 1:
            raise root.fail(key, f"names {name!r} twice")
    if not ports:
        raise root.fail(key, "is empty")
    return tuple(ports)


def _port(fields: _Fields) -> Port:
    name, dtype, shape = fields.get("name", str), fields.get("dtype", str), fields.get("shape", list)
    if dtype not in DTYPES:
        raise fields.fail("dtype", f"is {dtype!r}, which is not a numpy dtype that seqc knows")
    for size in shape:
        fixed = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        if not (fixed or (isinstance(size, str) and size)):
            raise fields.fail("shape", f"holds {size!r}: a size is an integer of at least 0 or an expression in names")
    return Port(name, dtype, tuple(shape))


def _state(fields: _Fields) -> State:
    port = _port(fields)
    if "initial" not in fields.data:
        raise fields.fail("initial", "is missing")
    keys = ("batch_axis", "grows", "pending")
    axes = {key: None if fields.data.get(key) is None else fields.get(key, int) for key in keys}
    for key, axis in axes.items():
        if axis is not None and not 0 <= axis < len(port.shape):
            raise fields.fail(key, f"is {axis}, and the state has {len(port.shape)} axes")
    return State(port, fields.get("next", str), fields.data["initial"], **axes)


def _dim(fields: _Fields) -> DimRange:
    low, traced = fields.get("min", int), fields.get("traced", int)
    high = None if fields.data.get("max", 0) is None else fields.get("max", int)
    if low < 0 or (high is not None and high < low):
        raise ArtifactError(f"{fields.where} has an empty range: min {low}, max {high}")
    return DimRange(low, high, traced)


def _pass(fields: _Fields) -> AppliedPass:
    return AppliedPass(fields.get("name", str), fields.get("changes", int), fields.strings("reasons", []))


def _engine(fields: _Fields) -> Mapping[str, Any]:
    """The entry as it is, where what everybody relies on is in it."""
    _file_name(fields.get("file", str))
    for key in ("kernels", "scratch_bytes", "activation_bytes", "weight_bytes"):
        fields.get(key, int)
    if not all(type(sm) is int for sm in fields.get("sm", list)):
        raise fields.fail("sm", "must be a list of integers")
    if not isinstance(fields.data.get("has_step_loop"), bool):
        raise fields.fail("has_step_loop", "must be a boolean")
    for profile in fields.objects("profiles"):
        for sizes in (profile.get(name, dict) for name in profile.data):
            if not all(type(sizes.get(which)) is int for which in ("min", "opt", "max")):
                raise fields.fail("profiles", "must give the min, opt and max of each dimension")
    return MappingProxyType(fields.data)


def _peak(root: _Fields) -> PeakActivations | None:
    if "peak_activations" not in root.data:
        return None
    fields = _Fields(root.get("peak_activations", dict), "peak_activations")
    sizes = _Fields(fields.get("sizes", dict), "peak_activations.sizes")
    return PeakActivations(
        MappingProxyType({name: sizes.get(name, int) for name in sizes.data}),
        fields.get("before_passes", int),
        fields.get("after_passes", int),
        fields.get("at", str, ""),
    )


def _quantization(root: _Fields) -> Quantization | None:
    if root.data.get("quantization") is None:
        return None
    fields = _Fields(root.get("quantization", dict), "quantization")
    drift = fields.data.get("drift")
    return Quantization(
        fields.get("weights", str, ""),
        fields.get("cache", str, ""),
        None if drift is None else _error("quantization.drift", drift),
    )


def _tolerance(name: str, value: object) -> float:
    return _error(f"tolerances[{name!r}]", value)


def _error(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ArtifactError(f"{where} must be a finite number of at least 0, not {value!r}")
    return float(value)


def _file(fields: _Fields) -> FileEntry:
    digest, size = fields.get("sha256", str), fields.get("bytes", int)
    if not _SHA256.fullmatch(digest):
        raise fields.fail("sha256", "is not 64 lower-case hexadecimal digits")
    return FileEntry(digest, size)


def _file_name(name: str) -> str:
    """``name`` if it is a plain relative path that stays inside the artifact on every system."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    plain = str(posix) == name and "\\" not in name and "\0" not in name
    if not plain or posix.is_absolute() or windows.anchor or ".." in posix.parts or name in ("", ".", MANIFEST_FILE):
        raise ArtifactError(f"files names {name!r}, which is not a path inside the artifact")
    return name
