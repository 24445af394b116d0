"""The artifact writer: complete or not at all, weights outside when large, nothing of the user's deleted."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import seqc.artifact
import seqc.runtime
from seqc.artifact import check_destination, write_artifact
from seqc.errors import ArtifactError
from tests.helpers.artifacts import small_inputs, small_manifest, small_model, small_outputs, write_small

FILES = ["manifest.json", "model.onnx", "program.txt", "report.json"]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_writes_every_file_with_its_hash(tmp_path: Path) -> None:
    target = write_small(tmp_path / "new" / "small")
    assert target == tmp_path / "new" / "small"
    assert names(target) == FILES
    assert names(target.parent) == ["small"]
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["format_version"] == 3
    assert sorted(manifest["files"]) == FILES[1:]
    for name, entry in manifest["files"].items():
        content = (target / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert json.loads((target / "report.json").read_text()) == {"seconds": 1.5}
    assert (target / "program.txt").read_text() == "program text\n"
    onnx.checker.check_model(str(target / "model.onnx"), full_check=True)


def test_the_same_model_gives_the_same_files(tmp_path: Path) -> None:
    first, second = write_small(tmp_path / "a"), write_small(tmp_path / "b")
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize(("limit", "outside"), [(1 << 20, False), ((1 << 20) - 1, True)])
def test_weights_above_the_limit_are_external(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, outside: bool
) -> None:
    monkeypatch.setattr(seqc.artifact, "EXTERNAL_ABOVE_BYTES", limit)
    weight = np.broadcast_to(np.arange(4, dtype=np.float32), (1 << 16, 1, 4)).copy()
    model = small_model(weight)
    target = write_artifact(tmp_path / "big", model, small_manifest(), {}, "")
    data = target / "model.onnx.data"
    assert data.exists() == outside
    if outside:
        assert data.stat().st_size == 1 << 20
        assert (target / "model.onnx").stat().st_size < 2000
    listed = json.loads((target / "manifest.json").read_text())["files"]
    assert ("model.onnx.data" in listed) == outside
    # the model in memory still holds its weights
    assert not isinstance(model.graph.initializers["weight"].const_value, ir.ExternalTensor)
    inputs = small_inputs(1 << 16, 2)
    np.testing.assert_array_equal(seqc.runtime.load(target).run(inputs)["y"], small_outputs(inputs)["y"])


def test_altered_external_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seqc.artifact, "EXTERNAL_ABOVE_BYTES", 1024)
    target = write_artifact(tmp_path / "a", small_model(np.ones((300, 1, 4), np.float32)), small_manifest(), {}, "")
    data = target / "model.onnx.data"
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data was altered"):
        seqc.runtime.load(target)


def test_weights_that_live_in_another_file_come_along(tmp_path: Path) -> None:
    ir.save(small_model(), tmp_path / "x.onnx", external_data="x.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "x.onnx")
    target = write_artifact(tmp_path / "a", model, small_manifest(), {}, "")
    (tmp_path / "x.data").unlink()
    inputs = small_inputs()
    np.testing.assert_array_equal(seqc.runtime.load(target).run(inputs)["y"], small_outputs(inputs)["y"])


def test_an_artifact_is_replaced_whole(tmp_path: Path) -> None:
    target = write_small(tmp_path / "small")
    (target / "model.onnx.data").write_bytes(b"left over from larger weights")
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["files"]["model.onnx.data"] = {"sha256": "0" * 64, "bytes": 1}
    (target / "manifest.json").write_text(json.dumps(manifest))
    write_artifact(target, small_model(np.full(4, 5, np.float32)), small_manifest(notes=["second"]), {}, "")
    assert names(target) == FILES
    assert names(tmp_path) == ["small"]
    session = seqc.runtime.load(target)
    assert session.manifest.notes == ("second",)
    inputs = small_inputs(1, 2)
    expected = inputs["x"] * 5 + inputs["ids"][..., None].astype(np.float32)
    np.testing.assert_array_equal(session.run(inputs)["y"], expected)


def _fail(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


def _interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


FAILURES: dict[str, tuple[str, Callable[..., Any], type[BaseException]]] = {
    "disk full in the model": ("seqc.artifact.ir.save", _fail, ArtifactError),
    "interrupted while hashing": ("seqc.artifact.digest", _interrupt, KeyboardInterrupt),
    "disk full in the rename": ("seqc.artifact._put_in_place", _fail, ArtifactError),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_midway_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, existing: bool
) -> None:
    where, failure, error = FAILURES[case]
    target = tmp_path / "small"
    if existing:
        write_small(target)
    before = {path.name: path.read_bytes() for path in target.iterdir()} if existing else None
    with monkeypatch.context() as patch:
        patch.setattr(where, failure)
        with pytest.raises(error):
            write_small(target, notes=["second"])
    assert names(tmp_path) == (["small"] if existing else [])
    if existing:
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
        assert seqc.runtime.load(target).manifest.notes == ()


def test_the_old_artifact_comes_back_when_the_new_one_cannot_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = write_small(tmp_path / "small")
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(5, "Input/output error")
        return real(self, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(ArtifactError, match=r"cannot write the artifact .*: Input/output error"):
            write_small(target, notes=["second"])
    assert names(tmp_path) == ["small"]
    assert seqc.runtime.load(target).manifest.notes == ()


def test_a_process_killed_midway_leaves_nothing_at_the_target(tmp_path: Path) -> None:
    script = (
        "import os, sys, seqc.artifact\n"
        "from pathlib import Path\n"
        "from tests.helpers.artifacts import write_small\n"
        "seqc.artifact.digest = lambda path: os._exit(9)\n"
        "write_small(Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "small")]
    root = Path(__file__).parents[2]
    assert subprocess.run(command, cwd=root, timeout=120).returncode == 9
    assert not (tmp_path / "small").exists()
    # what is left is hidden, and does not hinder the next attempt
    assert all(name.startswith(".seqc-") for name in names(tmp_path))
    seqc.runtime.load(write_small(tmp_path / "small"))


def _refused(directory: Path, **options: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        check_destination(directory, **options)
    with pytest.raises(ArtifactError):
        write_artifact(directory, small_model(), small_manifest(), {}, "", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_that_is_not_an_artifact_is_left_alone(tmp_path: Path) -> None:
    for content in ("{}", "not json", '{"manifest_version": 3, "name": "a browser extension"}', "[]"):
        (tmp_path / "manifest.json").write_text(content)
        assert "not empty and not a seqc artifact" in _refused(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "not empty and not a seqc artifact" in _refused(tmp_path)
    assert "is a file" in _refused(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_file_that_seqc_did_not_write_is_not_deleted(tmp_path: Path) -> None:
    target = write_small(tmp_path / "small")
    (target / "thesis.txt").write_text("years of work")
    assert "holds 'thesis.txt', which seqc did not write" in _refused(target)
    assert (target / "thesis.txt").exists()


def test_overwriting_can_be_forbidden(tmp_path: Path) -> None:
    target = write_small(tmp_path / "small")
    assert "already holds an artifact" in _refused(target, overwrite=False)


def test_the_current_directory_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "name a directory inside it" in _refused(Path())


def test_an_empty_directory_and_a_link_to_one_are_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert write_small(tmp_path / "link") == tmp_path / "real"
    assert names(tmp_path) == ["link", "real"]
    assert (tmp_path / "link").is_symlink()
    seqc.runtime.load(tmp_path / "link")


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        target = write_small(tmp_path / "small")
    finally:
        os.umask(old)
    assert target.stat().st_mode & 0o777 == 0o750
    assert all(path.stat().st_mode & 0o777 == 0o640 for path in target.iterdir())


def test_a_manifest_that_the_runtime_would_refuse_is_not_written(tmp_path: Path) -> None:
    for changes, fragment in (
        ({"dims": {}}, "which dims does not define"),
        ({"inputs": small_manifest()["inputs"][::-1]}, "the manifest names the inputs"),
        ({"opset": "21"}, "opset must be an integer"),
    ):
        with pytest.raises(ArtifactError, match=fragment):
            write_small(tmp_path / "small", **changes)
    with pytest.raises(ValueError, match="JSON"):
        write_artifact(tmp_path / "small", small_model(), small_manifest(), {"error": float("nan")}, "")
    assert names(tmp_path) == []
