"""The README and the example of a bundle."""

from __future__ import annotations

import shlex
from pathlib import Path

from seqc.deploy.wheel import DISTRIBUTION, NUMPY, ONNXRUNTIME, ONNXRUNTIME_GPU, wheel_name
from seqc.errors import ArtifactError
from seqc.runtime.manifest import Manifest
from seqc.runtime.shapes import evaluate

ARTIFACT, EXAMPLE = "artifact", "example.py"


def readme(file: str, manifest: Manifest, gpu: bool) -> str:
    """How to use the archive called ``file``, and what is in it."""
    folder = shlex.quote(Path(file).stem if Path(file).suffix else f"{file}.d")
    lines = [
        "# A model compiled by seqc, with its runtime",
        "",
        f"    python -m zipfile -e {shlex.quote(file)} {folder} && cd {folder}",
        f"    python -m pip install ./{wheel_name()}",
        f"    python {EXAMPLE}",
        "",
        f"Needs Python 3.11 or newer. The wheel ({DISTRIBUTION}) is pure Python; it requires {NUMPY} and",
        f"{ONNXRUNTIME_GPU if gpu else ONNXRUNTIME} only. Where the full seqc is installed the wheel is not needed, and must",
        "not be installed over it: both have the package `seqc`, and importing it is then an error.",
        f"`{ARTIFACT}/manifest.json` describes the model and has the SHA-256 of each file, which loading compares.",
    ]
    sections = {
        "Inputs": [str(port) for port in manifest.inputs],
        "Outputs": [str(port) for port in manifest.outputs],
        "Sizes": [f"{name}: {dim}" for name, dim in manifest.dims.items()],
        "Engines": [f"{ARTIFACT}/{e.get('file', '?')}, sm {e.get('sm', '?')}" for e in manifest.engines],
    }
    for title, rows in sections.items():
        if rows:
            lines += ["", f"{title}:", "", *(f"- {row}" for row in rows)]
    return "\n".join(lines) + "\n"


def example(manifest: Manifest) -> str:
    """A script that loads the artifact and runs it once on zeros of the traced sizes; as a stream where it streams."""
    traced = {name: dim.traced for name, dim in manifest.dims.items()}
    lines = [
        '"""Loads the model beside this file and runs it on zeros."""',
        "",
        "from pathlib import Path",
        "",
        "import numpy as np",
        "",
        "import seqc.runtime",
        "",
        f'session = seqc.runtime.load(Path(__file__).parent / "{ARTIFACT}")',
        "inputs = {",
    ]
    for port in manifest.inputs:
        sizes = [size if isinstance(size, int) else evaluate(size, traced) for size in port.shape]
        if None in sizes:
            raise ArtifactError(f"input {port.name!r} has a size that cannot be worked out: {port}")
        lines.append(f"    {port.name!r}: np.zeros({tuple(sizes)}, {port.dtype!r}),")
    lines.append("}")
    if manifest.steps_dim is None:
        lines.append("outputs = session.run(inputs)")
    else:
        lines.append("stream = session.stream(session.rows_in(inputs))")
        lines.append("outputs = stream.step(inputs)  # and so on with the next steps")
    lines += ["for name, value in outputs.items():", "    print(name, value.dtype, value.shape)"]
    return "\n".join(lines) + "\n"
