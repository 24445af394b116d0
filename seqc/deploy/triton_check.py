"""What Triton would refuse of a configuration, or silently do wrong with it, found before it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from google.protobuf import text_format
from onnx import helper

from seqc.deploy.triton_config import TYPES, messages
from seqc.errors import ArtifactError

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def parse(text: str) -> Any:
    """The ModelConfig that ``text`` spells. Raises ArtifactError, one line."""
    try:
        return text_format.Parse(text, messages().ModelConfig())
    except text_format.ParseError as error:
        raise ArtifactError(f"config.pbtxt: {error}".splitlines()[0]) from error


def graph_tensors(model: onnx.ModelProto) -> tuple[Tensors, Tensors]:
    """(inputs, outputs) of a model: Triton's type and the sizes of each; -1 where one is not fixed."""
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    return _tensors([v for v in graph.input if v.name not in stored]), _tensors(graph.output)


def _tensors(values: Sequence[onnx.ValueInfoProto]) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for value in values:
        tensor = value.type.tensor_type
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        sizes = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
        found[value.name] = (TYPES.get(dtype, dtype), sizes)
    return found


def check(config: Any, files: Mapping[str, bytes], inputs: Tensors, outputs: Tensors) -> None:
    """Compare ``config`` with the graph it is for, as Triton's core and its ONNX Runtime backend (2026) do.

    Args:
        files: the folder ``initial_state``.
        inputs, outputs: those of the graph, see :func:`graph_tensors`.

    Raises:
        ArtifactError: the first fault.
    """
    states = config.sequence_batching.state
    given = [io.name for io in config.input] + [state.input_name for state in states]
    if sorted(given) != sorted(inputs):
        raise ArtifactError(f"config.pbtxt has the inputs {', '.join(given)}; the model takes {', '.join(inputs)}")
    for exact, ios, tensors in ((False, config.input, inputs), (True, config.output, outputs)):
        for io in ios:
            _check_io(config, io, tensors, exact)
    for state in states:
        _check_state(config, state, files, inputs, outputs)
    _check_pairs([(state.input_name, state.output_name) for state in states])


def _check_io(config: Any, io: Any, tensors: Tensors, exact: bool) -> None:
    if io.name not in tensors:
        raise ArtifactError(f"config.pbtxt has {io.name!r}, which the model does not have")
    if not io.dims or any(size < 1 and size != -1 for size in io.dims):
        raise ArtifactError(f"{io.name!r} has the sizes {list(io.dims)}: each must be at least 1, or -1")
    dtype, wanted = tensors[io.name]
    own = list(io.reshape.shape) if io.HasField("reshape") else list(io.dims)
    found = [-1, *own] if config.max_batch_size else own
    if not wanted and all(size == 1 for size in found):
        found = []
    fits = len(found) == len(wanted) and all(
        size == model or (model == -1 and not exact) for size, model in zip(found, wanted, strict=True)
    )
    _agree(io.name, io.data_type, dtype, found, list(wanted), fits)


def _check_state(config: Any, state: Any, files: Mapping[str, bytes], inputs: Tensors, outputs: Tensors) -> None:
    found = [1, *state.dims] if config.max_batch_size else list(state.dims)
    if not state.dims or any(size < 1 for size in state.dims):
        raise ArtifactError(f"state {state.input_name!r} has the sizes {list(state.dims)}: each must be at least 1")
    for name, tensors in ((state.input_name, inputs), (state.output_name, outputs)):
        if name not in tensors:
            raise ArtifactError(f"config.pbtxt has the state {name!r}, which the model does not have")
        dtype, wanted = tensors[name]
        own = [] if not wanted and found == [1] else found
        fits = len(own) == len(wanted) and all(m in (-1, size) for size, m in zip(own, wanted, strict=True))
        # where requests are joined along the first axis, it must be free
        fits = fits and not (config.max_batch_size and wanted[0] != -1)
        _agree(name, state.data_type, dtype, own, list(wanted), fits)
    if not outputs[state.output_name][1] and all(io.name != state.output_name for io in config.output):
        raise ArtifactError(f"state {state.output_name!r} has no axes: Triton reads its sizes from the list of outputs")
    if len(state.initial_state) != 1:
        raise ArtifactError(
            f"state {state.input_name!r} has no first value: Triton would begin with what lay in memory"
        )
    first = state.initial_state[0]
    if not first.name or first.data_type != state.data_type or list(first.dims) != list(state.dims):
        raise ArtifactError(f"the first value of state {state.input_name!r} is of another type or size, or has no name")
    if first.WhichOneof("state_data") is None:
        raise ArtifactError(f"the first value of state {state.input_name!r} has neither zero_data nor data_file")
    if first.WhichOneof("state_data") == "data_file" and first.data_file not in files:
        raise ArtifactError(
            f"the first value of state {state.input_name!r} is in {first.data_file!r}, which is not there"
        )


def _agree(name: str, data_type: int, dtype: str, found: list[int], wanted: list[int], fits: bool) -> None:
    spelled = messages().DataType.Name(data_type)
    if spelled != dtype or not fits:
        raise ArtifactError(f"config.pbtxt has {name!r} as {spelled} {found}; in the model it is {dtype} {wanted}")


def _check_pairs(pairs: list[tuple[str, str]]) -> None:
    """Triton takes the n-th output by name for the n-th input by name (triton-inference-server/server issue 8586)."""
    for (given, following), other in zip(sorted(pairs), sorted(following for _, following in pairs), strict=True):
        if following != other:
            raise ArtifactError(
                f"Triton pairs states in the order of their names, and would pass {other!r} on to {given!r} instead of "
                f"{following!r}: rename the states"
            )
