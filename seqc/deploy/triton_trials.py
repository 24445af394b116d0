"""What only running a model tells about serving it: whether rows stay apart, and whether a full state is an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqc.compare import compare_all
from seqc.errors import ArtifactError, UnsupportedModelError
from seqc.runtime.inputs import Array
from seqc.runtime.manifest import Manifest
from seqc.runtime.ort import run_session
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
