"""SHA-256 of the files of an artifact, computed in a stream and checked against the manifest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from seqc.errors import ArtifactError
from seqc.runtime.manifest import MODEL_FILE, FileEntry, Manifest


def digest(path: Path) -> FileEntry:
    """Hash and size of a file, read in blocks so that weights of any size fit in memory."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileEntry(sha256, file.tell())


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compare every file that the manifest names with its recorded size and hash.

    Raises:
        ArtifactError: a file is missing, cannot be read, or is not the file that the compiler wrote.
    """
    if MODEL_FILE not in manifest.files:
        raise ArtifactError(f"{directory}: the manifest lists no {MODEL_FILE}")
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing: the artifact is incomplete")
        try:
            # the size tells a truncated file without reading gigabytes of it
            size = path.stat().st_size
            if size != entry.bytes:
                raise ArtifactError(f"{path} has {size} bytes, the manifest says {entry.bytes}: truncated or altered")
            if digest(path).sha256 != entry.sha256:
                raise ArtifactError(f"{path} was altered: its SHA-256 is not the one in the manifest")
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
