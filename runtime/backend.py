"""What a session needs of whatever computes: ONNX Runtime (:mod:`ort`), or an engine of TensorRT (:mod:`tensorrt`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from seqc.runtime.inputs import Array


class Kept(Protocol):
    """An array where the model computes, on its device: passed from call to call without a copy. An ``OrtValue`` is one."""

    def numpy(self) -> Array:
        """A view of memory that lives no longer than this value, where that is on the CPU."""
        ...

    def tensor_size_in_bytes(self) -> int: ...


class Backend(Protocol):
    """A loaded model. Its calls may come from several threads."""

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def outputs(self) -> tuple[str, ...]: ...

    @property
    def providers(self) -> tuple[str, ...]:
        """What computes, in order of preference."""
        ...

    def keep(self, name: str, array: Array) -> Kept:
        """``array``, which must not be written to any more, where the model takes its input ``name``."""
        ...

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
        """The arrays called ``outputs``, of checked inputs. Raises ArtifactError where the model fails."""
        ...

    def run_bound(
        self,
        inputs: Mapping[str, Array],
        states: Mapping[str, Kept],
        outputs: Sequence[str],
        kept: Mapping[str, Kept | None],
    ) -> tuple[list[Array], tuple[Kept, ...]]:
        """Run with checked inputs and with states that stay on the device.

        Returns:
            The arrays called ``outputs``, and the values called ``kept``, which stay there. One that has a value already is
            made from what that holds, place by place, and may be written to it.

        Raises:
            ArtifactError: the model failed.
        """
        ...
