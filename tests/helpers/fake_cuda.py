"""A TEST DOUBLE of ``cuda.bindings.runtime``: "device" memory is memory of the process, and there is one GPU in it.

Strict where a GPU is: memory may only be touched inside of what was allocated and not freed.
"""

from __future__ import annotations

import ctypes
import enum
from types import SimpleNamespace
from typing import Any

_FULL = 2


class FakeCuda:
    """Put it in ``sys.modules["cuda.bindings.runtime"]``. ``capability`` is that of its GPU, ``limit`` its bytes."""

    cudaStreamNonBlocking = 1

    class cudaMemcpyKind(enum.IntEnum):
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    class cudaDeviceAttr(enum.IntEnum):
        cudaDevAttrComputeCapabilityMajor = 75
        cudaDevAttrComputeCapabilityMinor = 76

    def __init__(self, capability: int = 89, devices: int = 1, limit: int = 1 << 30) -> None:
        self.capability, self.devices, self.limit = capability, devices, limit
        self.held: dict[int, Any] = {}
        self.allocated = 0
        """How many buffers were asked for in all."""
        self.device: int | None = None

    @property
    def used(self) -> int:
        return sum(len(buffer) for buffer in self.held.values())

    def cudaGetDeviceCount(self) -> tuple[int, int | None]:
        return (0, self.devices) if self.devices else (100, None)

    def cudaSetDevice(self, index: int) -> tuple[int]:
        self.device = index
        return (0,)

    def cudaDeviceGetAttribute(self, attribute: int, index: int) -> tuple[int, int]:
        major = attribute == self.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor
        return 0, self.capability // 10 if major else self.capability % 10

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        assert flags == self.cudaStreamNonBlocking and self.device is not None
        return 0, 7

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert stream == 7
        return (0,)

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        assert size > 0 and self.device is not None
        if self.used + size > self.limit:
            return _FULL, None
        buffer = (ctypes.c_char * size)()
        ctypes.memset(buffer, 0xFF, size)  # what nobody wrote is not a number
        self.held[ctypes.addressof(buffer)] = buffer
        self.allocated += 1
        return 0, ctypes.addressof(buffer)

    def cudaFree(self, address: int) -> tuple[int]:
        del self.held[address]
        return (0,)

    def cudaMemcpyAsync(self, target: int, source: int, count: int, kind: int, stream: int) -> tuple[int]:
        assert stream == 7
        self.check(target if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice else source, count)
        ctypes.memmove(target, source, count)
        return (0,)

    def cudaGetErrorName(self, error: int) -> tuple[int, bytes]:
        return 0, {_FULL: b"cudaErrorMemoryAllocation", 100: b"cudaErrorNoDevice"}[error]

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, {_FULL: b"out of memory", 100: b"no CUDA-capable device is detected"}[error]

    def check(self, address: int, count: int) -> None:
        assert address in self.held and count <= len(self.held[address]), "memory that is not allocated is touched"

    def module(self) -> Any:
        """What ``import cuda.bindings.runtime`` gives."""
        names = [n for n in dir(self) if n.startswith("cuda")]
        return SimpleNamespace(**{n: getattr(self, n) for n in names})
