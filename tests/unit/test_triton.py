"""Triton model repositories: what their configuration says, whether it serves what the session computes, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from torch import nn
from torch.nn import functional as F
from tritonclient.grpc import model_config_pb2 as pb

import seqc
from seqc.artifact import write_artifact
from seqc.cli.main import run
from seqc.deploy.triton_check import check, graph_tensors, parse
from seqc.deploy.triton_config import model_config
from seqc.deploy.triton_repository import write_repository
from seqc.deploy.triton_serving import Serving
from seqc.deploy.triton_trials import check_served
from seqc.errors import ArtifactError, MissingExtraError, UnsupportedModelError, UsageError
from seqc.runtime import load
from seqc.runtime.manifest import parse as parse_manifest
from tests.helpers.artifacts import edit_manifest, replace_file, small_inputs, small_manifest, write_small
from tests.helpers.triton import Server

ALONE = Serving("model", max_batch=0, capacity=8)


class Running(nn.Module):
    """A GRU, whose rows are along the second axis of its state, then a leaky maximum, which begins at minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gru(x)[0]
        most, ys = torch.full_like(x[:, 0], -torch.inf), []
        for t in range(x.shape[1]):
            most = torch.maximum(most - 0.1, torch.sin(x[:, t]))
            ys.append(x[:, t] + most)
        return torch.stack(ys, 1)


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.arange(x.shape[1])[:, None] * 0.1
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiled = seqc.compile(Running(), (torch.randn(2, 7, 4),), stateful=True)
    return compiled.save(tmp_path_factory.mktemp("triton") / "running")


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiled = seqc.compile(Attention(), (torch.randn(2, 7, 4),), stateful=True)
    return compiled.save(tmp_path_factory.mktemp("triton") / "attention")


@pytest.fixture(scope="module")
def folder(running: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(running, tmp_path_factory.mktemp("repo"), Serving("model"))


@pytest.fixture
def written(folder: Path) -> Any:
    """(config.pbtxt, the files of first values, the tensors of the graph)."""
    files = {path.name: path.read_bytes() for path in (folder / "initial_state").iterdir()}
    return (folder / "config.pbtxt").read_text(), files, graph_tensors(onnx.load(folder / "1/model.onnx/model.onnx"))


def given(rows: int, steps: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((rows, steps, 4)).astype(np.float32)


def close(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_sequences_in_batches_of_changing_company_give_what_the_session_gives(running: Path, tmp_path: Path) -> None:
    server = Server(write_repository(running, tmp_path, Serving("model", max_batch=3)))
    x = given(3, 6)
    expected = load(running).run({"x": x})["output"]
    got: dict[int, list[np.ndarray[Any, Any]]] = {0: [], 1: [], 2: []}
    for at, count, sequences in ((0, 2, (0, 1)), (0, 2, (2,)), (2, 1, (1, 2)), (2, 1, (0,)), (3, 3, (2, 0, 1))):
        requests = [(s, at == 0, {"x": x[s : s + 1, at : at + count]}) for s in sequences]
        for sequence, result in zip(sequences, server.infer(*requests), strict=True):
            got[sequence].append(result["output"])
    for sequence, pieces in got.items():
        close(np.concatenate(pieces, 1)[0], expected[sequence])
    again = server.infer((1, True, {"x": x[:1]}))[0]["output"]
    close(again, expected[:1])


def test_states_are_described_and_first_values_that_are_not_zero_are_in_files(running: Path, tmp_path: Path) -> None:
    folder = write_repository(running, tmp_path, Serving("model", sequences=5, idle_seconds=1.5))
    config = Server(folder).config
    batching = config.sequence_batching
    assert (config.backend, config.platform, config.max_batch_size) == ("onnxruntime", "onnxruntime_onnx", 8)
    assert batching.max_sequence_idle_microseconds == 1_500_000
    assert batching.WhichOneof("strategy_choice") == "oldest" and batching.oldest.max_candidate_sequences == 5
    states = {s["name"]: s for s in json.loads((running / "manifest.json").read_text())["states"]}
    found = {s.input_name: (s.output_name, list(s.dims), list(s.initial_state[0].dims)) for s in batching.state}
    (inside,) = (s for s in states.values() if s["batch_axis"] == 1)
    (other,) = (s for s in states.values() if s["batch_axis"] == 0)
    assert found == {
        f"{inside['name']}.batch_first": (f"{inside['next']}.batch_first", [1, 4], [1, 4]),
        other["name"]: (other["next"], [4], [4]),
    }
    firsts = {s.input_name: s.initial_state[0] for s in batching.state}
    assert firsts[f"{inside['name']}.batch_first"].zero_data
    file = firsts[other["name"]].data_file
    data = np.frombuffer((folder / "initial_state" / file).read_bytes(), "<f4")
    np.testing.assert_array_equal(data, np.full(4, -np.inf, np.float32))


def test_growing_states_get_a_fixed_capacity_one_sequence_at_a_time(attention: Path, tmp_path: Path) -> None:
    server = Server(write_repository(attention, tmp_path, ALONE))
    assert [g.kind for g in server.config.instance_group] == [2] and server.config.max_batch_size == 0
    x = given(2, 8)
    expected = load(attention).run({"x": x})["output"]
    pieces: dict[int, list[np.ndarray[Any, Any]]] = {0: [], 1: []}
    for at, count in ((0, 3), (3, 1), (4, 4)):
        for row in (0, 1):
            request = (row, at == 0, {"x": x[row : row + 1, at : at + count]})
            pieces[row].append(server.infer(request)[0]["output"])
    for row in (0, 1):
        close(np.concatenate(pieces[row], 1)[0], expected[row])
    with pytest.raises(Exception, match="out of data bounds"):
        server.infer((0, False, {"x": x[:1, :1]}))
    # less room than the traced length
    small = Server(write_repository(attention, tmp_path, Serving("small", max_batch=0, capacity=2)))
    close(small.infer((0, True, {"x": x[:1, :2]}))[0]["output"], expected[:1, :2])


@pytest.mark.parametrize(
    ("serving", "said"),
    [
        (Serving("model"), r"grows with the steps.*--max-batch 0 --capacity N"),
        (Serving("model", capacity=9), r"grows with the steps.*different numbers"),
        (Serving("model", max_batch=0), r"grows with the steps.*--capacity N gives room"),
    ],
)
def test_growing_states_are_refused_otherwise(attention: Path, tmp_path: Path, serving: Serving, said: str) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        write_repository(attention, tmp_path, serving)
    assert not list(tmp_path.iterdir())


def streaming(**state: Any) -> Any:
    """A manifest with one state, x[batch, sequence, 4] and y."""
    whole = {"name": "s", "next": "t", "dtype": "float32", "shape": ["batch", 3], "initial": 0.0, "batch_axis": 0}
    manifest = small_manifest(states=[{**whole, **state}], steps_dim="sequence")
    return parse_manifest({**manifest, "format_version": 3, "files": {}})


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"shape": [3], "batch_axis": None}, "one for all rows"),
        ({"shape": ["2*batch", 3]}, "several places for each row"),
        ({"shape": ["batch"]}, "one number for each row"),
    ],
)
def test_states_that_cannot_be_joined_are_served_one_sequence_at_a_time(state: dict[str, Any], said: str) -> None:
    manifest = streaming(**state)
    with pytest.raises(UnsupportedModelError, match=f"state s: .*{said}.*--max-batch 0"):
        model_config(manifest, Serving("model"))
    config, _ = model_config(manifest, Serving("model", max_batch=0))
    sizes = [{"batch": 1, "2*batch": 2}.get(size, size) for size in state["shape"]]
    assert list(config.sequence_batching.state[0].dims) == sizes
    assert [list(io.dims) for io in config.input] == [[1, -1, 4], [1, -1]]


def test_types_that_triton_lacks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"s: complex64.*does not know"):
        model_config(streaming(dtype="complex64"), Serving("model"))


def test_models_of_whole_sequences_get_dynamic_batching(tmp_path: Path) -> None:
    server = Server(write_repository(write_small(tmp_path / "small"), tmp_path / "repo", Serving("model", max_batch=4)))
    assert server.config.HasField("dynamic_batching") and not server.config.HasField("sequence_batching")
    inputs = small_inputs(3)
    requests = [(0, False, {n: a[i : i + 1] for n, a in inputs.items()}) for i in range(3)]
    expected = load(tmp_path / "small").run(inputs)
    for name in expected:
        np.testing.assert_array_equal(np.concatenate([r[name] for r in server.infer(*requests)]), expected[name])


_MIXING = """
<ir_version: 10, opset_import: ["" : 21]>
mixing (float[batch, 4] x) => (float[batch, 4] y) {
    axis = Constant<value_ints = [0]>()
    mean = ReduceMean(x, axis)
    y = Sub(x, mean)
}
"""


def test_rows_that_influence_each_other_are_not_batched(tmp_path: Path) -> None:
    ports = {n: [{"name": n, "dtype": "float32", "shape": ["batch", 4]}] for n in "xy"}
    dims = {"batch": {"min": 1, "max": None, "traced": 2}}
    manifest = small_manifest(inputs=ports["x"], outputs=ports["y"], dims=dims, tolerances={})
    write_artifact(tmp_path / "a", ir.from_onnx_text(_MIXING), manifest, {}, "")
    with pytest.raises(UnsupportedModelError, match="influence each other"):
        write_repository(tmp_path / "a", tmp_path / "repo", Serving("model"))
    folder = write_repository(tmp_path / "a", tmp_path / "repo", Serving("model", max_batch=0))
    x = given(1, 3)[0]
    close(Server(folder).infer((0, False, {"x": x}))[0]["y"], x - x.mean(0))


def test_a_batch_that_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    dims = {"batch": {"min": 1, "max": 4, "traced": 3}, "sequence": {"min": 2, "max": 64, "traced": 7}}
    artifact = write_small(tmp_path / "small", dims=dims)
    with pytest.raises(UsageError, match="--max-batch is 8, and batch is 1 to 4"):
        write_repository(artifact, tmp_path / "repo", Serving("model"))
    write_repository(artifact, tmp_path / "repo", Serving("model", max_batch=4))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_batch_size: 8", "max_batch_size: eight", "config.pbtxt: .*eight"),
        ('backend: "onnxruntime"', 'back_end: "onnxruntime"', "config.pbtxt: .*back_end"),
        ("max_batch_size: 8", "max_batch_size: 0", r"'x' as TYPE_FP32 \[-1, 4\]; in the model it is"),
        ('name: "output"', 'name: "result"', "'result', which the model does not have"),
        ("TYPE_FP32\n  dims: -1", "TYPE_FP16\n  dims: -1", "'x' as TYPE_FP16"),
        ("dims: 4\n    initial_state", "dims: 5\n    initial_state", r"as TYPE_FP32 \[1, 1, 5\]"),
        ('data_file: "', 'data_file: "other_', "which is not there"),
        ("      zero_data: true\n", "", "has neither zero_data nor data_file"),
        ('      name: "first ', '      name: "" # ', "or has no name"),
    ],
)
def test_a_wrong_configuration_is_found(written: Any, old: str, new: str, said: str) -> None:
    text, files, tensors = written
    check(parse(text), files, *tensors)
    assert old in text
    with pytest.raises(ArtifactError, match=said):
        check(parse(text.replace(old, new, 1)), files, *tensors)


def test_a_state_without_its_first_value_is_found(written: Any) -> None:
    text, files, tensors = written
    config = parse(text)
    del config.sequence_batching.state[0].initial_state[:]
    with pytest.raises(ArtifactError, match="has no first value"):
        check(config, files, *tensors)


def test_first_values_that_are_not_those_of_the_artifact_are_found(running: Path, folder: Path, written: Any) -> None:
    text, files, _ = written
    model = onnxruntime.InferenceSession(folder / "1" / "model.onnx" / "model.onnx")
    check_served(model, parse(text), files, load(running), None)
    wrong = {name: np.zeros(4, "<f4").tobytes() for name in files}
    with pytest.raises(ArtifactError, match="does not give what the artifact gives: output"):
        check_served(model, parse(text), wrong, load(running), None)


def test_states_that_triton_would_swap_are_found() -> None:
    """Triton takes the n-th output by name for the n-th input by name (issue 8586)."""
    states = [
        {
            "name": f"c{tail}",
            "next": f"c{tail}_next",
            "dtype": "float32",
            "shape": ["b", 3],
            "initial": 0,
            "batch_axis": 0,
        }
        for tail in ("", "_len")
    ]
    ports = {n: [{"name": n, "dtype": "float32", "shape": ["b", "n"]}] for n in "xy"}
    dims = {n: {"min": 1, "max": None, "traced": 3} for n in "bn"}
    manifest = small_manifest(inputs=ports["x"], outputs=ports["y"], dims=dims, states=states, steps_dim="n")
    config, _ = model_config(parse_manifest({**manifest, "format_version": 3, "files": {}}), Serving("model"))
    inputs = {"x": ("TYPE_FP32", (-1, -1)), "c": ("TYPE_FP32", (-1, 3)), "c_len": ("TYPE_FP32", (-1, 3))}
    outputs = {"y": ("TYPE_FP32", (-1, -1)), "c_next": inputs["c"], "c_len_next": inputs["c"]}
    with pytest.raises(ArtifactError, match="would pass 'c_len_next' on to 'c' instead of 'c_next'"):
        check(config, {}, inputs, outputs)


def with_engine(artifact: Path, to: Path, package: str = "tensorrt", **profile: tuple[int, int, int]) -> Path:
    """A copy of the artifact with bytes in place of an engine: what is tested is how it is served, not that it runs."""
    shutil.copytree(artifact, to)
    ranges = {"batch": (1, 2, 8), "sequence": (1, 9, 64), **profile}
    entry = {
        "file": "model.engine",
        "package": package,
        "version": "10.13",
        "sm": [],
        "profiles": [{name: dict(zip(("min", "opt", "max"), sizes, strict=True)) for name, sizes in ranges.items()}],
        **dict.fromkeys(("kernels", "scratch_bytes", "activation_bytes", "weight_bytes"), 0),
        "has_step_loop": False,
    }
    edit_manifest(to, lambda manifest: manifest.update(engines=[entry]))
    replace_file(to, "model.engine", b"an engine")
    return to


def test_an_engine_of_tensorrt_is_served_by_its_backend_with_implicit_states(running: Path, tmp_path: Path) -> None:
    artifact = with_engine(running, tmp_path / "made")
    folder = write_repository(artifact, tmp_path / "repo", Serving("model", max_batch=0))
    config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
    assert (config.backend, config.platform, config.default_model_filename) == (
        "tensorrt",
        "tensorrt_plan",
        "model.plan",
    )
    assert (folder / "1" / "model.plan").read_bytes() == b"an engine"
    assert [path.name for path in (folder / "1").iterdir()] == ["model.plan"]
    names = {s.port.name: s.following for s in load(running).states}
    assert {s.input_name: s.output_name for s in config.sequence_batching.state} == names
    assert all(s.initial_state[0].WhichOneof("state_data") for s in config.sequence_batching.state)
    readme = (folder / "README.md").read_text()
    assert "for Triton's TensorRT backend" in readme and "built by tensorrt 10.13, and the server's must be" in readme
    assert "It takes batch 1 to 8, sequence 1 to 64; other sizes fail." in readme


def test_an_engine_of_whole_sequences_is_batched_up_to_what_it_takes(tmp_path: Path) -> None:
    artifact = with_engine(write_small(tmp_path / "small"), tmp_path / "made")
    with pytest.raises(UsageError, match=r"--max-batch is 9, and model.engine was built for 8 rows at most"):
        write_repository(artifact, tmp_path / "repo", Serving("model", max_batch=9))
    folder = write_repository(artifact, tmp_path / "repo", Serving("model"))
    config = text_format.Parse((folder / "config.pbtxt").read_text(), pb.ModelConfig())
    assert config.platform == "tensorrt_plan" and config.HasField("dynamic_batching")


def test_engines_that_triton_cannot_serve_are_refused_with_what_to_do(
    running: Path, attention: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rtx = with_engine(running, tmp_path / "rtx", "tensorrt-rtx")
    assert run(["triton", str(rtx), "-o", str(tmp_path / "repo")]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.engine is an engine of tensorrt-rtx, and Triton's backend loads those of tensorrt only" in line
    assert line.endswith("--onnx serves its ONNX model, which Triton's ONNX Runtime backend runs")
    assert run(["triton", str(rtx), "-o", str(tmp_path / "repo"), "--onnx"]) == 0
    assert Server(tmp_path / "repo" / "rtx").config.platform == "onnxruntime_onnx"
    for artifact, serving, said in (
        (
            with_engine(running, tmp_path / "a"),
            Serving("m"),
            "rows inside, and an engine stays as it was built: --max-b",
        ),
        (
            with_engine(attention, tmp_path / "b"),
            Serving("m", max_batch=0, capacity=9),
            "grows with the steps, and behind",
        ),
        (
            with_engine(running, tmp_path / "c", sequence=(2, 9, 64)),
            Serving("m", max_batch=0),
            r"takes 2 of sequence at least, .*profile.sequence=1,9,64",
        ),
    ):
        with pytest.raises(UnsupportedModelError, match=said):
            write_repository(artifact, tmp_path / "repo", serving)


def test_a_damaged_artifact_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    artifact = write_small(tmp_path / "small")
    (artifact / "model.onnx").write_bytes((artifact / "model.onnx").read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="truncated"):
        write_repository(artifact, tmp_path / "repo", Serving("model"))
    assert not (tmp_path / "repo").exists()


def test_a_manifest_that_the_graph_does_not_bear_out_is_refused(tmp_path: Path) -> None:
    artifact = write_small(tmp_path / "small")
    edit_manifest(artifact, lambda data: data["outputs"][0].update(shape=["batch", "sequence", 5]))
    with pytest.raises(
        ArtifactError, match=r"'y' as TYPE_FP32 \[-1, -1, 5\]; in the model it is TYPE_FP32 \[-1, -1, 4\]"
    ):
        write_repository(artifact, tmp_path / "repo", Serving("model"))


def test_the_command_line(running: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["triton", str(running), "-o", str(tmp_path / "repo"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["written"] == str(tmp_path / "repo" / "running") and "config.pbtxt" in printed["files"]
    assert "opset" in (tmp_path / "repo" / "running" / "README.md").read_text()
    assert run(["triton", str(running), "-o", str(tmp_path / "repo")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert run(["triton", str(running), "-o", str(tmp_path / "repo"), "--name", "a/b"]) == 2
    assert run(["triton", str(running), "-o", str(tmp_path / "repo"), "--name", "b", "--capacity", "3"]) == 2
    assert "none of this artifact does" in capsys.readouterr().err


def test_without_tritonclient_the_extra_is_named(running: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tritonclient.grpc", None)
    with pytest.raises(MissingExtraError, match=r"seqc\[triton\]"):
        model_config(load(running).manifest, Serving("model"))
