"""A stand-in for Triton with its ONNX Runtime backend, after their sources: only what the configuration and the files say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from tritonclient.utils import triton_to_np_dtype

Arrays = dict[str, np.ndarray[Any, Any]]


class Server:
    """Serves one model folder. Requests are (sequence, start, inputs); those given together go through the model together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
        assert self.config.name == folder.name
        path = folder / "1" / self.config.default_model_filename
        path = path / "model.onnx" if path.is_dir() else path
        self._model = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self._scalars = {p.name for p in (*self._model.get_inputs(), *self._model.get_outputs()) if not p.shape}
        states = self.config.sequence_batching.state
        # sorted, not as configured: triton-inference-server/server issue 8586
        self._pairs = list(
            zip(sorted(s.input_name for s in states), sorted(s.output_name for s in states), strict=True)
        )
        self._sequences: dict[int, Arrays] = {}

    def infer(self, *requests: tuple[int, bool, Arrays]) -> list[Arrays]:
        joined = self.config.max_batch_size > 0
        assert len(requests) <= max(1, self.config.max_batch_size)
        full = []
        for sequence, start, inputs in requests:
            for io in self.config.input:
                self._check(io, inputs[io.name], joined)
            if start:
                self._sequences[sequence] = self._first(joined)
            full.append({**inputs, **self._sequences.get(sequence, {})})
        given = {n: np.concatenate([f[n] for f in full]) if joined else full[0][n] for n in full[0]}
        names = [io.name for io in self.config.output] + [following for _, following in self._pairs]
        shaped = {n: a.reshape(()) if n in self._scalars else a for n, a in given.items()}
        values = dict(zip(names, self._model.run(names, shaped), strict=True))
        results, at = [], 0
        for sequence, _, inputs in requests:
            count = len(inputs[self.config.input[0].name]) if joined else None
            part = slice(at, at + count) if count is not None else slice(None)
            own = {n: v[part] if v.ndim else v.reshape(1) for n, v in values.items()}
            at += count or 0
            if self._pairs:
                self._sequences[sequence] = {name: own[following] for name, following in self._pairs}
            results.append({io.name: own[io.name] for io in self.config.output})
        return results

    @staticmethod
    def _check(io: Any, value: np.ndarray[Any, Any], joined: bool) -> None:
        sizes = value.shape[1:] if joined else value.shape
        assert value.dtype == triton_to_np_dtype(pb.DataType.Name(io.data_type).removeprefix("TYPE_"))
        assert len(sizes) == len(io.dims) and all(d in (-1, s) for d, s in zip(io.dims, sizes, strict=True))

    def _first(self, joined: bool) -> Arrays:
        """The states before the first request of a sequence."""
        found = {}
        for state in self.config.sequence_batching.state:
            initial = state.initial_state[0]
            dtype = np.dtype(triton_to_np_dtype(pb.DataType.Name(state.data_type).removeprefix("TYPE_")))
            shape = [1] * joined + list(initial.dims)
            value = np.zeros(shape, dtype)
            if initial.WhichOneof("state_data") == "data_file":
                data = (self._folder / "initial_state" / initial.data_file).read_bytes()
                value = np.frombuffer(data, dtype).reshape(shape)
            found[state.input_name] = value
        return found
