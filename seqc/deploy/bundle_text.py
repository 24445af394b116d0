"""The README and the example of a bundle."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from seqc.deploy.wheel import DISTRIBUTION, NUMPY, ONNXRUNTIME, wheel_name
from seqc.errors import ArtifactError
from seqc.runtime.manifest import Manifest
from seqc.runtime.shapes import evaluate

ARTIFACT, EXAMPLE = "artifact", "example.py"


def readme(file: str, manifest: Manifest, needs: Sequence[str]) -> str:
    """How to use the archive called ``file``, and what is in it. ``needs``: what the wheel requires besides numpy."""
    folder = shlex.quote(Path(file).stem if Path(file).suffix else f"{file}.d")
    lines = [
        "# A model compiled by seqc, with its runtime",
        "",
        f"    python -m zipfile -e {shlex.quote(file)} {folder} && cd {folder}",
        f"    python -m pip install ./{wheel_name()}",
        f"    python {EXAMPLE}",
        "",
        f"Needs Python 3.11 or newer. The wheel ({DISTRIBUTION}) is pure Python; it requires",
        f"{', '.join((NUMPY, *needs))} only. Where the full seqc is installed the wheel is not needed, and must",
        "not be installed over it: both have the package `seqc`, and importing it is then an error.",
        f"`{ARTIFACT}/manifest.json` describes the model and has the SHA-256 of each file, which loading compares.",
    ]
    if manifest.engines:
        lines += [
            f"The engines run on the GPUs named below; `{ARTIFACT}` also holds the ONNX model, for which install {ONNXRUNTIME}",
            "and call `seqc.runtime.load` without providers.",
        ]
    sections = {
        "Inputs": [str(port) for port in manifest.inputs],
        "Outputs": [str(port) for port in manifest.outputs],
        "Sizes": [f"{name}: {dim}" for name, dim in manifest.dims.items()],
        "Engines": [f"{ARTIFACT}/{e['file']}, {_gpus(e['sm'])}" for e in manifest.engines],
    }
    for title, rows in sections.items():
        if rows:
            lines += ["", f"{title}:", "", *(f"- {row}" for row in rows)]
    return "\n".join(lines) + "\n"


def _gpus(sms: Sequence[int]) -> str:
    return f"sm {', '.join(map(str, sms))}" if sms else "the GPU it was built on"


def example(manifest: Manifest) -> str:
    """A script that loads the artifact and runs it once on zeros of the traced sizes; as a stream where it streams."""
    package = next((e["package"] for e in manifest.engines if "package" in e), None)
    providers = f", providers=[{package!r}]" if package else ""
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
        f'session = seqc.runtime.load(Path(__file__).parent / "{ARTIFACT}"{providers})',
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
