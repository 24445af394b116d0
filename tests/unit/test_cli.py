"""The command line: what it passes on, what it prints where, and its exit codes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import seqc
from seqc.cli.console import Progress
from seqc.cli.inputs import Dimension, parse_dynamic, parse_input
from seqc.cli.main import run
from seqc.cli.providers import parse_provider
from seqc.errors import UnsupportedModelError, UsageError, VerificationError


class Summed(nn.Module):
    """A table of 7 rows, looked up and summed over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids).cumsum(1)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.two


class Off(Doubled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.two + 0.5 * (x.shape[1] > 20)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "climodels", sys.modules[__name__])
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def weights(tmp_path: Path) -> str:
    torch.save(Summed().state_dict(), tmp_path / "w.pt")
    return str(tmp_path / "w.pt")


@pytest.fixture
def doubled(tmp_path: Path) -> str:
    torch.save(Doubled().state_dict(), tmp_path / "d.pt")
    return str(tmp_path / "d.pt")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact that doubles x[batch, seq]; seq is 2 to 64."""
    shape = ["batch", "seq"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "double",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    directory = tmp_path / "artifact"
    directory.mkdir()
    onnx.save(model, directory / "model.onnx")
    (directory / "program.txt").write_text("%y = aten.add(%x, %x)\n")
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in directory.iterdir()
    }
    manifest = {
        "format_version": 3,
        "source": {"kind": "weights", "module": "climodels.Doubled"},
        "target": "onnx",
        "opset": 18,
        "inputs": [{"name": "x", "dtype": "float32", "shape": shape}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": shape}],
        "states": [],
        "dims": {"batch": {"min": 1, "max": None, "traced": 3}, "seq": {"min": 2, "max": 64, "traced": 7}},
        "passes": [{"name": "fold", "changes": 1, "reasons": ["x + x was found", "once"]}],
        "tolerances": {"y": 1e-4},
        "notes": ["a note"],
        "files": files,
        "engines": [],
        "tools": {"seqc": "0.1.0"},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


class FakeCompiled:
    """Stands in for the compiler: records the call, saves a fixed artifact."""

    def __init__(self, artifact: Path) -> None:
        self.artifact = artifact
        self.manifest: dict[str, Any] = {"source": {"kind": "module"}, "notes": []}
        self.report: dict[str, Any] = {"error": float("inf")}

    def __call__(self, model: nn.Module, examples: dict[str, torch.Tensor], **options: Any) -> FakeCompiled:
        self.model, self.examples, self.options = model, examples, options
        options["progress"]("trace", 12, 0.25)
        return self

    def save(self, directory: str) -> None:
        Path(directory).mkdir()
        for path in self.artifact.iterdir():
            (Path(directory) / path.name).write_bytes(path.read_bytes())


@pytest.fixture
def fake(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCompiled:
    found = FakeCompiled(artifact)
    monkeypatch.setitem(vars(seqc), "compile", found)
    return found


ENTRY = ["--entry", "climodels:Summed"]


def test_compile_passes_everything_on(fake: FakeCompiled, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--opset", "20", "--passes", "+a, -b", "--opt", "loops=unroll", "--no-check", "--target", "onnx"]
    assert run(["compile", weights, "-o", "out", *ENTRY, "--input", "ids=int64[batch,seq:1:99]", *flags]) == 0
    assert isinstance(fake.model, Summed)
    ids = fake.examples["ids"]
    assert ids.shape == (16, 16) and ids.dtype == torch.int64 and 2 < int(ids.max()) < 7
    shapes = fake.options["dynamic_shapes"]["ids"]
    assert shapes[0] == "batch" and shapes[1].__name__ == "seq" and shapes[1].max == 99
    assert fake.options["opset"] == 20 and fake.options["passes"] == ["+a", "-b"] and fake.options["check"] is False
    assert fake.options["options"]["loops"] == "unroll" and fake.options["target"] == "onnx"
    assert fake.manifest["source"] == {"kind": "weights", "path": weights}
    out, err = capsys.readouterr()
    assert "float32[batch, seq]" in out and "nodes" not in out
    assert "trace" in err and "12 nodes" in err and "0.25 s" in err


def test_compile_json_is_all_that_stdout_holds(
    fake: FakeCompiled, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", weights, "-o", "out", *ENTRY, "--input", "ids=int64<3>[1,seq]", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["artifact"] == "out" and result["manifest"]["dims"]["seq"]["max"] == 64
    assert result["report"]["error"] == "inf" and result["stages"][0]["stage"] == "trace"
    assert "axis 0 at 1" in err, "a fixed batch is said"
    assert int(fake.examples["ids"].max()) < 3 and fake.options["dynamic_shapes"] == {"ids": {1: "seq"}}


def test_compile_takes_inputs_from_a_file(fake: FakeCompiled, weights: str) -> None:
    np.savez("in.npz", ids=np.ones((2, 5), np.int64))
    assert run(["compile", weights, "-o", "one", *ENTRY, "--inputs", "in.npz"]) == 0
    assert fake.options["dynamic_shapes"] is None, "the compiler's default: batch and sequence"
    assert run(["compile", weights, "-o", "two", *ENTRY, "--inputs", "in.npz", "--dynamic", "ids:1=time"]) == 0
    assert fake.options["dynamic_shapes"] == {"ids": {1: "time"}}
    assert fake.examples["ids"].tolist() == [[1] * 5] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["w.pt", "-o", "out", *ENTRY], "does not say what its inputs are"),
        (["w.pt", "-o", "out", "--input", "ids=int64[b,s]"], "--entry pkg.mod:factory"),
        (["w.pt", "-o", "out", *ENTRY, "--input", "ids:int64"], "NAME=DTYPE"),
        (["w.pt", "-o", "out", *ENTRY, "--inputs", "none.npz"], "No such file"),
        (["w.pt", "-o", "out", *ENTRY, "--inputs", "w.pt"], "not a readable .npz"),
        (["w.pt", "-o", "out", *ENTRY, "--input", "ids=int64[b,s]", "--inputs", "a.npz"], "exclude each other"),
        (["w.pt", "-o", "out", *ENTRY, "--input", "ids=int64[b,s]", "--dynamic", "x:0=b"], "--dynamic names 'x'"),
        (["w.pt", "-o", "out", *ENTRY, "--input", "ids=int64[b,s]", "--opt", "lops=x"], "did you mean 'loops'"),
        (["w.pt", "-o", ".", *ENTRY, "--input", "ids=int64[b,s]"], "current directory"),
        (["absent.pt", "-o", "out"], "no such file"),
        (["w.pt"], "Missing option '-o'"),
        (["w.pt", "-o", "out", "--frob"], "No such option"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    weights: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["compile", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert any(part in err for part in message.split("|")), err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("wrong"), 2),
        (VerificationError("differs\ndetail"), 1),
        (UnsupportedModelError("cannot"), 3),
        (KeyboardInterrupt(), 130),
        (RuntimeError("a bug\nsecond line"), 3),
    ],
)
def test_errors_of_the_compiler(
    monkeypatch: pytest.MonkeyPatch, weights: str, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setitem(vars(seqc), "compile", failing)
    arguments = ["compile", weights, "-o", "out", *ENTRY, "--input", "ids=int64[b,s]"]
    assert run(arguments) == code
    out, err = capsys.readouterr()
    assert out == "" and err.lstrip().startswith("error: ") and "Traceback" not in err and not Path("out").exists()
    assert run([*arguments, "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err
    assert run([*arguments, "--json"]) == code
    result = json.loads(capsys.readouterr().out)
    assert result["exit_code"] == code and result["error"]["message"]


def test_run_prints_and_writes_the_outputs(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("in.npz", x=np.full((2, 5), 1.5, np.float32))
    assert run(["run", str(artifact), "--inputs", "in.npz", "-o", "out.npz"]) == 0
    assert "y  float32[2, 5]  min 3, max 3, mean 3" in capsys.readouterr().out
    assert np.load("out.npz")["y"].tolist() == [[3.0] * 5] * 2
    assert sorted(p.name for p in Path().iterdir()) == ["artifact", "in.npz", "out.npz"]


def test_run_with_random_inputs_is_reproducible(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for seed in ("1", "1", "2"):
        assert run(["run", str(artifact), "--random", "seq=9", "--seed", seed, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["outputs"][0]["shape"] == [3, 9]
        seen.append(result["outputs"][0]["mean"])
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random", "length=3"], "dimensions are batch, seq"),
        (["--random", "seq=x"], "DIM=N"),
        (["--random", "seq=65"], "seq"),
        ([], "either --inputs"),
        (["--random", "", "-o", "no/such/out.npz"], "cannot be written|not a file"),
        (["--random", "", "--provider", "NoSuchProvider"], "NoSuchProvider"),
        (["--random", "", "--provider", "CPUExecutionProvider:a=1"], "'CPUExecutionProvider' takes no options"),
        (["--random", "", "--provider", "CUDAExecutionProvider:a"], "NAME:KEY=VALUE,KEY=VALUE"),
    ],
)
def test_run_with_wrong_arguments(
    artifact: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["run", str(artifact), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and any(part in err for part in message.split("|")), err


def test_inspect(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in (artifact, artifact / "model.onnx"):
        assert run(["inspect", str(place)]) == 0
        out = capsys.readouterr().out
        for text in ("float32[batch, seq]", "2 to 64", "fold  1 change", "x + x was found", "once", "a note", "sha256"):
            assert text in out
    assert run(["inspect", str(artifact), "--text"]) == 0
    assert capsys.readouterr().out == "%y = aten.add(%x, %x)\n"
    assert run(["inspect", str(artifact), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["opset"] == 18
    (artifact / "program.txt").write_text("altered")
    assert run(["inspect", str(artifact)]) == 2
    assert "program.txt" in capsys.readouterr().err


def test_verify_tells_equal_from_different(artifact: Path, doubled: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(artifact), "--against", doubled, "--entry"]
    assert run([*arguments, "climodels:Doubled"]) == 0
    assert "sizes compared" in capsys.readouterr().out
    assert run([*arguments, "climodels:Off"]) == 1
    out, err = capsys.readouterr()
    assert "FAILED" in out and err.startswith("error: the compiled model differs")
    assert run([*arguments, "climodels:Off", "--tolerance", "10"]) == 0
    capsys.readouterr()
    assert run([*arguments, "climodels:Doubled", "--json", "--length", "33"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and {c["sizes"]["seq"] for c in report["cases"]} >= {2, 33}


def test_verify_against_another_model(artifact: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(artifact), "--against", weights, *ENTRY]) != 0
    assert capsys.readouterr().err.startswith("error: ")


def in_new_process(*lines: str) -> subprocess.CompletedProcess[str]:
    code = "\n".join(("import sys", *lines))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_run_and_inspect_need_no_torch(artifact: Path) -> None:
    result = in_new_process(
        "sys.modules.update(dict.fromkeys(('torch', 'onnx', 'transformers', 'onnx_ir', 'onnxscript', 'networkx')))",
        "from seqc.cli.main import run",
        f"codes = [run(['run', {str(artifact)!r}, '--random', '']), run(['inspect', {str(artifact)!r}])]",
        "codes += [run(['--help']), run(['--version'])]",
        "sys.exit(any(codes))",
    )
    assert result.returncode == 0, result.stderr
    assert seqc.__version__ in result.stdout


def test_plain_python_objects_cannot_come_in_through_npz(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("in.npz", x=np.array([{"a": 1}], dtype=object))
    assert run(["run", str(artifact), "--inputs", "in.npz"]) == 2
    assert "not a readable .npz" in capsys.readouterr().err


def test_input_specs() -> None:
    spec = parse_input("x = float32[2, seq:4:32]".replace(" = ", "="))
    assert spec.shape == (2, Dimension("seq", 4, 32)) and spec.dynamic.keys() == {1}
    assert parse_input("n=int64<10>[]").shape == () and parse_input("n=int64<10>[]").high == 10
    assert Dimension("s", 20).example_size() == 20 and Dimension("s", 1, 8).example_size() == 8
    for wrong in ("x=floaty[1]", "x=float32", "x=float32[a-b]", "x=float32<3>[a]", "x=int64<0>[a]", "x=int64[a:5:4]"):
        with pytest.raises(UsageError):
            parse_input(wrong)
    assert parse_dynamic(["a.b:-1=t"]) == {"a.b": {-1: "t"}}
    with pytest.raises(UsageError):
        parse_dynamic(["a=t"])


@pytest.mark.parametrize(
    ("text", "provider"),
    [
        ("CUDAExecutionProvider", "CUDAExecutionProvider"),
        ("TensorrtExecutionProvider:trt_fp16_enable=1", ("TensorrtExecutionProvider", {"trt_fp16_enable": "1"})),
        ("N:path=/a:b=c,device_id=0", ("N", {"path": "/a:b=c", "device_id": "0"})),
        ("N:shapes=x:1x4,y:1x8,cache=", ("N", {"shapes": "x:1x4,y:1x8", "cache": ""})),
    ],
)
def test_providers_are_read_with_their_options(text: str, provider: Any) -> None:
    assert parse_provider(text) == provider


@pytest.mark.parametrize("text", ["N:", "N:a", ":a=1", "N:a=1,a=2", "N:=1"])
def test_malformed_providers_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="each key once"):
        parse_provider(text)


def test_where_nothing_moves_a_line_says_that_the_work_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("seqc.cli.console._ALIVE_SECONDS", 0.05)
    with Progress("compiling it") as progress:
        time.sleep(0.12)
        progress("model.engine: parse", 7, 0.1)
        time.sleep(0.12)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("compiling it: running for 0 s  (total 0.") and "model.engine: parse" in said[2]
    assert said[3].startswith("after model.engine: parse: running for 0 s")
    time.sleep(0.12)
    assert capsys.readouterr().err == ""
