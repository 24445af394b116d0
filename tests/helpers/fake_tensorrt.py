"""A TEST DOUBLE of TensorRT's runtime: its engines compute with ONNX Runtime what the artifact's ONNX model says.

It has the names of the package's interface, and is strict where that is: shapes lie in the active profile, every address is
set, outputs lie nowhere where inputs are, and arrays are on the side (GPU or CPU) where the engine wants them. Built engines
are not executed: what it shows is that the session asks for the right thing.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from seqc.backends.tensorrt.profiles import shapes, sizes
from seqc.backends.tensorrt.settings import Range
from seqc.runtime.manifest import read
from seqc.runtime.shapes import evaluate
from tests.helpers.fake_cuda import FakeCuda


class Config:
    def __init__(self, package: FakeTensorRT) -> None:
        self._package = package
        self.cuda_graph_strategy = "DISABLED"
        self.cache: Cache | None = None

    def create_runtime_cache(self) -> Cache:
        return Cache(self._package)

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True


class Cache:
    """Holds the names of the engines that ran."""

    def __init__(self, package: FakeTensorRT) -> None:
        self._package, self.entries = package, set[str]()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"cache of sm89:"):
            return False
        self.entries = set(blob.decode().partition(":")[2].split())
        return True

    def serialize(self) -> bytes:
        return f"cache of sm89:{' '.join(sorted(self.entries))}".encode()


class Context:
    def __init__(self, engine: FakeEngine, config: Config | None) -> None:
        self.engine, self.config = engine, config
        self.active_optimization_profile = 0
        self.runs: list[dict[str, tuple[int, ...]]] = []
        """The shapes of the inputs of each run."""
        self.addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.active_optimization_profile = index
        self._shapes, self.addresses = {}, {}
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        self._shapes[name] = tuple(shape)
        return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self.engine.names and memory
        self.addresses[name] = memory
        return True

    def infer_shapes(self) -> list[str]:
        return [n for n in self.engine.inputs if n not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        known = {
            size: n
            for given, value in self.engine.inputs.items()
            for size, n in zip(sizes(value), self._shapes[given], strict=True)
            if isinstance(size, str)
        }
        found = [size if isinstance(size, int) else evaluate(size, known) for size in sizes(self.engine.outputs[name])]
        return tuple(-1 if size is None else size for size in found)

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == 7 and set(self.addresses) >= set(self.engine.names)
        if self.engine.package.fail:
            self.engine.package.log("ERROR", self.engine.package.fail)
            return False
        given = {n: self._array(n, self._shapes[n]) for n in self.engine.inputs}
        made = {n: self._array(n, self.get_tensor_shape(n)) for n in self.engine.outputs}
        for name, array in made.items():
            for other, source in given.items():
                assert not np.shares_memory(array, source), f"{name} lies where {other} is"
        results = self.engine.session.run(list(made), given)
        for array, result in zip(made.values(), results, strict=True):
            assert array.shape == result.shape and array.dtype == result.dtype
            array[...] = result
        self.runs.append(dict(self._shapes))
        if self.config is not None and self.config.cache is not None:
            self.config.cache.entries.add(self.engine.file)
        return True

    def _array(self, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A view of the memory at the address of a tensor."""
        dtype, address = self.engine.get_tensor_dtype(name), self.addresses[name]
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if self.engine.get_tensor_location(name) == FakeTensorRT.TensorLocation.HOST:
            assert address not in self.engine.package.cuda.held, f"{name} must be in memory of the CPU"
        else:
            self.engine.package.cuda.check(address, count)
        memory = (ctypes.c_char * max(count, 1)).from_address(address)
        return np.frombuffer(memory, dtype, count // dtype.itemsize).reshape(shape)


class FakeEngine:
    def __init__(self, package: FakeTensorRT, path: Path, profiles: list[dict[str, Any]]) -> None:
        self.package, self.file = package, path.name
        graph = ir.load(path.with_suffix(".onnx")).graph
        self.inputs = {v.name or "": v for v in graph.inputs}
        self.outputs = {v.name or "": v for v in graph.outputs}
        self.names = [*self.inputs, *self.outputs]
        self.session = onnxruntime.InferenceSession(path.with_suffix(".onnx"), providers=["CPUExecutionProvider"])
        ports = [(name, sizes(value)) for name, value in self.inputs.items()]
        self._profiles = [shapes(ports, {n: Range(**r) for n, r in profile.items()}) for profile in profiles]
        self.contexts: list[Context] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return FakeTensorRT.TensorIOMode.INPUT if name in self.inputs else FakeTensorRT.TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        host = name in self.package.on_host
        return FakeTensorRT.TensorLocation.HOST if host else FakeTensorRT.TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> np.dtype[Any]:
        dtype = {**self.inputs, **self.outputs}[name].dtype
        assert dtype is not None
        return dtype.numpy()

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return self._profiles[profile_index][name]

    def create_runtime_config(self) -> Config:
        return Config(self.package)

    def create_execution_context(self, runtime_config: Config | None = None) -> Context:
        self.contexts.append(Context(self, runtime_config))
        return self.contexts[-1]


class FakeTensorRT:
    """Put it in ``sys.modules``. It knows the engines of one artifact by their bytes.

    ``on_host`` are the inputs and outputs that its engines have on the CPU, ``profiles`` replaces those of the manifest,
    ``fail`` is what TensorRT says when an engine runs.
    """

    class TensorIOMode(enum.Enum):
        INPUT = 1
        OUTPUT = 2

    class TensorLocation(enum.Enum):
        DEVICE = 0
        HOST = 1

    class CudaGraphStrategy:
        WHOLE_GRAPH_CAPTURE = "WHOLE_GRAPH_CAPTURE"

    class ILogger:
        class Severity(enum.Enum):
            INTERNAL_ERROR = 0
            ERROR = 1
            WARNING = 2

    def __init__(self, artifact: Path, cuda: FakeCuda, profiles: dict[str, list[dict[str, Any]]] | None = None) -> None:
        self.cuda, self.on_host, self.fail = cuda, set[str](), ""
        self.engines: dict[str, FakeEngine] = {}
        self.logger: Any = None
        self._known = {
            (artifact / entry["file"]).read_bytes(): (
                artifact / entry["file"],
                (profiles or {}).get(entry["file"], entry["profiles"]),
            )
            for entry in read(artifact).engines
        }

    def Runtime(self, logger: Any) -> FakeTensorRT:
        self.logger = logger
        return self

    def log(self, severity: str, message: str) -> None:
        self.logger.log(getattr(self.ILogger.Severity, severity), message)

    @staticmethod
    def nptype(dtype: np.dtype[Any]) -> np.dtype[Any]:
        return dtype

    def deserialize_cuda_engine(self, content: bytes) -> FakeEngine | None:
        if content not in self._known:
            self.log("ERROR", "the engine plan file is not compatible")
            return None
        path, profiles = self._known[content]
        self.engines[path.name] = FakeEngine(self, path, profiles)
        return self.engines[path.name]
