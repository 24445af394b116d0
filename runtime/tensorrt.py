"""Runs the engines of an artifact with TensorRT for RTX, or TensorRT: the package is imported when first needed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from seqc.errors import ArtifactError, MissingExtraError
from seqc.runtime.backend import Kept
from seqc.runtime.cuda import DeviceArray, Memory, open_device
from seqc.runtime.files import replacing
from seqc.runtime.inputs import Array, nearest
from seqc.runtime.manifest import MODEL_FILE, STEP_FILE, DimRange, Manifest, spell
from seqc.runtime.ort import Provider

Shapes = dict[str, tuple[int, ...]]
_MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_EXTRAS = {"tensorrt-rtx": "rtx", "tensorrt": "tensorrt"}


@dataclass(frozen=True)
class Options:
    """How the engines of ``package`` run.

    ``device_id``  the number of the GPU
    ``cuda_graph``  ``on`` or ``off``: the engine for one step is captured as a CUDA graph, where the package does that
    ``runtime_cache``  ``on`` or ``off``: what the package compiles for this GPU is kept in a file beside the artifact
    """

    package: str
    device_id: int = 0
    cuda_graph: str = "on"
    runtime_cache: str = "on"


def asked(providers: Sequence[Provider] | None) -> Options | None:
    """The options where ``providers`` ask for engines. Raises ArtifactError where these are wrong, or others with them."""
    if providers is None or isinstance(providers, str):
        return None
    pairs = [(p, {}) if isinstance(p, str) else p for p in providers]
    found = [p for p in pairs if isinstance(p, tuple) and len(p) == 2 and p[0] in _MODULES]
    if not found:
        return None
    package, given = found[0]
    if len(pairs) > 1:
        raise ArtifactError(f"{package} runs whole engines: it goes with no other provider, {len(pairs)} were named")
    known = [name for name in Options.__dataclass_fields__ if name != "package"]
    for name in given:
        if name not in known:
            hint = nearest(name, known) or ":"
            raise ArtifactError(f"{package} has no option {name!r}{hint} its options are {', '.join(known)}")
    options = Options(package, **given)
    for name in ("cuda_graph", "runtime_cache"):
        if getattr(options, name) not in ("on", "off"):
            raise ArtifactError(f"option {name} of {package} is on or off, not {getattr(options, name)!r}")
    if not str(options.device_id).isdecimal():
        raise ArtifactError(f"option device_id of {package} is the number of a GPU, not {options.device_id!r}")
    return replace(options, device_id=int(options.device_id))


def open_engines(directory: Path, manifest: Manifest, options: Options) -> tuple[Manifest, Engine, Engine | None]:
    """(the manifest with the ranges that its engines take, the general engine, the one for one step).

    Raises:
        MissingExtraError: the package, or one through which memory of a GPU is had, is not installed.
        ArtifactError: there are no such engines, another version of the package built them, there is no GPU, or they were
            not built for it.
    """
    package = options.package
    entries = {entry["file"]: entry for entry in manifest.engines if entry.get("package") == package}
    names = [_engine_of(name) for name in (MODEL_FILE, STEP_FILE) if name in manifest.files]
    for name in names:
        if name not in entries or name not in manifest.files:
            raise ArtifactError(f"the artifact holds no {name} of {package}: compile it with --target {package}")
    trt = _imported(package)
    for name in names:
        _check_version(package, entries[name])
    device = open_device(options.device_id)
    for name in names:
        if entries[name]["sm"] and device.capability not in entries[name]["sm"]:
            built = ", ".join(map(str, entries[name]["sm"]))
            raise ArtifactError(
                f"{name} was built for GPUs of sm {built}, and this one has {device.capability}: compile with "
                f"--opt sm={device.capability}"
            )
    device.activate()
    memory, errors = Memory(device), _Errors()
    runtime = trt.Runtime(_logger(trt, errors))
    engines = [
        Engine(trt, runtime, directory / name, memory, errors, options, step=name == _engine_of(STEP_FILE))
        for name in names
    ]
    taken = _narrowed(manifest, [entries[name] for name in names])
    return taken, engines[0], engines[1] if len(engines) > 1 else None


def _engine_of(name: str) -> str:
    return Path(name).with_suffix(".engine").name


def _imported(package: str) -> Any:
    install = f"pip install 'seqc[{_EXTRAS[package]}]'"
    try:
        return importlib.import_module(_MODULES[package])
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"running engines of {package} needs that package: {install}") from error
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise MissingExtraError(f"{package} cannot be imported ({first}): {install}") from error


def _check_version(package: str, entry: Mapping[str, Any]) -> None:
    built, here = entry.get("version"), importlib.metadata.version(package)
    if built != here:
        raise ArtifactError(
            f"{entry['file']} was built by {package} {built}, and {here} is installed, which may not read it: install "
            f"{package}=={built}, or compile again"
        )


def _narrowed(manifest: Manifest, entries: Sequence[Mapping[str, Any]]) -> Manifest:
    """The manifest whose dimensions are those for which there is an engine."""
    dims = dict(manifest.dims)
    for entry in entries:
        for name in {name for profile in entry["profiles"] for name in profile} & set(dims):
            ranges = [profile[name] for profile in entry["profiles"] if name in profile]
            low, high = min(r["min"] for r in ranges), max(r["max"] for r in ranges)
            dim = dims[name]
            # single steps have an engine of their own
            low = 1 if name == manifest.steps_dim and len(entries) > 1 else low
            dims[name] = DimRange(max(dim.min, low), high if dim.max is None else min(dim.max, high), dim.traced)
    return replace(manifest, dims=dims)


class _Errors:
    """The last errors that TensorRT told; its logger is one per process, and so are these."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def clear(self) -> None:
        self.told.clear()

    def first(self) -> str:
        return " ".join(self.told[0].split()) if self.told else "it gave no reason"


def _logger(trt: Any, errors: _Errors) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                errors.told.append(message)

    return Log()


class _HostArray:
    """An array in the memory of the CPU: sizes, which TensorRT reads there."""

    def __init__(self, array: Array) -> None:
        self.array = array
        self.shape, self.dtype, self.address = array.shape, array.dtype, int(array.ctypes.data)

    def numpy(self) -> Array:
        return self.array

    def start_reading(self) -> Array:
        return self.array

    def tensor_size_in_bytes(self) -> int:
        return self.array.nbytes


class Engine:
    """An engine and what it needs to run: a :class:`~seqc.runtime.backend.Backend`. Calls take turns.

    States that grow are not written in place: the engine gives all their places in a buffer of its own, and two of these take
    turns, since TensorRT does not promise that an output may lie where an input is.
    """

    def __init__(
        self, trt: Any, runtime: Any, path: Path, memory: Memory, errors: _Errors, options: Options, step: bool
    ) -> None:
        self._path, self._memory, self._errors, self._package = path, memory, errors, options.package
        self._lock = threading.Lock()
        errors.clear()
        self._engine = engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise ArtifactError(f"{options.package} cannot load {path}: {errors.first()}")
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        given = {n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT}
        self.inputs = tuple(n for n in names if n in given)
        self.outputs = tuple(n for n in names if n not in given)
        self._types = {n: np.dtype(trt.nptype(engine.get_tensor_dtype(n))) for n in names}
        self._on_host = {n for n in names if engine.get_tensor_location(n) == trt.TensorLocation.HOST}
        self._profiles = [
            {n: [tuple(shape) for shape in engine.get_tensor_profile_shape(n, i)] for n in self.inputs}
            for i in range(engine.num_optimization_profiles)
        ]
        self._cache: tuple[Any, Path] | None = None
        self._has_run = False
        self._context = self._new_context(trt, options, step)
        if self._context is None:
            raise ArtifactError(f"{options.package} cannot run {path.name}: {errors.first()}")

    @property
    def providers(self) -> tuple[str, ...]:
        return (self._package,)

    def keep(self, name: str, array: Array) -> Kept:
        return self._placed(name, array)

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
        return self.run_bound(inputs, {}, outputs, {})[0]

    def run_bound(
        self,
        inputs: Mapping[str, Array],
        states: Mapping[str, Kept],
        outputs: Sequence[str],
        kept: Mapping[str, Kept | None],
    ) -> tuple[list[Array], tuple[Kept, ...]]:
        """See :meth:`~seqc.runtime.backend.Backend.run_bound`."""
        device = self._memory.device
        with self._lock:
            device.activate()
            self._errors.clear()
            values: dict[str, Array | Kept] = {**inputs, **states}
            given = {name: self._placed(name, value) for name, value in values.items()}
            made = self._bound(given)
            if not self._context.execute_async_v3(device.stream):
                raise self._failure()
            arrays = [made[name].start_reading() for name in outputs]
            device.synchronize()
            if self._cache is not None and not self._has_run:
                _save_cache(*self._cache)
            self._has_run = True
        return arrays, tuple(made[name] for name in kept)

    def _new_context(self, trt: Any, options: Options, step: bool) -> Any:
        """A context; the standard package has no cache of what it compiles, and older ones no settings."""
        if not hasattr(self._engine, "create_runtime_config"):
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        if step and options.cuda_graph == "on" and hasattr(config, "cuda_graph_strategy"):
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if options.runtime_cache == "on" and hasattr(config, "create_runtime_cache"):
            cache, path = config.create_runtime_cache(), cache_path(self._path)
            if path.is_file():
                cache.deserialize(
                    path.read_bytes()
                )  # one of another GPU, driver or version is refused, and written anew
            config.set_runtime_cache(cache)
            self._cache = cache, path
            # kernels for sizes that come later are compiled in the background, and kept at the end
            weakref.finalize(self, _save_cache, cache, path)
        return self._engine.create_execution_context(config)

    def _placed(self, name: str, value: Array | Kept) -> _HostArray | DeviceArray:
        """``value`` where the engine reads its input ``name``."""
        if name in self._on_host:
            array = value if isinstance(value, np.ndarray) else value.numpy()
            return _HostArray(np.ascontiguousarray(array).reshape(array.shape))
        if isinstance(value, DeviceArray):
            return value
        array = value if isinstance(value, np.ndarray) else value.numpy()
        self._memory.device.activate()
        placed = DeviceArray(self._memory, array.shape, array.dtype)
        placed.fill(np.ascontiguousarray(array))
        return placed

    def _bound(self, given: Mapping[str, _HostArray | DeviceArray]) -> dict[str, _HostArray | DeviceArray]:
        """Tell the context sizes and addresses; the outputs that it is going to fill."""
        context = self._context
        self._take_profile({name: value.shape for name, value in given.items()})
        for name, value in given.items():
            if value.dtype != self._types[name]:
                raise ArtifactError(f"{self._path.name} takes {name!r} as {self._types[name]}, not {value.dtype}")
            if not context.set_input_shape(name, value.shape) or not context.set_tensor_address(name, value.address):
                raise self._failure()
        missing = context.infer_shapes()
        if missing:
            raise ArtifactError(f"{self._path.name} does not know the sizes of {', '.join(missing)}")
        made: dict[str, _HostArray | DeviceArray] = {}
        for name in self.outputs:
            shape = tuple(context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise ArtifactError(
                    f"{self._path.name} gives {name!r} in a size that depends on values: run the ONNX form"
                )
            on_host = name in self._on_host
            made[name] = (
                _HostArray(np.empty(shape, self._types[name]))
                if on_host
                else DeviceArray(self._memory, shape, self._types[name])
            )
            if not context.set_tensor_address(name, made[name].address):
                raise self._failure()
        return made

    def _take_profile(self, shapes: Shapes) -> None:
        """Stay in the profile, or change to one, that has all shapes. Raises ArtifactError that names one outside."""
        fitting = [
            i
            for i, profile in enumerate(self._profiles)
            if not any(_outside(shapes[name], profile[name]) for name in self.inputs)
        ]
        if not fitting:
            profile = self._profiles[0]
            name = next(n for n in self.inputs if _outside(shapes[n], profile[n]))
            low, _, high = profile[name]
            raise ArtifactError(
                f"{self._path.name} takes {name!r} in sizes {spell(low)} to {spell(high)}, got {spell(shapes[name])}: "
                "compile with another --opt profile.DIM=MIN,OPT,MAX"
            )
        if self._context.active_optimization_profile in fitting:
            return
        if not self._context.set_optimization_profile_async(fitting[0], self._memory.device.stream):
            raise self._failure()
        self._memory.device.synchronize()

    def _failure(self) -> ArtifactError:
        return ArtifactError(f"{self._package} failed while running {self._path.name}: {self._errors.first()}")


def cache_path(engine: Path) -> Path:
    """Where the runtime cache of an engine is: beside the artifact, which itself stays as it is."""
    artifact = engine.absolute().parent
    return artifact.with_name(f"{artifact.name}.{engine.name}.cache")


def _outside(shape: Sequence[int], profile: Sequence[tuple[int, ...]]) -> bool:
    low, _, high = profile
    return len(shape) != len(low) or any(not a <= n <= b for a, n, b in zip(low, shape, high, strict=True))


def _save_cache(cache: Any, path: Path) -> None:
    content = bytes(memoryview(cache.serialize()))
    # where nothing can be written, the next start compiles again
    with contextlib.suppress(ArtifactError), replacing(path, "the runtime cache") as stage:
        stage.write_bytes(content)
