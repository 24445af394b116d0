"""Engines behind NVIDIA Triton's TensorRT backend: which of an artifact it can load, and what it cannot do with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqc.deploy.batch_first import rows_inside
from seqc.deploy.triton_serving import ALONE, Serving
from seqc.errors import UnsupportedModelError, UsageError
from seqc.runtime.manifest import MODEL_FILE, Manifest
from seqc.runtime.rows import Rows
from seqc.runtime.states import state_port

PLAN_FILE = "model.plan"
_SERVED = "tensorrt"
_ONNX = "--onnx serves its ONNX model, which Triton's ONNX Runtime backend runs"


def engine_of(manifest: Manifest, serving: Serving) -> Mapping[str, Any] | None:
    """The engine that is to be served: the general one; None where the ONNX model is.

    Raises UnsupportedModelError where Triton cannot load it: its backend has TensorRT, which reads no engines of others.
    """
    file = Path(MODEL_FILE).with_suffix(".engine").name
    found = next((entry for entry in manifest.engines if entry["file"] == file), None)
    if found is None or serving.onnx:
        return None
    if found.get("package") != _SERVED:
        raise UnsupportedModelError(
            f"{file} is an engine of {found.get('package', 'another package')}, and Triton's backend loads those of "
            f"{_SERVED} only: {_ONNX}"
        )
    return found


def check_engine(manifest: Manifest, engine: Mapping[str, Any], serving: Serving) -> None:
    """Raise where an engine, which stays as it was built, cannot be served so, and say what to try.

    Triton's requests are joined along the first axis of everything; it passes sizes to an engine that its profile must have;
    and a state that is full would not be an error on a GPU.
    """
    file = engine["file"]
    states = [state_port(state, manifest.dims) for state in manifest.states]
    for state in states:
        if state.grows is not None:
            raise UnsupportedModelError(
                f"state {state.port} grows with the steps, and behind its places an engine would write to other memory: {_ONNX}"
            )
        if state.pending is not None or not state.port.shape:
            raise UnsupportedModelError(
                f"state {state.port} has no sizes that Triton's TensorRT backend can keep: {_ONNX}"
            )
        if serving.max_batch and rows_inside(state):
            raise UnsupportedModelError(
                f"state {state.port} has its rows inside, and an engine stays as it was built: {ALONE}; {_ONNX}"
            )
    rows, steps = Rows(manifest).batch, manifest.steps_dim
    for profile in engine["profiles"]:
        most = profile[rows]["max"] if rows in profile else max(1, serving.max_batch)
        if serving.max_batch > most:
            raise UsageError(f"--max-batch is {serving.max_batch}, and {file} was built for {most} rows at most")
        for name, least in ((rows, 1), (steps, 1)):
            if name in profile and profile[name]["min"] > least:
                raise UnsupportedModelError(
                    f"{file} takes {profile[name]['min']} of {name} at least, and a request may have one: compile with "
                    f"--opt profile.{name}=1,{profile[name]['opt']},{profile[name]['max']}"
                )
