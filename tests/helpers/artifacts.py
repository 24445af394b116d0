"""A small ONNX model with its manifest, written as an artifact."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from seqc.artifact import write_artifact

_TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
scale_and_shift (float[batch, sequence, 4] x, int64[batch, sequence] ids)
    => (float[batch, sequence, 4] y, int64[batch, sequence] next)
{
    scaled = Mul(x, weight)
    floats = Cast<to = 1>(ids)
    axis = Constant<value_ints = [2]>()
    shift = Unsqueeze(floats, axis)
    y = Add(scaled, shift)
    next = Add(ids, ids)
}
"""


def small_model(weight: np.ndarray | None = None) -> ir.Model:
    """y = x * weight + ids, next = 2 * ids; ``weight`` is float32[4] or broadcasts like it (default 0, 1, 2, 3)."""
    model = ir.from_onnx_text(_TEXT)
    array = np.arange(4, dtype=np.float32) if weight is None else weight
    loose = next(node.inputs[1] for node in model.graph if node.op_type == "Mul")
    value = ir.val("weight", const_value=ir.tensor(array, name="weight"))
    model.graph.register_initializer(value)
    ir.convenience.replace_all_uses_with(loose, value)
    return model


def small_manifest(**changes: Any) -> dict[str, Any]:
    """The manifest of :func:`small_model` without ``format_version`` and ``files``; sequence is 2 to 64."""
    manifest = {
        "source": {"kind": "module", "module": "tests.Small"},
        "target": "onnx",
        "opset": 21,
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": ["batch", "sequence", 4]},
            {"name": "ids", "dtype": "int64", "shape": ["batch", "sequence"]},
        ],
        "outputs": [
            {"name": "y", "dtype": "float32", "shape": ["batch", "sequence", 4]},
            {"name": "next", "dtype": "int64", "shape": ["batch", "sequence"]},
        ],
        "states": [],
        "dims": {
            "batch": {"min": 1, "max": None, "traced": 3},
            "sequence": {"min": 2, "max": 64, "traced": 7},
        },
        "passes": [{"name": "hoist", "changes": 2, "reasons": ["nothing reads the carry"]}],
        "tolerances": {"y": 1e-4, "next": 0},
        "notes": [],
        "engines": [],
        "tools": {"seqc": "0.1.0"},
    }
    return {**manifest, **changes}


def write_small(directory: Path, **changes: Any) -> Path:
    """An artifact of :func:`small_model` in ``directory``."""
    return write_artifact(directory, small_model(), small_manifest(**changes), {"seconds": 1.5}, "program text\n")


def small_inputs(batch: int = 2, sequence: int = 5) -> dict[str, np.ndarray]:
    x = np.arange(batch * sequence * 4, dtype=np.float32).reshape(batch, sequence, 4)
    return {"x": x, "ids": np.arange(batch * sequence, dtype=np.int64).reshape(batch, sequence)}


def small_outputs(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the model computes, in numpy."""
    x, ids = inputs["x"], inputs["ids"]
    return {"y": x * np.arange(4, dtype=np.float32) + ids[..., None].astype(np.float32), "next": ids + ids}


def edit_manifest(directory: Path, edit: Any) -> None:
    """Apply ``edit`` to the decoded manifest in place and write it back."""
    path = directory / "manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def replace_file(directory: Path, name: str, content: bytes) -> None:
    """Replace a file of the artifact and record its new hash, as a hostile or buggy writer would."""
    (directory / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit_manifest(directory, lambda data: data["files"].update({name: entry}))
