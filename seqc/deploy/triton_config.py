"""The configuration with which NVIDIA Triton serves an artifact, as the protobuf message that Triton reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqc.deploy.batch_first import SUFFIX, rows_inside
from seqc.deploy.triton_engine import PLAN_FILE, check_engine, engine_of
from seqc.deploy.triton_serving import ALONE, Serving
from seqc.errors import MissingExtraError, UnsupportedModelError, UsageError
from seqc.runtime.manifest import MODEL_FILE, Manifest, Port
from seqc.runtime.rows import Rows
from seqc.runtime.states import StatePort, state_port

TYPES: Mapping[str, str] = {
    "bool": "TYPE_BOOL",
    **{f"{kind}{bits}": f"TYPE_{kind.upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"TYPE_FP{bits}" for bits in (16, 32, 64)},
}
"""Triton's data types by numpy's."""


def messages() -> Any:
    """The module of Triton's configuration messages. Raises MissingExtraError."""
    try:
        from tritonclient.grpc import model_config_pb2
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError(f"seqc triton needs tritonclient: pip install 'seqc[triton]' ({error})") from error
    return model_config_pb2


def model_config(manifest: Manifest, serving: Serving) -> tuple[Any, dict[str, bytes]]:
    """(the ModelConfig, the files of initial states that it names).

    A streaming artifact gets ``sequence_batching`` with its states as implicit ones, of sequences oldest first: a batch is
    made of requests of different sequences, so that nothing stands in for one that has no request. Others get
    ``dynamic_batching``, unless each request goes by itself. Where requests are joined, states whose rows are not along
    their first axis are those of :func:`~seqc.deploy.batch_first.put_batch_first`.

    Raises:
        UnsupportedModelError: Triton cannot serve it so; names the input, output or state, and what to try.
        UsageError: a number of ``serving`` is out of range.
        MissingExtraError: tritonclient is not installed.
    """
    pb = messages()
    streams = manifest.steps_dim is not None
    if serving.max_batch:
        _check_batch(manifest, serving)
    engine = engine_of(manifest, serving)
    config = pb.ModelConfig(
        name=serving.name,
        backend="onnxruntime" if engine is None else "tensorrt",
        platform="onnxruntime_onnx" if engine is None else "tensorrt_plan",
        default_model_filename=MODEL_FILE if engine is None else PLAN_FILE,
        max_batch_size=serving.max_batch,
    )
    if engine is not None:
        check_engine(manifest, engine, serving)
    # one sequence has one row
    single = Rows(manifest).batch if streams and not serving.max_batch else None
    for port in manifest.inputs:
        _describe(config.input.add(), port, serving, single)
    for port in manifest.outputs:
        _describe(config.output.add(), port, serving)
    files: dict[str, bytes] = {}
    states = [state_port(state, manifest.dims) for state in manifest.states]
    if serving.capacity is not None and all(state.grows is None for state in states):
        raise UsageError("--capacity is for states that grow, and none of this artifact does")
    if not streams:
        if serving.max_batch:
            config.dynamic_batching.SetInParent()
        return config, files
    sequences = config.sequence_batching
    sequences.max_sequence_idle_microseconds = round(serving.idle_seconds * 1e6)
    sequences.oldest.max_candidate_sequences = serving.sequences
    for number, state in enumerate(states):
        _add_state(config, files, number, state, manifest, serving)
    if any(state.grows is not None for state in states):
        # behind the capacity the CPU's ScatterElements fails, where the GPU's would write to whatever lies there
        config.instance_group.add(kind=pb.ModelInstanceGroup.KIND_CPU, count=1)
    return config, files


def _check_batch(manifest: Manifest, serving: Serving) -> None:
    """Raise where requests cannot be joined along the first axis of every input and output."""
    name = Rows(manifest).batch
    for kind, ports in (("input", manifest.inputs), ("output", manifest.outputs)):
        for port in ports:
            if name is None or not port.shape or port.shape[0] != name:
                raise UnsupportedModelError(
                    f"{kind} {port} does not begin with the axis of the batch, along which Triton joins requests: {ALONE}"
                )
    size = manifest.dims[str(name)]
    if size.min > 1 or (size.max is not None and size.max < serving.max_batch):
        raise UsageError(f"--max-batch is {serving.max_batch}, and {name} is {size}: {ALONE}")


def _describe(io: Any, port: Port, serving: Serving, single: str | None = None) -> None:
    """Name, type and sizes of an input or output, without the axis of the batch where requests are joined."""
    sizes = [size if isinstance(size, int) else 1 if size == single else -1 for size in port.shape]
    own = sizes[1:] if serving.max_batch else sizes
    io.name, io.data_type = port.name, _data_type(port)
    # Triton has no tensors without axes: such a number comes as one of size 1
    io.dims.extend(own or [1])
    if serving.max_batch and not own:
        io.reshape.SetInParent()


def _data_type(port: Port) -> Any:
    if port.dtype not in TYPES:
        raise UnsupportedModelError(f"{port} has a type that Triton does not know; its types are {', '.join(TYPES)}")
    return messages().DataType.Value(TYPES[port.dtype])


def _add_state(
    config: Any, files: dict[str, bytes], number: int, state: StatePort, manifest: Manifest, serving: Serving
) -> None:
    value = _first_value(state, manifest, serving)
    dims = list(value.shape) or [1]
    suffix = SUFFIX if serving.max_batch and rows_inside(state) else ""
    entry = config.sequence_batching.state.add(
        input_name=state.port.name + suffix,
        output_name=state.following + suffix,
        data_type=_data_type(state.port),
        dims=dims,
    )
    initial = entry.initial_state.add(name=f"first {state.port.name}", data_type=entry.data_type, dims=dims)
    if value.any():
        initial.data_file = f"state_{number}"
        files[initial.data_file] = value.astype(value.dtype.newbyteorder("<")).tobytes()
    else:
        initial.zero_data = True
    if not value.shape:
        # the sizes of a number without axes are read from the list of outputs alone
        config.output.add(name=state.following, data_type=entry.data_type, dims=dims)


def _first_value(state: StatePort, manifest: Manifest, serving: Serving) -> np.ndarray[Any, Any]:
    """The state of one sequence before its first step, without the axis of the batch where requests are joined."""
    port = state.port
    if state.pending is not None:
        raise UnsupportedModelError(
            f"state {port} keeps the steps of its last chunk, and Triton's states on ONNX Runtime keep their size: "
            "serve it from a program of its own (seqc bundle)"
        )
    if state.grows is not None:
        if serving.max_batch:
            raise UnsupportedModelError(
                f"state {port} grows with the steps, and Triton batches sequences that have seen different numbers of them: "
                "--max-batch 0 --capacity N serves one at a time, of N steps at most, on the CPU"
            )
        return state.start(1, _capacity(port, state.grows, manifest, serving))
    if not serving.max_batch:
        return state.start(1)
    if state.batch_axis is None:
        raise UnsupportedModelError(
            f"state {port} is one for all rows, and Triton batches sequences that have seen different numbers of steps: {ALONE}"
        )
    if state.initial.shape[state.batch_axis] != 1:
        raise UnsupportedModelError(f"state {port} has several places for each row, and Triton joins rows: {ALONE}")
    if state.initial.ndim == 1:
        raise UnsupportedModelError(f"state {port} is one number for each row, which Triton cannot describe: {ALONE}")
    first: np.ndarray[Any, Any] = state.start(1).take(0, state.batch_axis)
    return first


def _capacity(port: Port, axis: int, manifest: Manifest, serving: Serving) -> int:
    if serving.capacity is None:
        raise UnsupportedModelError(
            f"state {port} grows with the steps, and Triton's states on ONNX Runtime keep their size: "
            "--capacity N gives room for N steps of a sequence"
        )
    known = manifest.dims.get(str(port.shape[axis]))
    if known is not None and known.max is not None and serving.capacity > known.max:
        raise UsageError(f"--capacity is {serving.capacity}, and the model takes {known.max} steps at most")
    return serving.capacity
