"""What an artifact says of itself: its manifest."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import seqc
from seqc.check import LONGEST_BRANCH
from seqc.compare import default_tolerance
from seqc.memory import nominal_sizes, peak_activations
from seqc.options import DTYPES
from seqc.pipeline import PassRecord
from seqc.program import Port, Program, module_path, source_line
from seqc.runtime.ort import RELEASED_OPSET
from seqc.streaming.chunks import states_json
from seqc.streaming.time import time_of


def manifest_of(
    module: nn.Module,
    program: Program,
    target: str,
    opset: int,
    records: list[PassRecord],
    memory: dict[str, Any],
    tolerance: Mapping[str, float],
) -> dict[str, Any]:
    """The keys of ``manifest.json`` that :func:`~seqc.artifact.write_artifact` does not add."""

    def ports(items: Sequence[Port]) -> list[dict[str, Any]]:
        return [{"name": p.name, "dtype": str(p.dtype).removeprefix("torch."), "shape": list(p.shape)} for p in items]

    return {
        "source": {"kind": "module", "module": f"{type(module).__module__}.{type(module).__qualname__}"},
        "target": target,
        "opset": opset,
        "inputs": ports(program.given_inputs),
        "outputs": ports(program.own_outputs),
        "states": states_json(program),
        "steps_dim": time_of(program).name if program.states else None,
        "dims": {d.name: {"min": d.min, "max": d.max, "traced": d.traced} for d in program.dims},
        "passes": [{"name": r.name, "changes": r.changes, "reasons": list(r.reasons)} for r in records],
        "peak_activations": memory,
        "tolerances": dict(tolerance),
        "notes": [*program.notes, *_unreleased(opset), *_unseen_branches(program)],
        "engines": [],
        "tools": {"seqc": seqc.__version__, "python": platform.python_version(), **_versions()},
    }


def tolerances(program: Program, options: dict[str, Any]) -> dict[str, float]:
    """The largest accepted error of each output: that of its type, or of the one that was asked to compute in."""
    asked = options["tolerance"]
    if asked is not None:
        return {p.name: asked for p in program.own_outputs}
    least = default_tolerance(DTYPES.get(options["dtype"], "float32"))
    own = {p.name: default_tolerance(str(p.dtype).removeprefix("torch.")) for p in program.own_outputs}
    return {name: max(tolerance, least) for name, tolerance in own.items()}


def memory_of(traced: Program, program: Program) -> dict[str, Any]:
    """Estimated bytes of all activations alive at once, before and after the passes, and where they are most now."""
    before, after = peak_activations(traced), peak_activations(program)
    where = "" if after.node is None else module_path(after.node) or source_line(after.node)
    return {
        "sizes": nominal_sizes(program),
        "before_passes": before.bytes,
        "after_passes": after.bytes,
        "at": where,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _unreleased(opset: int) -> list[str]:
    if opset <= RELEASED_OPSET:
        return []
    return [
        f"ONNX Runtime 1.31 refuses opset {opset} unless ALLOW_RELEASED_ONNX_OPSET_ONLY=0 is in the environment, which "
        "seqc.runtime, and so the check, sets while it loads the model; it has no kernels for what that opset adds and "
        "runs ONNX's definition of it, a loop"
    ]


def _unseen_branches(program: Program) -> list[str]:
    return [
        f"the model compares {d.name} with {size} at {line}: beyond it may branch otherwise, which was NOT checked"
        for d in program.dims
        for size, line in d.branches
        if size > LONGEST_BRANCH and (d.max is None or size < d.max)
    ]
