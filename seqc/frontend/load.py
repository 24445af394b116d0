"""Loads a model from a file or directory. What it is is told from its content, and nothing in it is executed."""

from __future__ import annotations

import contextlib
import logging
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seqc.errors import LoadError, UsageError

_PICKLE_PROTOCOLS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass
class Loaded:
    """A model and what its file says about the inputs.

    ``kind`` is one of ``exported``, ``torchscript``, ``pickle``, ``weights``, ``huggingface``. ``example_inputs``
    (tensors by input name) and ``dynamic_shapes`` ({input: {axis: name or torch.export.Dim}}) are None where the source
    does not imply them. ``vocabulary`` is the number of token ids where the source states it.
    """

    model: nn.Module
    kind: str
    path: Path
    example_inputs: dict[str, torch.Tensor] | None = None
    dynamic_shapes: dict[str, dict[int, Any]] | None = None
    notes: list[str] = field(default_factory=list)
    vocabulary: int | None = None

    def module(self, example_inputs: dict[str, torch.Tensor]) -> nn.Module:
        """The module to trace. A TorchScript module is converted here, which takes its example inputs.

        Raises UnsupportedModelError for a TorchScript module that cannot be converted.
        """
        if isinstance(self.model, torch.jit.ScriptModule):
            from seqc.frontend.load_script import to_module

            return to_module(self.model, example_inputs)
        return self.model


def load(source: str | Path, *, entry: str | None = None, allow_pickle: bool = False) -> Loaded:
    """Load ``source``: a torch.export or TorchScript archive, a pickled module, weights, or a Hugging Face directory.

    ``entry`` ("pkg.mod:factory") names the function that builds the module a weights file belongs to; it is imported,
    with the current directory on the path. ``allow_pickle`` permits what executes code from the file. Raises LoadError
    with one line for anything that cannot be read, MissingExtraError where a package is needed, UsageError for a wrong
    ``entry``.
    """
    path = Path(source).expanduser()
    with quiet():
        try:
            kind = _kind(path)
        except OSError as error:
            raise LoadError(f"{path}: {error.strerror or error}") from error
        if entry is not None and kind not in ("weights", "safetensors"):
            raise UsageError(f"{path} holds a whole model ({kind}); --entry goes with a file of weights")
        loaded = _load(path, kind, entry, allow_pickle)
    loaded.model.eval()
    return loaded


def _load(path: Path, kind: str, entry: str | None, allow_pickle: bool) -> Loaded:
    if kind == "huggingface":
        from seqc.frontend.load_hf import load_directory

        return load_directory(path, allow_pickle)
    if kind == "exported":
        from seqc.frontend.exported import from_exported
        from seqc.frontend.load_exported import read_archive

        found = from_exported(read_archive(path, allow_pickle))
        return Loaded(found.module, kind, path, found.example_inputs, found.dynamic_shapes, found.notes)
    if kind == "torchscript":
        from seqc.frontend.load_script import read_script

        return Loaded(read_script(path), kind, path)
    from seqc.frontend.load_weights import load_weights

    return load_weights(path, kind, entry, allow_pickle)


def _kind(path: Path) -> str:
    """What ``path`` holds: exported, torchscript, huggingface, safetensors, or weights (any pickle of torch)."""
    if not path.exists():
        raise LoadError(f"{path}: no such file or directory")
    if path.is_dir():
        if (path / "manifest.json").is_file():
            raise LoadError(f"{path}: this is a compiled artifact; `seqc run` and `seqc inspect` take it")
        if not (path / "config.json").is_file():
            raise LoadError(f"{path}: a directory without config.json is no Hugging Face model directory")
        return "huggingface"
    if not path.is_file():
        raise LoadError(f"{path}: not a regular file")
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise LoadError(f"{path}: the file is empty")
    if head.startswith(b"PK"):
        return _zip_kind(path)
    if head.startswith(_PICKLE_PROTOCOLS):
        return "weights"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length >= 2:
        if length > path.stat().st_size - 8:
            raise LoadError(f"{path}: the safetensors file is truncated")
        return "safetensors"
    raise LoadError(f"{path}: not a model file that seqc knows (torch.export, TorchScript, torch.save or safetensors)")


def _zip_kind(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise LoadError(f"{path}: the archive is truncated or damaged ({error})") from error
    inner = {name.partition("/")[2] for name in names}
    if "serialized_exported_program.json" in names:
        raise LoadError(f"{path}: torch.export wrote this before torch 2.8; load it there and save it again")
    if "archive_format" in inner:
        return "exported"
    if "data.pkl" in inner:
        is_script = "constants.pkl" in inner or any(name.startswith("code/") for name in inner)
        return "torchscript" if is_script else "weights"
    raise LoadError(f"{path}: a zip archive that neither torch.export, torch.jit nor torch.save wrote")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the warnings and log lines of torch and transformers; what matters is raised or noted."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
