"""Bundles: what is in them, that they run where only numpy and onnxruntime are, and what is refused."""

from __future__ import annotations

import ast
import base64
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import seqc
from seqc.cli.main import run
from seqc.deploy.bundle import write_bundle
from seqc.deploy.wheel import CUDA, NUMPY, ONNXRUNTIME, ONNXRUNTIME_GPU, runtime_wheel, wheel_name
from seqc.errors import ArtifactError, UsageError
from seqc.runtime import load
from tests.helpers.artifacts import replace_file, write_small

USE = """
import importlib.metadata, sys
import numpy as np
import seqc, seqc.runtime

stream = seqc.runtime.load(sys.argv[1]).stream(2)
x = np.load(sys.argv[2])
np.save(sys.argv[3], np.concatenate([stream.step({"x": x[:, a:b]})["output"] for a, b in ((0, 3), (3, 4), (4, 9))], 1))
print(importlib.metadata.requires("seqc-runtime"), "torch" in sys.modules)
for name in ("torch", "onnx", "click", "seqc.compiler"):
    try:
        __import__(name)
        print(name, "is here")
    except ModuleNotFoundError:
        pass
try:
    seqc.compile
except AttributeError as error:
    print(error)
"""


class Leaky(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, ys = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = 0.9 * h + torch.tanh(x[:, t])
            ys.append(h)
        return torch.stack(ys, 1)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of a fresh environment which sees numpy and onnxruntime of this one, and nothing else of it."""
    home = tmp_path_factory.mktemp("venv")
    venv.create(home / "venv", with_pip=False)
    only = home / "only"
    only.mkdir()
    site = Path(np.__file__).parents[1]
    for found in (site / "numpy", site / "numpy.libs", Path(onnxruntime.__file__).parent):
        if found.exists():
            (only / found.name).symlink_to(found)
    (packages,) = (home / "venv" / "lib").glob("python*/site-packages")
    (packages / "only.pth").write_text(f"{only}\n")
    return home / "venv" / "bin" / "python"


def output_of(python: Path, *arguments: str, fails: bool = False) -> str:
    done = subprocess.run([python, "-I", *arguments], capture_output=True, text=True, timeout=120)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


def install(python: Path, wheel: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--quiet", "--no-index", "--no-deps", str(wheel)], check=True, timeout=120)


def test_a_bundle_streams_in_a_fresh_environment_as_the_session_does(python: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 9, 4)
    artifact = seqc.compile(Leaky(), (x,), stateful=True).save(tmp_path / "artifact")
    write_bundle(artifact, tmp_path / "leaky.zip")
    with zipfile.ZipFile(tmp_path / "leaky.zip") as archive:
        archive.extractall(tmp_path / "there")
    there = tmp_path / "there"
    install(python, there / wheel_name())
    np.save(tmp_path / "x.npy", x.numpy())
    files = [str(there / "artifact"), str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    said = output_of(python, "-c", USE, *files).splitlines()
    assert said == [
        f"{[NUMPY, ONNXRUNTIME]} False",
        "seqc.compile is part of the compiler, and this is the runtime alone: install seqc",
    ]
    stream = load(artifact).stream(2)
    expected = [stream.step({"x": x.numpy()[:, a:b]})["output"] for a, b in ((0, 3), (3, 4), (4, 9))]
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.concatenate(expected, 1))
    assert output_of(python, str(there / "example.py")) == "output float32 (3, 7, 4)\n"

    # both distributions in one folder
    (site,) = python.parents[1].glob("lib/python*/site-packages")
    (site / "seqc-9.9.dist-info").mkdir()
    assert "seqc and seqc-runtime are installed over each other" in output_of(python, "-c", "import seqc", fails=True)


def test_a_bundle_holds_every_file_of_the_artifact_as_it_is_and_is_the_same_each_time(tmp_path: Path) -> None:
    artifact = write_small(tmp_path / "small")
    (artifact / "golden").mkdir()
    replace_file(artifact, "golden/sm89.engine", b"engine")
    names = write_bundle(artifact, tmp_path / "a.zip")
    first = (tmp_path / "a.zip").read_bytes()
    os.utime(artifact / "model.onnx", (1, 1))
    (artifact / "program.txt").chmod(0o600)
    write_bundle(artifact, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == first
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None and archive.namelist() == names
        for path in artifact.rglob("*"):
            if path.is_file():
                assert archive.read(f"artifact/{path.relative_to(artifact)}") == path.read_bytes()
        readme = archive.read("README.md").decode()
    assert "python -m zipfile -e a.zip a && cd a" in readme and f"pip install ./{wheel_name()}" in readme
    assert "- x: float32(batch, sequence, 4)" in readme and "- sequence: 2 to 64" in readme


def test_the_wheel_requires_what_the_project_does(tmp_path: Path) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert NUMPY in project["dependencies"]
    assert project["optional-dependencies"]["cpu"] == [ONNXRUNTIME]
    assert project["optional-dependencies"]["gpu"] == [ONNXRUNTIME_GPU]
    assert all(CUDA in project["optional-dependencies"][extra] for extra in ("rtx", "tensorrt"))
    write_bundle(write_small(tmp_path / "small"), tmp_path / "a.zip", gpu=True)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, zipfile.ZipFile(archive.open(wheel_name())) as wheel:
        (metadata,) = (wheel.read(n).decode() for n in wheel.namelist() if n.endswith("METADATA"))
    assert f"Requires-Dist: {ONNXRUNTIME_GPU}" in metadata and f"Requires-Dist: {ONNXRUNTIME}\n" not in metadata


def engine_entry(package: str) -> dict[str, object]:
    sizes = {"min": 1, "opt": 7, "max": 64}
    return {
        "file": "model.engine",
        "package": package,
        "version": "1.7.1",
        "sm": [89, 120] if package == "tensorrt-rtx" else [],
        "profiles": [{"sequence": sizes}],
        "kernels": 3,
        "scratch_bytes": 0,
        "activation_bytes": 0,
        "weight_bytes": 0,
        "has_step_loop": False,
    }


@pytest.mark.parametrize("package", ["tensorrt-rtx", "tensorrt"])
def test_a_bundle_with_engines_requires_the_package_that_reads_them(tmp_path: Path, package: str) -> None:
    artifact = write_small(tmp_path / "small", engines=[engine_entry(package)])
    replace_file(artifact, "model.engine", b"engine")
    write_bundle(artifact, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, zipfile.ZipFile(archive.open(wheel_name())) as wheel:
        (metadata,) = (wheel.read(n).decode() for n in wheel.namelist() if n.endswith("METADATA"))
        assert archive.read("artifact/model.engine") == b"engine"
        assert (
            f"load(Path(__file__).parent / \"artifact\", providers=['{package}'])"
            in archive.read("example.py").decode()
        )
        readme = archive.read("README.md").decode()
    required = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if "Requires-Dist" in line]
    assert required == [NUMPY, f"{package}==1.7.1", CUDA]
    gpus = "sm 89, 120" if package == "tensorrt-rtx" else "the GPU it was built on"
    assert f"- artifact/model.engine, {gpus}" in readme and f"{NUMPY}, {package}==1.7.1, {CUDA} only" in readme
    with pytest.raises(UsageError, match="--gpu is about onnxruntime, and this artifact has engines"):
        write_bundle(artifact, tmp_path / "b.zip", gpu=True)


def test_every_import_of_the_wheel_is_in_it_or_in_what_it_requires(tmp_path: Path) -> None:
    write_bundle(write_small(tmp_path / "small"), tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, zipfile.ZipFile(archive.open(wheel_name())) as wheel:
        sources = {n: wheel.read(n).decode() for n in wheel.namelist() if n.endswith(".py")}
    modules = {n.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for n in sources}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            wanted = [node.module] if isinstance(node, ast.ImportFrom) else []
            wanted += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in wanted:
                top = str(module).split(".")[0]
                assert module in modules or top == "numpy" or top in sys.stdlib_module_names, f"{name}: {module}"


def test_the_record_of_the_wheel_has_the_hash_of_every_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(runtime_wheel())) as wheel:
        (record,) = (n for n in wheel.namelist() if n.endswith(".dist-info/RECORD"))
        rows = {name: (digest, size) for name, digest, size in csv.reader(wheel.read(record).decode().splitlines())}
        assert list(rows) == wheel.namelist() and rows.pop(record) == ("", "")
        for name, (digest, size) in rows.items():
            content = wheel.read(name)
            hashed = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={hashed}", len(content))


def test_a_damaged_artifact_is_refused_and_the_old_bundle_stays(tmp_path: Path) -> None:
    artifact = write_small(tmp_path / "small")
    write_bundle(artifact, tmp_path / "a.zip")
    before = (tmp_path / "a.zip").read_bytes()
    (artifact / "model.onnx").write_bytes(b"x" * (artifact / "model.onnx").stat().st_size)
    with pytest.raises(ArtifactError, match="was altered"):
        write_bundle(artifact, tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "small"]


def test_a_disk_that_refuses_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = write_small(tmp_path / "small")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("seqc.deploy.bundle.add", full)
    with pytest.raises(ArtifactError, match=r"cannot write the bundle .*No space left"):
        write_bundle(artifact, tmp_path / "a.zip")
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_bundle_inside_the_artifact_or_nowhere_is_refused(tmp_path: Path) -> None:
    artifact = write_small(tmp_path / "small")
    with pytest.raises(UsageError, match="lies inside the artifact"):
        write_bundle(artifact, artifact / "a.zip")
    for file in (tmp_path, tmp_path / "missing" / "a.zip"):
        with pytest.raises(UsageError, match="not a file that can be written"):
            write_bundle(artifact, file)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, file = write_small(tmp_path / "small"), tmp_path / "a.zip"
    assert run(["bundle", str(artifact), "-o", str(file), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bytes"] == file.stat().st_size and "artifact/model.onnx" in printed["files"]
    assert run(["bundle", str(tmp_path), "-o", str(file)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} is not a seqc artifact: it has no manifest.json\n"
