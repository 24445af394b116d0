"""Memory of a GPU, through cuda-python or a PyTorch with CUDA, whichever is installed; imported when first needed."""

from __future__ import annotations

import importlib
import threading
import weakref
from collections import deque
from typing import Any, Protocol

import numpy as np

from seqc.errors import ArtifactError, MissingExtraError
from seqc.runtime.inputs import Array

_IDLE_AT_LEAST = 64 << 20
Idle = dict[int, list[int]]
"""Addresses of buffers that nobody uses, by size."""


class Device(Protocol):
    """One GPU and a stream of its own; addresses are those of its memory. Errors are ArtifactErrors of one line."""

    capability: int
    """The compute capability: 89 is 8.9."""
    stream: int

    def activate(self) -> None:
        """Make it the GPU of the calling thread."""
        ...

    def allocate(self, size: int) -> int: ...

    def free(self, address: int) -> None: ...

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous array there, which may change or go afterwards: of memory that is not pinned CUDA takes a copy."""
        ...

    def download(self, address: int, array: Array) -> None:
        """Fill a contiguous array from there. It has its values after :meth:`synchronize`."""
        ...

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        ...


def open_device(index: int = 0) -> Device:
    """The GPU of that number.

    Raises:
        MissingExtraError: neither cuda-python nor a PyTorch with CUDA is installed.
        ArtifactError: there is no such GPU that CUDA can use.
    """
    try:
        return _CudaPython(importlib.import_module("cuda.bindings.runtime"), index)
    except ModuleNotFoundError:
        pass
    try:
        torch: Any = importlib.import_module("torch")
    except ModuleNotFoundError:
        torch = None
    if torch is None or torch.version.cuda is None:
        without = "" if torch is None else " (the PyTorch that is installed has no CUDA)"
        raise MissingExtraError(
            f"memory of a GPU is had through cuda-python, which is not installed{without}: pip install cuda-bindings"
        )
    return _Torch(torch, index)


def _check_index(index: int, count: int, why: str = "") -> None:
    if not count:
        raise ArtifactError(f"there is no NVIDIA GPU here that CUDA can use{why}: engines run on nothing else")
    if not 0 <= index < count:
        raise ArtifactError(f"there is no GPU of number {index}: CUDA sees {count}, from 0 on")


class _CudaPython:
    def __init__(self, runtime: Any, index: int) -> None:
        self._runtime, self._index = runtime, index
        error, count = runtime.cudaGetDeviceCount()
        why = f" ({self._text(error)})" if int(error) else ""
        _check_index(index, 0 if why else count, why)
        self.activate()
        major, minor = (
            self._call(runtime.cudaDeviceGetAttribute(getattr(runtime.cudaDeviceAttr, name), index))
            for name in ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor")
        )
        self.capability = 10 * major + minor
        self.stream = int(self._call(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking)))

    def activate(self) -> None:
        self._call(self._runtime.cudaSetDevice(self._index))

    def allocate(self, size: int) -> int:
        return int(self._call(self._runtime.cudaMalloc(size)))

    def free(self, address: int) -> None:
        self._call(self._runtime.cudaFree(address))

    def upload(self, address: int, array: Array) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._runtime.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.stream))

    def download(self, address: int, array: Array) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._runtime.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self.stream))

    def synchronize(self) -> None:
        self._call(self._runtime.cudaStreamSynchronize(self.stream))

    def _call(self, result: tuple[Any, ...]) -> Any:
        if int(result[0]):
            raise ArtifactError(f"CUDA failed: {self._text(result[0])}")
        return result[1] if len(result) > 1 else None

    def _text(self, error: Any) -> str:
        name, text = self._runtime.cudaGetErrorName(error)[1], self._runtime.cudaGetErrorString(error)[1]
        return f"{name.decode()}: {text.decode()}"


class _Torch:
    def __init__(self, torch: Any, index: int) -> None:
        self._torch, self._index = torch, index
        _check_index(index, torch.cuda.device_count() if torch.cuda.is_available() else 0)
        self.activate()
        major, minor = torch.cuda.get_device_capability(index)
        self.capability = 10 * major + minor
        self._stream = torch.cuda.Stream(index)
        self.stream = int(self._stream.cuda_stream)
        self._held: dict[int, Any] = {}

    def activate(self) -> None:
        self._torch.cuda.set_device(self._index)

    def allocate(self, size: int) -> int:
        try:
            held = self._torch.empty(size, dtype=self._torch.uint8, device=f"cuda:{self._index}")
        except self._torch.cuda.OutOfMemoryError as error:
            raise ArtifactError(f"CUDA failed: {str(error).splitlines()[0]}") from error
        self._held[held.data_ptr()] = held
        return int(held.data_ptr())

    def free(self, address: int) -> None:
        del self._held[address]

    def upload(self, address: int, array: Array) -> None:
        self._copy(self._held[address][: array.nbytes], self._bytes(array))

    def download(self, address: int, array: Array) -> None:
        self._copy(self._bytes(array), self._held[address][: array.nbytes])

    def synchronize(self) -> None:
        self._stream.synchronize()

    def _bytes(self, array: Array) -> Any:
        return self._torch.from_numpy(array.reshape(-1).view(np.uint8))

    def _copy(self, target: Any, source: Any) -> None:
        with self._torch.cuda.stream(self._stream):
            target.copy_(source)


class Memory:
    """Buffers of a device, used again. Safe between threads.

    Of idle buffers of a size the one with the lowest address is taken: a stream that goes on step by step then alternates
    between two sets of addresses, and graphs that were captured for them serve again. Allocating would wait for the GPU.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._idle: Idle = {}
        self._used = 0
        self._lock = threading.Lock()
        # appended to by finalizers, which may run anywhere, also in a thread that holds the lock
        self._returned: deque[tuple[int, int]] = deque()
        # the end of the process frees everything by itself
        weakref.finalize(self, _free, device, self._idle, self._returned).atexit = False

    def take(self, size: int) -> int:
        """The address of ``size`` bytes, at least one. Raises ArtifactError where the memory of the GPU is full."""
        size = max(size, 1)
        with self._lock:
            self._collect()
            found = self._idle.get(size)
            if found:
                found.sort(reverse=True)
                address = found.pop()
            else:
                address = self._allocated(size)
            self._used += size
        return address

    def give(self, address: int, size: int) -> None:
        """What :meth:`take` gave is not used any more."""
        self._returned.append((address, max(size, 1)))

    def _collect(self) -> None:
        self._used -= _sort(self._idle, self._returned)
        # sizes of buffers that have grown never come back
        if sum(size * len(found) for size, found in self._idle.items()) > 2 * self._used + _IDLE_AT_LEAST:
            _free(self.device, self._idle)

    def _allocated(self, size: int) -> int:
        try:
            return self.device.allocate(size)
        except ArtifactError:
            if not any(self._idle.values()):
                raise
        _free(self.device, self._idle)
        return self.device.allocate(size)


def _sort(idle: Idle, returned: deque[tuple[int, int]]) -> int:
    """Put what was returned with the idle ones of its size; how many bytes these were."""
    total = 0
    while returned:
        address, size = returned.popleft()
        idle.setdefault(size, []).append(address)
        total += size
    return total


def _free(device: Device, idle: Idle, returned: deque[tuple[int, int]] | None = None) -> None:
    _sort(idle, returned if returned is not None else deque())
    device.activate()
    for found in idle.values():
        for address in found:
            device.free(address)
    idle.clear()


class DeviceArray:
    """An array in the memory of a GPU, whose buffer is given back with this object."""

    def __init__(self, memory: Memory, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype
        self._memory = memory
        self.address = memory.take(self.tensor_size_in_bytes())
        weakref.finalize(self, memory.give, self.address, self.tensor_size_in_bytes()).atexit = False

    def fill(self, array: Array) -> None:
        """Begin to copy a contiguous array of this shape and type here."""
        self._memory.device.upload(self.address, array)

    def start_reading(self) -> Array:
        """An array that has the values once the device's stream is done."""
        result = np.empty(self.shape, self.dtype)
        self._memory.device.download(self.address, result)
        return result

    def numpy(self) -> Array:
        """A copy."""
        self._memory.device.activate()
        result = self.start_reading()
        self._memory.device.synchronize()
        return result

    def tensor_size_in_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
