"""A model repository for NVIDIA Triton, of one artifact."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from google.protobuf import text_format

from seqc.deploy.batch_first import put_batch_first, rows_inside
from seqc.deploy.triton_check import check, graph_tensors, parse
from seqc.deploy.triton_config import model_config
from seqc.deploy.triton_engine import PLAN_FILE, engine_of
from seqc.deploy.triton_serving import Serving
from seqc.deploy.triton_trials import check_overflow, check_rows, check_served
from seqc.errors import ArtifactError, UsageError
from seqc.runtime.manifest import MODEL_FILE, Manifest
from seqc.runtime.ort import RELEASED_OPSET, open_session
from seqc.runtime.rows import Rows
from seqc.runtime.session import load

CONFIG, README, INITIAL = "config.pbtxt", "README.md", "initial_state"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_CPU = ["CPUExecutionProvider"]


def write_repository(directory: str | Path, repository: str | Path, serving: Serving) -> Path:
    """Write the model of the artifact in ``directory`` to ``repository/serving.name`` with its configuration.

    That is its engine of TensorRT, where it has one, else its ONNX model. What is run is the ONNX model, also of an engine.

    The folder appears complete or not at all. Before, the configuration is parsed with Triton's own definitions and compared
    with the graph, and the model is run: rows must not influence each other, a full state must be an error, and what the
    server will begin with must give what the session gives.

    Returns:
        The folder of the model.

    Raises:
        ArtifactError: the artifact is missing, damaged or altered, or the disk refuses.
        UnsupportedModelError: Triton cannot serve it so: what, and what to try.
        UsageError: the name or a number is out of range, or there is such a model already.
        MissingExtraError: tritonclient or onnxruntime is not installed.
    """
    source, target = Path(directory), Path(repository).resolve() / serving.name
    if not _NAME.fullmatch(serving.name):
        raise UsageError(f"a model cannot be called {serving.name!r}: letters, digits, '.', '-' and '_'")
    if target.exists():
        raise UsageError(f"{target} is there already: remove it, or give another --name")
    session = load(source, _CPU)
    manifest = session.manifest
    config, first_values = model_config(manifest, serving)
    engine = engine_of(manifest, serving)
    text = text_format.MessageToString(config)
    model = onnx.load(source / MODEL_FILE, load_external_data=False)
    if serving.max_batch:
        put_batch_first(model, [state for state in session.states if rows_inside(state)])
    check(parse(text), first_values, *graph_tensors(model))
    if serving.max_batch > 1:
        check_rows(session, str(Rows(manifest).batch), serving.max_batch)
    if session.grows:
        check_overflow(open_session(source / MODEL_FILE, _CPU, manifest.opset), manifest)
    stage = target.parent / f".seqc-{secrets.token_hex(8)}.partial"
    try:
        path = _write_model(source, stage / "1", model, manifest) if engine is None else source / MODEL_FILE
        if engine is not None:
            (stage / "1").mkdir(parents=True)
            shutil.copyfile(source / engine["file"], stage / "1" / PLAN_FILE)
        for name, content in first_values.items():
            (stage / INITIAL).mkdir(exist_ok=True)
            (stage / INITIAL / name).write_bytes(content)
        (stage / README).write_text(_readme(manifest, serving, model.ir_version, engine), "utf-8", newline="\n")
        (stage / CONFIG).write_text(text, "utf-8", newline="\n")
        check_served(open_session(path, _CPU, manifest.opset), config, first_values, session, serving.capacity)
        stage.rename(target)
    except OSError as error:
        raise ArtifactError(f"cannot write the model repository {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return target


def _write_model(source: Path, version: Path, model: onnx.ModelProto, manifest: Manifest) -> Path:
    """Write ``model`` beside a copy of its weights: a folder of the name that a single file would have."""
    data = [name for name in manifest.files if name.startswith(f"{MODEL_FILE}.")]
    folder = version / MODEL_FILE if data else version
    folder.mkdir(parents=True)
    for name in data:
        shutil.copyfile(source / name, folder / name)
    onnx.save(model, folder / MODEL_FILE)
    return folder / MODEL_FILE


def _readme(manifest: Manifest, serving: Serving, ir_version: int, engine: Mapping[str, Any] | None) -> str:
    backend = "ONNX Runtime" if engine is None else "TensorRT"
    lines = [
        f"# {serving.name}, for Triton's {backend} backend",
        "",
        "    tritonserver --model-repository=REPOSITORY",
        "",
        *(_onnx_needs(manifest, ir_version) if engine is None else _engine_needs(engine)),
    ]
    free = {size for port in manifest.inputs for size in port.shape if size != Rows(manifest).batch}
    sizes = [f"- {name}: {dim}" for name, dim in manifest.dims.items() if name in free]
    lines += ["", "Sizes, which Triton does not check:", "", *sizes] if sizes else []
    if manifest.steps_dim is not None:
        lines += ["", *_sequences(manifest, serving)]
    return "\n".join(lines) + "\n"


def _engine_needs(engine: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{PLAN_FILE} was built by tensorrt {engine.get('version', '?')}, and the server's must be of that version."
    ]
    for profile in engine["profiles"]:
        sizes = ", ".join(f"{name} {r['min']} to {r['max']}" for name, r in profile.items())
        lines.append(f"It takes {sizes}; other sizes fail.")
    return lines


def _onnx_needs(manifest: Manifest, ir_version: int) -> list[str]:
    tested = manifest.tools.get("onnxruntime")
    lines = [
        f"The model has opset {manifest.opset} and ONNX IR version {ir_version}, which the server's ONNX Runtime must know"
        + (f" (checked with {tested})." if tested else "."),
    ]
    if manifest.opset > RELEASED_OPSET:
        lines.append(
            "Start the server with ALLOW_RELEASED_ONNX_OPSET_ONLY=0 in its environment, or that opset is refused."
        )
    if manifest.target != "onnx":
        lines.append(
            f"It was compiled for {manifest.target}, and may hold operators that other execution providers lack."
        )
    return lines


def _sequences(manifest: Manifest, serving: Serving) -> list[str]:
    lines = [
        "A request has the next steps, one or more, of one sequence, whose number it gives; its first request says that the",
        "sequence starts, its last one that it ends:",
        "",
        "    client.infer(NAME, inputs, sequence_id=7, sequence_start=True, sequence_end=False)",
        "",
        f"Triton keeps {len(manifest.states)} states of a sequence in between, and forgets one that has had no request for "
        f"{serving.idle_seconds:g} s.",
        f"An instance keeps {serving.sequences} sequences at a time; others wait. Several instances keep as many each.",
    ]
    if serving.max_batch:
        lines.append(
            f"Requests of up to {serving.max_batch} sequences that have equally many steps go through the model together."
        )
    else:
        lines.append("Each request goes through the model by itself.")
    if serving.capacity is not None:
        lines.append(
            f"A sequence has {serving.capacity} steps at most; behind them a request fails. Keep instance_group as it is: "
            "on a GPU it would not fail."
        )
    return lines
