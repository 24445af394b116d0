"""Files: SHA-256 of those of an artifact, checked against the manifest; and writing one whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from seqc.errors import ArtifactError
from seqc.runtime.manifest import MODEL_FILE, FileEntry, Manifest


@contextlib.contextmanager
def replacing(target: Path, what: str) -> Iterator[Path]:
    """A path beside ``target`` to write to; behind, it takes its place. Where anything fails ``target`` stays as it was.

    Raises ArtifactError, which calls the file ``what``, where the disk refuses.
    """
    stage = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        yield stage
        stage.replace(target)
    except OSError as error:
        raise ArtifactError(f"cannot write {what}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            stage.unlink(missing_ok=True)


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
