"""One archive with all that an artifact needs on the machine where it runs."""

from __future__ import annotations

import contextlib
import io
import secrets
import shlex
import zipfile
from pathlib import Path

from seqc.deploy.archive import add
from seqc.deploy.wheel import DISTRIBUTION, NUMPY, ONNXRUNTIME, ONNXRUNTIME_GPU, runtime_wheel, wheel_name
from seqc.errors import ArtifactError, UsageError
from seqc.runtime import manifest as manifests
from seqc.runtime.files import check_files
from seqc.runtime.manifest import MANIFEST_FILE, Manifest
from seqc.runtime.shapes import evaluate

ARTIFACT, README, EXAMPLE = "artifact", "README.md", "example.py"


def write_bundle(directory: str | Path, file: str | Path, gpu: bool = False) -> list[str]:
    """Write the artifact in ``directory``, the runtime as a wheel, a README and an example to the zip archive ``file``.

    Every file that the manifest names goes in, engines and goldens included. The same artifact gives the same bytes. ``file``
    appears complete or stays as it was.

    Args:
        gpu: the wheel requires onnxruntime-gpu instead of onnxruntime.

    Returns:
        The names in the archive.

    Raises:
        ArtifactError: the artifact is missing, damaged or altered, or the disk refuses.
        UsageError: ``file`` is a directory, lies inside the artifact, or in a directory that does not exist.
    """
    source, target = Path(directory).resolve(), Path(file).resolve()
    manifest = manifests.read(source)
    check_files(source, manifest)
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"{file}: not a file that can be written")
    if target.is_relative_to(source):
        raise UsageError(f"{file} lies inside the artifact {directory}: name a file elsewhere")
    made = {
        README: _readme(target.name, manifest, gpu).encode(),
        EXAMPLE: _example(manifest).encode(),
        wheel_name(): runtime_wheel(gpu),
    }
    stage = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        with zipfile.ZipFile(stage, "w") as archive:
            for name, content in made.items():
                add(archive, name, io.BytesIO(content), len(content))
            for name in (MANIFEST_FILE, *sorted(manifest.files)):
                with (source / name).open("rb") as content_file:
                    add(archive, f"{ARTIFACT}/{name}", content_file, (source / name).stat().st_size)
            names = archive.namelist()
        stage.replace(target)
    except OSError as error:
        raise ArtifactError(f"cannot write the bundle {file}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            stage.unlink(missing_ok=True)
    return names


def _readme(file: str, manifest: Manifest, gpu: bool) -> str:
    folder = shlex.quote(Path(file).stem if Path(file).suffix else f"{file}.d")
    inputs, outputs = ("".join(f"- {port}\n" for port in ports) for ports in (manifest.inputs, manifest.outputs))
    dims = "".join(f"- {name}: {dim}\n" for name, dim in manifest.dims.items())
    engines = "".join(f"- {ARTIFACT}/{e.get('file', '?')}, sm {e.get('sm', '?')}\n" for e in manifest.engines)
    return f"""# A model compiled by seqc, with its runtime

    python -m zipfile -e {shlex.quote(file)} {folder} && cd {folder}
    python -m pip install ./{wheel_name()}
    python {EXAMPLE}

Needs Python 3.11 or newer. The wheel ({DISTRIBUTION}) is pure Python and requires {NUMPY} and
{
        ONNXRUNTIME_GPU if gpu else ONNXRUNTIME
    } only. Do not install it where the full seqc is: both provide the package `seqc`, and importing
it is then an error. `{
        ARTIFACT
    }/manifest.json` describes the model and has the SHA-256 of each file, which loading compares.

Inputs:

{inputs}
Outputs:

{outputs}{f"{chr(10)}Sizes:{chr(10)}{chr(10)}{dims}" if dims else ""}{
        f"{chr(10)}Engines:{chr(10)}{chr(10)}{engines}" if engines else ""
    }"""


def _example(manifest: Manifest) -> str:
    """A script that loads the artifact and runs it once on zeros of the traced sizes; as a stream where it streams."""
    traced = {name: dim.traced for name, dim in manifest.dims.items()}
    rows = []
    for port in manifest.inputs:
        sizes = [size if isinstance(size, int) else evaluate(size, traced) for size in port.shape]
        if None in sizes:
            raise ArtifactError(f"input {port.name!r} has a size that cannot be worked out: {port}")
        rows.append(f"    {port.name!r}: np.zeros({tuple(sizes)}, {port.dtype!r}),\n")
    streams = manifest.steps_dim is not None
    run = "outputs = session.run(inputs)\n"
    if streams:
        run = "stream = session.stream(session.rows_in(inputs))\noutputs = stream.step(inputs)  # and so on\n"
    return f'''"""Loads the model beside this file and runs it on zeros."""

from pathlib import Path

import numpy as np

import seqc.runtime

session = seqc.runtime.load(Path(__file__).parent / "{ARTIFACT}")
inputs = {{
{"".join(rows)}}}
{run}for name, value in outputs.items():
    print(name, value.dtype, value.shape)
'''
