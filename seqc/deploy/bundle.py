"""One archive with all that an artifact needs on the machine where it runs."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from seqc.deploy.archive import add
from seqc.deploy.bundle_text import ARTIFACT, EXAMPLE, example, readme
from seqc.deploy.wheel import needed, runtime_wheel, wheel_name
from seqc.errors import UsageError
from seqc.runtime import manifest as manifests
from seqc.runtime.files import check_files, replacing
from seqc.runtime.manifest import MANIFEST_FILE

README = "README.md"


def write_bundle(directory: str | Path, file: str | Path, gpu: bool = False) -> list[str]:
    """Write the artifact in ``directory``, the runtime as a wheel, a README and an example to the zip archive ``file``.

    Every file that the manifest names goes in, engines and goldens included. The same artifact gives the same bytes. ``file``
    appears complete or stays as it was.

    Args:
        gpu: the wheel requires onnxruntime-gpu instead of onnxruntime. Where there are engines it requires neither, but the
            package that runs these.

    Returns:
        The names in the archive.

    Raises:
        ArtifactError: the artifact is missing, damaged or altered, or the disk refuses.
        UsageError: ``gpu`` is asked of an artifact with engines; ``file`` is a directory, lies inside the artifact, or in a
            directory that does not exist.
    """
    source, target = Path(directory).resolve(), Path(file).resolve()
    manifest = manifests.read(source)
    check_files(source, manifest)
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"{file}: not a file that can be written")
    if target.is_relative_to(source):
        raise UsageError(f"{file} lies inside the artifact {directory}: name a file elsewhere")
    if gpu and manifest.engines:
        raise UsageError("--gpu is about onnxruntime, and this artifact has engines, which run on a GPU without it")
    needs = needed(manifest, gpu)
    made = {
        README: readme(target.name, manifest, needs).encode(),
        EXAMPLE: example(manifest).encode(),
        wheel_name(): runtime_wheel(needs),
    }
    with replacing(target, f"the bundle {file}") as stage, zipfile.ZipFile(stage, "w") as archive:
        for name, content in made.items():
            add(archive, name, io.BytesIO(content), len(content))
        for name in (MANIFEST_FILE, *sorted(manifest.files)):
            with (source / name).open("rb") as content_file:
                add(archive, f"{ARTIFACT}/{name}", content_file, (source / name).stat().st_size)
        return archive.namelist()
