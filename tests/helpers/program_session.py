"""A streaming Program in the runtime, computed by PyTorch: streams of a model without the cost of writing its ONNX form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from seqc.description import manifest_of
from seqc.program import Program
from seqc.runtime import Session
from seqc.runtime.backend import Kept
from seqc.runtime.manifest import FORMAT_VERSION, parse

Array = np.ndarray[Any, Any]


class Held:
    """An array as a stream keeps it."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def numpy(self) -> Array:
        return self.array

    def tensor_size_in_bytes(self) -> int:
        return self.array.nbytes


class ProgramModel:
    """A :class:`~seqc.runtime.backend.Backend` that interprets a Program. Nothing it gives lies where something given lies."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.inputs = tuple(p.name for p in program.inputs)
        self.outputs = tuple(p.name for p in program.outputs)
        self.providers = ("PyTorch",)

    def keep(self, name: str, array: Array) -> Kept:
        return Held(array)

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
        given = [torch.tensor(inputs[name]) for name in self.inputs]
        with torch.no_grad():
            results = self._program(*given)
        found = dict(zip(self.outputs, results, strict=True))
        return [found[name].numpy().copy() for name in outputs]

    def run_bound(
        self,
        inputs: Mapping[str, Array],
        states: Mapping[str, Kept],
        outputs: Sequence[str],
        kept: Mapping[str, Kept | None],
    ) -> tuple[list[Array], tuple[Kept, ...]]:
        arrays = self.run([*outputs, *kept], {**inputs, **{n: v.numpy() for n, v in states.items()}})
        return arrays[: len(outputs)], tuple(map(Held, arrays[len(outputs) :]))


def program_session(program: Program) -> Session:
    """A session of a derived step form."""

    memory = {"sizes": {}, "before_passes": 0, "after_passes": 0, "at": ""}
    manifest = manifest_of(nn.Module(), program, "onnx", 18, [], memory, {})
    return Session(parse({**manifest, "format_version": FORMAT_VERSION, "files": {}}), ProgramModel(program))
