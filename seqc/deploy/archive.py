"""Zip archives whose bytes depend on nothing but what is in them."""

from __future__ import annotations

import shutil
import zipfile
from typing import IO

_BLOCK = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)
_ON_UNIX, _PLAIN_FILE = 3, 0o100644


def add(archive: zipfile.ZipFile, name: str, content: IO[bytes], size: int) -> None:
    """Add ``size`` bytes, in blocks so that weights of any size fit in memory.

    They are stored as they are: weights hardly compress, and what a compressor makes of them depends on its version.
    """
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.create_system, entry.external_attr, entry.file_size = _ON_UNIX, _PLAIN_FILE << 16, size
    with archive.open(entry, "w") as file:
        shutil.copyfileobj(content, file, _BLOCK)
