"""The file in which a stream's states are saved: a SHA-256, then an npz archive with a JSON header and the arrays."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from seqc.errors import ArtifactError
from seqc.runtime.files import replacing
from seqc.runtime.inputs import Array

_HASH_BYTES = 32


def write(target: Path, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Write the file, which appears complete or not at all. Raises ArtifactError."""
    data = io.BytesIO()
    np.savez(data, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    body = data.getvalue()
    with replacing(target, f"the state {target}") as stage, stage.open("wb") as file:
        file.write(hashlib.sha256(body).digest() + body)
        file.flush()
        os.fsync(file.fileno())


def read(source: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """(header, arrays). Raises ArtifactError where the file cannot be read or is not what :func:`write` wrote."""
    try:
        data = source.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read the state {source}: {error.strerror or error}") from error
    digest, body = data[:_HASH_BYTES], data[_HASH_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise ArtifactError(f"{source} is no saved state, or was truncated or altered")
    try:
        with np.load(io.BytesIO(body), allow_pickle=False) as archive:
            header = json.loads(bytes(archive["header"]))
            arrays = {name: archive[name] for name in archive.files if name != "header"}
    # what zipfile and numpy raise for archives that were made to be wrong
    except (ValueError, KeyError, OSError, EOFError, NotImplementedError, RuntimeError, AttributeError, TypeError,
            SyntaxError, MemoryError, zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        raise ArtifactError(f"{source} is no saved state: {error}".splitlines()[0]) from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{source} is no saved state: its header is {header!r}"[:200])
    return header, arrays
