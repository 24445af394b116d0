"""The runtime works where only numpy and onnxruntime are installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.helpers.artifacts import small_inputs, small_outputs, write_small

# An import hook blocks the packages as if they were absent; it is installed before anything of seqc is imported.
SCRIPT = """
import sys

BLOCKED = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "networkx", "sympy", "click", "rich"}
BLOCKED |= {"tensorrt", "tensorrt_rtx", "cuda"}

class Absent:
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)

sys.meta_path.insert(0, Absent())
assert not BLOCKED & {name.split(".")[0] for name in sys.modules}

import numpy as np
import seqc
import seqc.compare
import seqc.runtime

directory, inputs, outputs = sys.argv[1:]
session = seqc.runtime.load(directory)
np.savez(outputs, **session.run(dict(np.load(inputs))))
try:
    session.run({})
except seqc.errors.ArtifactError as error:
    print(error)
assert not BLOCKED & {name.split(".")[0] for name in sys.modules}
try:
    import torch
except ModuleNotFoundError:
    print("torch is absent")
"""


def test_loads_and_runs_without_torch_onnx_or_transformers(tmp_path: Path) -> None:
    artifact = write_small(tmp_path / "small")
    inputs = small_inputs(2, 9)
    np.savez(tmp_path / "in.npz", **inputs)
    command = [sys.executable, "-c", SCRIPT, str(artifact), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "missing input 'x', 'ids': the model takes x, ids, got nothing",
        "torch is absent",
    ]
    with np.load(tmp_path / "out.npz") as outputs:
        for name, expected in small_outputs(inputs).items():
            np.testing.assert_array_equal(outputs[name], expected)
