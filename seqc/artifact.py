"""Writes an artifact directory, whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from seqc.errors import ArtifactError
from seqc.runtime.files import digest
from seqc.runtime.manifest import FORMAT_VERSION, MANIFEST_FILE, MODEL_FILE, STEP_FILE, parse
from seqc.shared_weights import INLINE_TENSOR_BYTES, PAGE, write_sharing

DATA_FILE = "model.onnx.data"
REPORT_FILE = "report.json"
TEXT_FILE = "program.txt"

EXTERNAL_ABOVE_BYTES = 64 * 2**20
"""Weights of more than this in total are stored beside the model; protobuf itself ends at 2 GB."""


def write_artifact(
    directory: str | Path,
    model: ir.Model,
    manifest: Mapping[str, Any],
    report: Mapping[str, Any],
    text: str,
    *,
    step: ir.Model | None = None,
    engines: Mapping[str, bytes] | None = None,
    overwrite: bool = True,
) -> Path:
    """Write ``model`` and what describes it to ``directory``, which appears complete or stays as it was.

    Everything is written to a hidden sibling directory (``.seqc-*.partial``) that is then renamed into place. An
    artifact that is already there is moved aside first, put back if the rename fails, and removed in the end.

    Args:
        manifest: the keys of ``manifest.json`` but for ``format_version`` and ``files``, which are added.
        report: JSON-serialisable, stored as ``report.json``.
        text: the text form of the Program, stored as ``program.txt``.
        step: the form of a streaming model for one new step; both then share one file of weights.
        engines: what was built of the models, by file name.
        overwrite: False refuses a directory that already holds an artifact.

    Returns:
        The absolute path of the artifact.

    Raises:
        ArtifactError: see :func:`check_destination`; the manifest is not valid; or the disk refuses.
        ValueError, TypeError: ``manifest`` or ``report`` cannot be written as strict JSON.
    """
    target = check_destination(directory, overwrite=overwrite)
    _check_manifest(model, manifest)
    stage = target.parent / f".seqc-{secrets.token_hex(8)}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        _write_json(stage / REPORT_FILE, report)
        (stage / TEXT_FILE).write_text(text, "utf-8", newline="\n")
        if step is None:
            _write_model(stage, model)
        else:
            write_sharing(stage, {MODEL_FILE: model, STEP_FILE: step}, DATA_FILE)
        for name, content in (engines or {}).items():
            (stage / name).write_bytes(content)
        files = {path.name: dataclasses.asdict(digest(path)) for path in sorted(stage.iterdir())}
        _write_json(stage / MANIFEST_FILE, {**manifest, "format_version": FORMAT_VERSION, "files": files})
        _put_in_place(stage, target)
    except OSError as error:
        raise ArtifactError(f"cannot write the artifact {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return target


def check_destination(directory: str | Path, *, overwrite: bool = True) -> Path:
    """The absolute path to write to, if an artifact may be put there. Cheap: ask before compiling for minutes.

    Raises:
        ArtifactError: it is a file, the current directory or a mount point (neither can be renamed), a directory that
            is neither empty nor a seqc artifact, an artifact with files in it that seqc did not write, or any artifact
            where ``overwrite`` is False.
    """
    target = Path(directory).resolve()
    try:
        if not target.exists():
            return target
        if not target.is_dir():
            raise ArtifactError(f"{target} is a file; an artifact is a directory")
        if target == Path.cwd().resolve() or os.path.ismount(target):
            raise ArtifactError(f"{target} is the current directory or a mount point: name a directory inside it")
        content = {path.name for path in target.iterdir()}
        if not content:
            return target
        own = _own_names(target)
    except OSError as error:
        raise ArtifactError(f"cannot write to {target}: {error.strerror or error}") from error
    if own is None:
        raise ArtifactError(f"{target} is not empty and not a seqc artifact: remove it or choose another directory")
    if not overwrite:
        raise ArtifactError(f"{target} already holds an artifact")
    foreign = sorted(content - own)
    if foreign:
        raise ArtifactError(f"{target} holds {foreign[0]!r}, which seqc did not write and would delete: move it away")
    return target


def _own_names(directory: Path) -> set[str] | None:
    """Top-level names that the artifact in ``directory`` consists of; None where there is no artifact.

    Other programs have a ``manifest.json`` too, so that its presence alone says nothing.
    """
    try:
        data = json.loads((directory / MANIFEST_FILE).read_text("utf-8"))
        if not isinstance(data["format_version"], int):
            return None
        return {MANIFEST_FILE, *(name.split("/")[0] for name in data["files"])}
    except (FileNotFoundError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def _check_manifest(model: ir.Model, manifest: Mapping[str, Any]) -> None:
    """Let nothing be written that the runtime would refuse."""
    parsed = parse(json.loads(_json({**manifest, "format_version": FORMAT_VERSION, "files": {}})))
    for kind, ports, states, values in (
        ("inputs", parsed.inputs, [s.port.name for s in parsed.states], model.graph.inputs),
        ("outputs", parsed.outputs, [s.following for s in parsed.states], model.graph.outputs),
    ):
        named, found = [port.name for port in ports] + states, [value.name for value in values]
        if named != found:
            raise ArtifactError(f"the manifest names the {kind} {named}, the model has {found}")


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(_json(data), "utf-8", newline="\n")


def _write_model(stage: Path, model: ir.Model) -> None:
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    total = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    threshold = INLINE_TENSOR_BYTES if total > EXTERNAL_ABOVE_BYTES else EXTERNAL_ABOVE_BYTES
    # the threshold is per tensor: with the large one nothing goes outside, but tensors of the model that live in some
    # other file come in
    ir.save(
        model,
        stage / MODEL_FILE,
        external_data=DATA_FILE,
        size_threshold_bytes=threshold,
        alignment=PAGE,
    )
    data = stage / DATA_FILE
    if data.exists() and data.stat().st_size == 0:
        data.unlink()


def _put_in_place(stage: Path, target: Path) -> None:
    if not target.exists():
        stage.rename(target)
        return
    aside = stage.with_suffix(".old")
    target.rename(aside)
    try:
        stage.rename(target)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
