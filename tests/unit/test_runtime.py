"""The runtime: loads and runs artifacts, and refuses damaged ones and wrong inputs in one clear line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import seqc.runtime
from seqc.errors import ArtifactError, MissingExtraError
from seqc.runtime import Session, shapes
from seqc.runtime.inputs import prepare
from seqc.runtime.manifest import DimRange, Port
from tests.helpers.artifacts import (
    edit_manifest,
    replace_file,
    small_inputs,
    small_outputs,
    write_small,
)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return seqc.runtime.load(write_small(tmp_path_factory.mktemp("session") / "small"))


def refusal(action: Callable[[], Any]) -> str:
    """The message of the ArtifactError that ``action`` raises, which must be one line."""
    with pytest.raises(ArtifactError) as caught:
        action()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("batch", "sequence"), [(1, 2), (3, 7), (2, 64)])
def test_runs_at_any_size_in_range(session: Session, batch: int, sequence: int) -> None:
    inputs = small_inputs(batch, sequence)
    outputs = session.run(inputs)
    assert list(outputs) == ["y", "next"]
    for name, expected in small_outputs(inputs).items():
        np.testing.assert_array_equal(outputs[name], expected)


def test_session_tells_its_ports_and_ranges(session: Session) -> None:
    assert [str(p) for p in session.inputs] == ["x: float32(batch, sequence, 4)", "ids: int64(batch, sequence)"]
    assert [p.name for p in session.outputs] == ["y", "next"]
    assert session.dims["sequence"] == DimRange(2, 64, 7)
    assert session.manifest.passes[0].reasons == ("nothing reads the carry",)
    assert session.manifest.tolerances == {"y": 1e-4, "next": 0.0}
    assert session.providers[-1] == "CPUExecutionProvider"


def test_byte_order_and_strides_do_not_change_the_result(session: Session) -> None:
    inputs = small_inputs()
    swapped = {"x": inputs["x"].astype(">f4"), "ids": np.asfortranarray(inputs["ids"])}
    wide = np.repeat(inputs["x"], 2, axis=1)[:, ::2]
    for given in (swapped, {**inputs, "x": wide}):
        np.testing.assert_array_equal(session.run(given)["y"], small_outputs(inputs)["y"])


def _without(name: str) -> dict[str, np.ndarray]:
    return {k: v for k, v in small_inputs().items() if k != name}


def _with(**changes: Any) -> dict[str, Any]:
    return {**small_inputs(), **changes}


_X = small_inputs()["x"]
WRONG_INPUTS: dict[str, tuple[Any, list[str]]] = {
    "missing": (_without("ids"), ["missing input 'ids'", "takes x, ids", "got x"]),
    "nothing": ({}, ["missing input 'x', 'ids'", "got nothing"]),
    "misspelled": ({**_without("ids"), "id": small_inputs()["ids"]}, ["unknown input 'id'", "did you mean 'ids'?"]),
    "unrelated": (_with(zzzzzz=_X), ["unknown input 'zzzzzz'", "takes x, ids"]),
    "dtype": (_with(x=_X.astype(np.float64)), ["'x' must be float32, got float64"]),
    "list": (_with(x=_X.tolist()), ["'x' must be a numpy array of float32, not a list"]),
    "rank": (_with(x=_X[0]), ["'x' must have rank 3, got rank 2", "(batch, sequence, 4)", "(5, 4)"]),
    "fixed": (_with(x=_X[..., :3]), ["'x' must have size 4 at axis 2, got 3", "(2, 5, 3)"]),
    "conflict": (_with(x=_X[:, :4]), ["dimension 'sequence' is 4 in input 'x' axis 1 but 5 in input 'ids' axis 1"]),
    "too long": (small_inputs(1, 65), ["'sequence' must be 2 to 64, got 65 in input 'x' axis 1"]),
    "too short": (small_inputs(1, 1), ["'sequence' must be 2 to 64, got 1"]),
    "empty batch": (small_inputs(0, 5), ["'batch' must be 1 or more, got 0"]),
    "not a dict": ([_X], ["dict of arrays by name (x, ids), not a list"]),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_inputs_are_refused_with_what_was_expected_and_given(session: Session, case: str) -> None:
    given, fragments = WRONG_INPUTS[case]
    message = refusal(lambda: session.run(given))
    for fragment in fragments:
        assert fragment in message


DERIVED = (
    Port("mask", "float32", ("sequence + 3",)),
    Port("x", "float32", ("sequence",)),
    Port("pairs", "float32", ("2*other",)),
)
DERIVED_DIMS = {"sequence": DimRange(1, 10, 4), "other": DimRange(2, None, 4)}


@pytest.mark.parametrize(
    ("sizes", "fragment"),
    [
        ((7, 4, 6), ""),
        ((8, 4, 6), "input 'mask' axis 0 must be sequence + 3 = 7 (sequence = 4 in input 'x' axis 0), got 8"),
        ((7, 4, 2), "dimension 'other' must be 2 or more, got 1"),
    ],
)
def test_sizes_derived_from_a_dimension_are_checked(sizes: tuple[int, ...], fragment: str) -> None:
    given = {port.name: np.zeros(size, np.float32) for port, size in zip(DERIVED, sizes, strict=True)}
    if fragment:
        assert fragment in refusal(lambda: prepare(DERIVED, DERIVED_DIMS, given))
    else:
        assert list(prepare(DERIVED, DERIVED_DIMS, given)) == ["mask", "x", "pairs"]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("s + 3", 8),
        ("2*s - 1", 9),
        ("((s//4)) + 1", 2),
        ("Mod(s, 4)", 1),
        ("Max(1, s - 9)", 1),
        ("t + s", None),
        ("s**9", None),
        ("s.__class__", None),
        ("__import__('os')", None),
        ("s/0", None),
        ("s//0", None),
        ("(" * 900, None),
        ("s +", None),
    ],
)
def test_size_expressions(expression: str, value: int | None) -> None:
    assert shapes.evaluate(expression, {"s": 5}) == value


def test_solving_needs_one_linear_unknown() -> None:
    assert shapes.solve("3*t + 1", 10, {}) == ("t", 3)
    assert shapes.solve("3*t + 1", 11, {}) is None
    assert shapes.solve("t//2", 5, {}) is None
    assert shapes.solve("s + t", 5, {}) is None
    assert shapes.solve("s + t", 5, {"s": 2}) == ("t", 3)


def test_an_error_inside_the_model_is_one_line(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    # what validation lets through by mistake must still come back as a clear error
    monkeypatch.setattr("seqc.runtime.session.prepare", lambda ports, dims, given: given)
    inputs = small_inputs()
    inputs["x"] = inputs["x"][:, :4]
    assert "onnxruntime failed while running the model" in refusal(lambda: session.run(inputs))


# --- damaged artifacts ------------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "is not a seqc artifact: it has no manifest.json"),
    "cut manifest": (lambda d: _cut(d / "manifest.json"), "is not valid JSON (truncated or altered?)"),
    "empty manifest": (lambda d: (d / "manifest.json").write_bytes(b""), "is not valid JSON"),
    "binary manifest": (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
    "deep manifest": (lambda d: (d / "manifest.json").write_text("[" * 200_000), "is not valid JSON"),
    "list manifest": (lambda d: (d / "manifest.json").write_text("[]"), "expected a JSON object, got a list"),
    "no model": (lambda d: (d / "model.onnx").unlink(), "model.onnx is missing"),
    "cut model": (lambda d: _cut(d / "model.onnx"), "bytes, the manifest says"),
    "altered model": (lambda d: _flip(d / "model.onnx"), "model.onnx was altered: its SHA-256"),
    "altered report": (lambda d: _flip(d / "report.json"), "report.json was altered"),
    "corrupt model": (lambda d: replace_file(d, "model.onnx", b"not onnx"), "onnxruntime cannot load"),
    "empty model": (lambda d: replace_file(d, "model.onnx", b""), "onnxruntime cannot load"),
    "model is a folder": (
        lambda d: ((d / "model.onnx").unlink(), (d / "model.onnx").mkdir()),
        "model.onnx is missing",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused(artifact: Path, case: str) -> None:
    damage, fragment = DAMAGE[case]
    damage(artifact)
    assert fragment in refusal(lambda: seqc.runtime.load(artifact))


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no version": (lambda m: m.pop("format_version"), "the manifest has no 'format_version'"),
    "newer version": (lambda m: m.update(format_version=4), "format_version is 4, this seqc reads 3: update seqc"),
    "older version": (lambda m: m.update(format_version=1), "compile the model again"),
    "version as text": (lambda m: m.update(format_version="3"), "format_version must be an integer, not a string"),
    "no inputs": (lambda m: m.pop("inputs"), "the manifest has no 'inputs'"),
    "empty inputs": (lambda m: m.update(inputs=[]), "inputs is empty"),
    "input of a wrong type": (lambda m: m.update(inputs=[3]), "inputs[0] must be an object, not an integer"),
    "input without dtype": (lambda m: m["inputs"][1].pop("dtype"), "inputs[1] has no 'dtype'"),
    "unknown dtype": (lambda m: m["inputs"][0].update(dtype="object"), "inputs[0].dtype is 'object'"),
    "negative size": (lambda m: m["inputs"][0].update(shape=[-1]), "inputs[0].shape holds -1"),
    "boolean size": (lambda m: m["inputs"][0].update(shape=[True]), "inputs[0].shape holds True"),
    "undefined dim": (lambda m: m["dims"].pop("sequence"), "input 'x' has dimension 'sequence'"),
    "empty range": (lambda m: m["dims"]["batch"].update(max=0), "dims['batch'] has an empty range"),
    "twice": (lambda m: m["inputs"][1].update(name="x"), "inputs names 'x' twice"),
    "no file list": (lambda m: m.pop("files"), "the manifest has no 'files'"),
    "model not listed": (lambda m: m["files"].pop("model.onnx"), "lists no model.onnx"),
    "bad hash": (lambda m: m["files"]["model.onnx"].update(sha256="12"), "sha256 is not 64"),
    "NaN tolerance": (lambda m: m["tolerances"].update(y=float("nan")), "tolerances['y']"),
    "wrong names": (lambda m: m["inputs"][0].update(name="z"), "the manifest names the inputs z, ids"),
    "peak as text": (
        lambda m: m.update(peak_activations={"sizes": {}, "before_passes": 1, "after_passes": "1"}),
        "peak_activations.after_passes must be an integer",
    ),
    "states": (lambda m: m["states"].append({"name": "h"}), "states[0] has no 'dtype'"),
    **{
        f"path {name!r}": (
            lambda m, name=name: m["files"].update({name: m["files"]["model.onnx"]}),
            "not a path inside",
        )
        for name in ("../secret", "a/../../b", "/etc/passwd", "C:\\x", "C:x", "..\\x", "", ".", "a//b", "./a", "a\0b")
    },
}


@pytest.mark.parametrize("case", EDITS)
def test_a_wrong_manifest_is_refused(artifact: Path, case: str) -> None:
    edit, fragment = EDITS[case]
    edit_manifest(artifact, edit)
    assert fragment in refusal(lambda: seqc.runtime.load(artifact))


def test_the_manifest_itself_is_read_only(session: Session) -> None:
    with pytest.raises(TypeError):
        session.manifest.dims["sequence"] = DimRange(1, None, 7)  # type: ignore[index]


def test_a_path_that_is_no_artifact_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "does not exist" in refusal(lambda: seqc.runtime.load(tmp_path / "nowhere"))
    assert "is not a directory" in refusal(lambda: seqc.runtime.load(tmp_path / "file"))
    assert "is not a seqc artifact" in refusal(lambda: seqc.runtime.load(tmp_path))


def test_a_file_that_cannot_be_read_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("seqc.runtime.files.hashlib.file_digest", denied)
    assert "model.onnx cannot be read: Permission denied" in refusal(lambda: seqc.runtime.load(artifact))


# --- onnxruntime ------------------------------------------------------------------------------------------------------


def test_an_unknown_provider_is_refused_with_the_available_ones(artifact: Path) -> None:
    message = refusal(lambda: seqc.runtime.load(artifact, ["CPUExecutionProvidr"]))
    assert "did you mean 'CPUExecutionProvider'?" in message
    assert "available are" in message
    assert "CPUExecutionProvider" in refusal(lambda: seqc.runtime.load(artifact, []))
    assert "must be a list" in refusal(lambda: seqc.runtime.load(artifact, "CPUExecutionProvider"))


def test_providers_and_their_options_are_passed_through(artifact: Path) -> None:
    session = seqc.runtime.load(artifact, [("CPUExecutionProvider", {})])
    assert session.providers == ("CPUExecutionProvider",)


def test_options_of_gpu_providers_reach_onnxruntime_as_they_are(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    wanted = [("TensorrtExecutionProvider", {"trt_engine_cache_enable": "1"}), "CUDAExecutionProvider"]
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    real, seen = onnxruntime.InferenceSession, []

    def started(path: str, options: Any, providers: Any, **kwargs: Any) -> Any:
        seen.append(providers)
        session = real(path, options, providers=["CPUExecutionProvider"], **kwargs)
        monkeypatch.setattr(session, "get_providers", lambda: names)
        return session

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", started)
    assert seqc.runtime.load(artifact, wanted).providers == tuple(names)
    assert seen == [wanted]


@pytest.mark.parametrize(
    ("providers", "said"),
    [
        ([("CPUExecutionProvider",)], "a name or a pair of a name and a dict of options"),
        ([("CPUExecutionProvider", "a=1")], "a name or a pair of a name and a dict of options"),
        ([7], "a name or a pair of a name and a dict of options"),
        ([("CPUExecutionProvider", {"threads": "1"})], "takes no options"),
        (["CPUExecutionProvider"] * 2, "'CPUExecutionProvider' is named twice"),
        ([("NvTensorRTRTXExecutionProvider", {"device_id": "0"})], "built without it: available are"),
    ],
)
def test_providers_that_mean_nothing_are_refused(artifact: Path, providers: list[Any], said: str) -> None:
    assert said in refusal(lambda: seqc.runtime.load(artifact, providers))


def test_a_provider_that_cannot_start_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    # a GPU build on a machine without a GPU lists the provider, and then silently runs on the CPU
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    real = onnxruntime.InferenceSession

    def without_gpu(path: str, options: Any, providers: Any, **kwargs: Any) -> Any:
        return real(path, options, providers=["CPUExecutionProvider"], **kwargs)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", without_gpu)
    message = refusal(lambda: seqc.runtime.load(artifact, ["CUDAExecutionProvider"]))
    assert "'CUDAExecutionProvider' cannot start on this machine" in message
    assert seqc.runtime.load(artifact).providers == ("CPUExecutionProvider",)


def test_missing_onnxruntime_names_the_extras(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"seqc\[cpu\].*seqc\[gpu\]"):
        seqc.runtime.load(artifact)
