"""What only running a model tells about serving it: whether rows stay apart, and whether a full state is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqc.compare import compare_all
from seqc.deploy.triton_config import TYPES, messages
from seqc.errors import ArtifactError, UnsupportedModelError
from seqc.runtime.inputs import Array
from seqc.runtime.manifest import Manifest
from seqc.runtime.ort import run_session
from seqc.runtime.rows import Rows
from seqc.runtime.session import Session
from seqc.runtime.shapes import evaluate
from seqc.runtime.states import state_port

_ROWS = 3
_PLACES = 4


def check_rows(session: Session, rows: str, most: int) -> None:
    """Raise UnsupportedModelError where a row of a batch is not what it is by itself: requests would change each other."""
    count = min(_ROWS, most)
    manifest = session.manifest
    inputs = _random(manifest, {rows: count})
    together = session.run(inputs)
    for row in range(count):
        alone = session.run({name: value[row : row + 1] for name, value in inputs.items()})
        own = {name: value[row : row + 1] for name, value in together.items()}
        for found in compare_all(alone, own, manifest.tolerances):
            if not found.ok:
                raise UnsupportedModelError(
                    f"rows of a batch influence each other ({found}), and Triton would join requests of different clients: "
                    "--max-batch 0 serves one request at a time"
                )


def check_overflow(ort_session: Any, manifest: Manifest) -> None:
    """Raise UnsupportedModelError where steps behind the places of a growing state are no error."""
    if manifest.dims[str(manifest.steps_dim)].min > _PLACES + 1:
        raise UnsupportedModelError("pieces of so many steps do not fit what Triton's states can be tried with")
    names = [port.name for port in manifest.outputs]
    full, beyond = (_first_call(manifest, steps) for steps in (_PLACES, _PLACES + 1))
    run_session(ort_session, names, full)
    try:
        run_session(ort_session, names, beyond)
    except ArtifactError:
        return
    raise UnsupportedModelError(
        "a growing state that is full is no error in this model: Triton would go on with wrong ones"
    )


def check_served(
    ort_session: Any, config: Any, files: Mapping[str, bytes], session: Session, capacity: int | None
) -> None:
    """Raise ArtifactError where the model as it was written, from the states of ``config`` on, gives other outputs.

    ``capacity``: the most steps that these states have room for.
    """
    joined = config.max_batch_size > 0
    manifest = session.manifest
    rows = Rows(manifest).batch
    sizes = {rows: min(_ROWS, max(1, config.max_batch_size))} if rows else {}
    if capacity is not None:
        sizes[str(manifest.steps_dim)] = min(capacity, manifest.dims[str(manifest.steps_dim)].traced)
    inputs = _random(manifest, sizes)
    given, types = dict(inputs), {name: value for value, name in TYPES.items()}
    for state in config.sequence_batching.state:
        first, dtype = state.initial_state[0], types[messages().DataType.Name(state.data_type)]
        value = np.zeros(list(first.dims), dtype)
        if first.WhichOneof("state_data") == "data_file":
            value = np.frombuffer(files[first.data_file], np.dtype(dtype).newbyteorder("<")).reshape(value.shape)
        given[state.input_name] = np.repeat(value[None], session.rows_in(inputs), 0) if joined else value
    for node in ort_session.get_inputs():
        given[node.name] = given[node.name].reshape(()) if not node.shape else given[node.name]
    names = [port.name for port in manifest.outputs]
    served = dict(zip(names, run_session(ort_session, names, given), strict=True))
    for found in compare_all(session.run(inputs), served, manifest.tolerances):
        if not found.ok:
            raise ArtifactError(f"the model as Triton would run it does not give what the artifact gives: {found}")


def _first_call(manifest: Manifest, steps: int) -> dict[str, Array]:
    inputs = _random(manifest, dict.fromkeys(manifest.dims, 1) | {str(manifest.steps_dim): steps})
    states = [state_port(state, manifest.dims) for state in manifest.states]
    return inputs | {state.port.name: state.start(1, _PLACES) for state in states}


def _random(manifest: Manifest, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Normal floats, and integers 0 and 1; dimensions that are not in ``sizes`` as traced."""
    known = {name: dim.traced for name, dim in manifest.dims.items()} | dict(sizes)
    generator = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for port in manifest.inputs:
        shape = [size if isinstance(size, int) else evaluate(size, known) for size in port.shape]
        if None in shape:
            raise UnsupportedModelError(
                f"input {port} has a size that cannot be worked out, and the model not be tried"
            )
        whole = [int(size) for size in shape if size is not None]
        draw = generator.standard_normal(whole) if "float" in port.dtype else generator.integers(0, 2, whole)
        arrays[port.name] = draw.astype(port.dtype)
    return arrays
