"""Sessions and streams over engines. Engines are built for real; a double of the package runs their ONNX form on the CPU."""

from __future__ import annotations

import importlib
import importlib.metadata
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqc
from seqc.cli.main import run
from seqc.errors import ArtifactError, MissingExtraError
from seqc.runtime import Session, load
from seqc.runtime.cuda import DeviceArray, Memory, open_device
from seqc.runtime.tensorrt import cache_path
from tests.helpers.artifacts import edit_manifest, write_small
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.fake_tensorrt import Cache, Config, Context, FakeEngine, FakeTensorRT

RTX = ["tensorrt-rtx"]
OPTIONS = ["sm=80,89", "profile.batch=1,2,4", "profile.sequence=1,9,32", "profile.capacity=16,64,64"]
Arrays = dict[str, np.ndarray[Any, Any]]


class Hybrid(nn.Module):
    """A convolution and a recurrence, whose states have a size, and attention, whose state grows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=2, groups=4)
        self.decay = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        h, steps = torch.zeros(x.shape[0], 4), []
        for t in range(x.shape[1]):
            h = self.decay * h + x[:, t]
            steps.append(h)
        x = torch.stack(steps, 1)
        return x + F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    compiled = seqc.compile(Hybrid(), (torch.randn(2, 9, 4),), stateful=True, target="tensorrt-rtx", options=OPTIONS)
    return compiled.save(tmp_path_factory.mktemp("engines") / "artifact")


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    """The same files in a folder of the test's own, since caches are written beside it."""
    path = tmp_path / "artifact"
    path.mkdir()
    for file in built.iterdir():
        if file.is_file():
            os.link(file, path / file.name)
    return path


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return put_gpu(monkeypatch, FakeCuda())


@pytest.fixture
def package(artifact: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    return put_package(monkeypatch, FakeTensorRT(artifact, cuda))


def put_gpu(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> FakeCuda:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda.module())
    return cuda


def put_package(monkeypatch: pytest.MonkeyPatch, package: FakeTensorRT) -> FakeTensorRT:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", package)  # type: ignore[arg-type]
    return package


def some(steps: int, rows: int = 2, seed: int = 0) -> Arrays:
    return {"x": np.random.default_rng(seed).standard_normal((rows, steps, 4)).astype(np.float32)}


def part(inputs: Arrays, start: int, count: int) -> Arrays:
    return {name: array[:, start : start + count] for name, array in inputs.items()}


def test_a_whole_sequence_runs_in_the_general_engine(artifact: Path, package: FakeTensorRT) -> None:
    session = load(artifact, providers=RTX)
    assert session.providers == ("tensorrt-rtx",)
    given = some(9)
    np.testing.assert_array_equal(session.run(given)["output"], load(artifact).run(given)["output"])
    (shapes,) = package.engines["model.engine"].contexts[0].runs
    assert shapes["x"] == (2, 9, 4)
    assert {shapes[s.port.name][s.grows] for s in session.states if s.grows is not None} == {16}  # as few as it takes
    assert package.engines["step.engine"].contexts[0].runs == []


def test_a_stream_takes_single_steps_in_the_engine_for_one(artifact: Path, package: FakeTensorRT) -> None:
    session, given = load(artifact, providers=RTX), some(20)
    stream, plain = session.stream(2), load(artifact).stream(2)
    at = 0
    for steps in (7, 1, 1, 4, 1, 6):
        piece = part(given, at, steps)
        np.testing.assert_allclose(stream.step(piece)["output"], plain.step(piece)["output"], rtol=1e-6, atol=1e-7)
        at += steps
    whole = load(artifact).run(given)["output"]
    np.testing.assert_allclose(session.run(given)["output"], whole, rtol=1e-6)
    assert len(package.engines["step.engine"].contexts[0].runs) == 3
    assert stream.memory() == plain.memory()


def test_growing_states_get_room_up_to_what_the_engine_takes(artifact: Path, package: FakeTensorRT) -> None:
    session, given = load(artifact, providers=RTX), some(64)
    assert session.most_steps == 64 and session.least_places == 16
    stream = session.stream(2)
    found = [stream.step(part(given, t, 1))["output"] for t in range(64)]
    wide = load(artifact).run({"x": given["x"]})["output"]  # the ONNX form takes more at once than the engine
    np.testing.assert_allclose(np.concatenate(found, 1), wide, rtol=1e-5, atol=1e-6)
    (name, axis), *_ = [(s.port.name, s.grows) for s in session.states if s.grows is not None]
    places = [shapes[name][axis] for shapes in package.engines["step.engine"].contexts[0].runs]
    assert places[0] >= 16 and places[-1] == 64 and places == sorted(places)
    with pytest.raises(ArtifactError, match="takes 64 steps in all at most, and these would be 65"):
        stream.step(part(given, 0, 1))


def test_streams_that_fork_do_not_see_each_other(artifact: Path, package: FakeTensorRT) -> None:
    session = load(artifact, providers=RTX)
    stream = session.stream(2)
    stream.step(some(5))
    other, checkpoint = stream.fork(), stream.fork()
    one, two = stream.step(some(3, seed=1))["output"], other.step(some(3, seed=2))["output"]
    assert not np.allclose(one, two)
    stream.rewind(checkpoint)
    np.testing.assert_array_equal(stream.step(some(3, seed=2))["output"], two)
    np.testing.assert_array_equal(checkpoint.step(some(3, seed=1))["output"], one)


def test_rows_go_on_by_themselves_and_begin_anew(artifact: Path, package: FakeTensorRT) -> None:
    stream, plain = load(artifact, providers=RTX).stream(3), load(artifact).stream(3)
    for each in (stream, plain):
        each.step(some(4, rows=3))
        each.step(some(2, rows=1), rows=[1])
        each.reset([2])
    assert stream.positions == plain.positions == (4, 6, 0)
    given = some(2, rows=3, seed=5)
    np.testing.assert_allclose(stream.step(given)["output"], plain.step(given)["output"], rtol=1e-6, atol=1e-7)


def test_a_state_goes_from_an_engine_to_onnxruntime_and_back(
    artifact: Path, package: FakeTensorRT, tmp_path: Path
) -> None:
    stream, plain = load(artifact, providers=RTX).stream(2), load(artifact).stream(2)
    stream.step(some(5))
    stream.save(tmp_path / "state")
    plain.load(tmp_path / "state")
    expected = plain.step(some(3, seed=1))["output"]
    stream.load(tmp_path / "state")
    np.testing.assert_allclose(stream.step(some(3, seed=1))["output"], expected, rtol=1e-6, atol=1e-7)


def test_states_take_turns_between_two_sets_of_buffers(artifact: Path, package: FakeTensorRT, cuda: FakeCuda) -> None:
    session = load(artifact, providers=RTX)
    stream = session.stream(2)
    stream.step(some(16))
    context = package.engines["step.engine"].contexts[0]
    seen, allocated = [], []
    for t in range(12):
        stream.step(some(1, seed=t))
        seen.append(dict(context.addresses))
        allocated.append(cuda.allocated)
    assert allocated[2:] == allocated[2:3] * 10  # nothing is allocated once it goes on evenly
    assert seen[4:] == [seen[4], seen[5]] * 4 and seen[4] != seen[5]
    for state in session.states:
        assert seen[5][state.port.name] == seen[4][state.following], "what came out goes in without a copy"


def test_buffers_go_back_when_streams_do(artifact: Path, package: FakeTensorRT, cuda: FakeCuda) -> None:
    session = load(artifact, providers=RTX)
    for _ in range(3):
        session.stream(2).step(some(9))
    allocated = cuda.allocated
    session.stream(2).step(some(9))
    assert cuda.allocated == allocated


def test_sizes_that_the_engine_reads_on_the_cpu_stay_there(artifact: Path, package: FakeTensorRT) -> None:
    package.on_host = {"past_position", "present_position"}
    self_consistent(artifact)
    package.on_host = {"past_position"}  # comes out on the GPU, and is fetched for the next step
    self_consistent(artifact)


def self_consistent(artifact: Path) -> None:
    stream, plain = load(artifact, providers=RTX).stream(2), load(artifact).stream(2)
    for seed, steps in enumerate((3, 1, 1, 2)):
        given = some(steps, seed=seed)
        np.testing.assert_allclose(stream.step(given)["output"], plain.step(given)["output"], rtol=1e-6, atol=1e-7)


def test_the_profile_with_all_shapes_is_taken(artifact: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, room = {"min": 1, "opt": 2, "max": 4}, {"min": 16, "opt": 64, "max": 64}
    ranges = [{"min": 1, "opt": 2, "max": 4}, {"min": 8, "opt": 9, "max": 32}]
    profiles = [{"batch": rows, "sequence": sequence, "capacity": room} for sequence in ranges]
    package = put_package(monkeypatch, FakeTensorRT(artifact, cuda, {"model.engine": profiles}))
    session, plain = load(artifact, providers=RTX), load(artifact)
    chosen = []
    for steps in (3, 9, 20, 2):
        given = some(steps)
        np.testing.assert_array_equal(session.run(given)["output"], plain.run(given)["output"])
        chosen.append(package.engines["model.engine"].contexts[0].active_optimization_profile)
    assert chosen == [0, 1, 1, 0]
    with pytest.raises(ArtifactError, match=r"model.engine takes 'x' in sizes \(1, 1, 4\) to \(4, 4, 4\), got \(2, 6"):
        session.run(some(6))


def test_sizes_beyond_the_engine_s_are_refused_as_those_of_the_model_are(artifact: Path, package: FakeTensorRT) -> None:
    session = load(artifact, providers=RTX)
    assert (session.dims["sequence"].min, session.dims["sequence"].max) == (1, 32)
    assert load(artifact).dims["sequence"].max == 64
    with pytest.raises(ArtifactError, match="dimension 'sequence' must be 1 to 32, got 33 in input 'x' axis 1"):
        session.run(some(33))
    with pytest.raises(ArtifactError, match="dimension 'batch' must be 1 to 4, got 5"):
        session.run(some(3, rows=5))


def test_a_stream_is_as_it_was_where_the_engine_fails(artifact: Path, package: FakeTensorRT) -> None:
    stream, plain = load(artifact, providers=RTX).stream(2), load(artifact).stream(2)
    for each in (stream, plain):
        each.step(some(3))
    package.fail = "Error Code 1: Cuda Runtime (an illegal memory access)"
    with pytest.raises(ArtifactError, match=r"tensorrt-rtx failed while running step.engine: Error Code 1.*illegal"):
        stream.step(some(1, seed=1))
    package.fail = ""
    given = some(1, seed=2)
    np.testing.assert_allclose(stream.step(given)["output"], plain.step(given)["output"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("option", "expected"), [({}, "WHOLE_GRAPH_CAPTURE"), ({"cuda_graph": "off"}, "DISABLED")])
def test_the_step_is_captured_as_a_cuda_graph(
    artifact: Path, package: FakeTensorRT, option: dict[str, str], expected: str
) -> None:
    load(artifact, providers=[("tensorrt-rtx", option)])
    strategies = {n: e.contexts[0].config.cuda_graph_strategy for n, e in package.engines.items()}  # type: ignore[union-attr]
    assert strategies == {"model.engine": "DISABLED", "step.engine": expected}


def test_what_was_compiled_for_the_gpu_is_kept_beside_the_artifact(artifact: Path, package: FakeTensorRT) -> None:
    before = sorted(artifact.iterdir())
    path = artifact.parent / "artifact.model.engine.cache"
    assert cache_path(artifact / "model.engine") == path
    session = load(artifact, providers=RTX)
    assert not path.exists()
    session.run(some(3))
    assert path.read_bytes() == b"cache of sm89:model.engine" and sorted(artifact.iterdir()) == before
    path.write_bytes(b"cache of sm89:earlier")
    again = load(artifact, providers=RTX)
    again.run(some(3))
    assert path.read_bytes() == b"cache of sm89:earlier model.engine"  # it was read
    path.write_bytes(b"of another GPU")
    load(artifact, providers=RTX).run(some(3))
    assert path.read_bytes() == b"cache of sm89:model.engine"


def test_a_cache_that_cannot_be_written_is_no_error_and_none_is_where_it_is_off(
    artifact: Path, package: FakeTensorRT
) -> None:
    load(artifact, providers=[("tensorrt-rtx", {"runtime_cache": "off"})]).run(some(3))
    path = cache_path(artifact / "model.engine")
    assert not path.exists()
    path.mkdir()
    assert load(artifact, providers=RTX).run(some(3))["output"].shape == (2, 3, 4)


def test_the_command_line_runs_engines(
    artifact: Path, package: FakeTensorRT, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", str(artifact), "--random", "sequence=9", "--provider", "tensorrt-rtx:device_id=0"]) == 0
    assert "ms on tensorrt-rtx" in capsys.readouterr().out
    assert run(["run", str(artifact), "--random", "sequence=9", "--stream", "4", "--provider", "tensorrt-rtx"]) == 0
    assert [s["x"][1] for s in package.engines["model.engine"].contexts[0].runs] == [4, 4]
    assert [s["x"][1] for s in package.engines["step.engine"].contexts[0].runs] == [1]


def test_without_a_gpu_the_reason_is_said_for_real(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No double: the installed package on this machine."""
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is an NVIDIA GPU here")
    assert run(["run", str(artifact), "--random", "sequence=9", "--provider", "tensorrt-rtx"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no NVIDIA GPU here that CUDA can use" in line or "cuda-python, which is not installed" in line


def test_cuda_python_without_a_gpu_says_so_for_real() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is an NVIDIA GPU here")
    with pytest.raises(ArtifactError, match=r"there is no NVIDIA GPU here that CUDA can use \(cudaError\w+: .*\): eng"):
        open_device()


def test_no_gpu_is_said(artifact: Path, package: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    put_gpu(monkeypatch, FakeCuda(devices=0))
    with pytest.raises(ArtifactError, match=r"no NVIDIA GPU here that CUDA can use \(cudaErrorNoDevice: no CUDA-cap"):
        load(artifact, providers=RTX)


def test_a_gpu_that_is_not_there_is_said(artifact: Path, package: FakeTensorRT) -> None:
    with pytest.raises(ArtifactError, match="there is no GPU of number 2: CUDA sees 1, from 0 on"):
        load(artifact, providers=[("tensorrt-rtx", {"device_id": 2})])


def test_a_missing_cuda_python_is_said(artifact: Path, package: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(MissingExtraError, match=r"the PyTorch that is installed has no CUDA\): pip install cuda-bind"):
        load(artifact, providers=RTX)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match="cuda-python, which is not installed: pip install cuda-bindings"):
        open_device()


def test_a_missing_package_is_said_with_its_extra(
    artifact: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtraError, match=r"running engines of tensorrt-rtx needs that package.*seqc\[rtx\]"):
        load(artifact, providers=RTX)


def test_another_version_than_the_builder_s_is_refused(
    artifact: Path, package: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = importlib.metadata.version("tensorrt-rtx")
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9" if name == "tensorrt-rtx" else real(name))
    with pytest.raises(ArtifactError, match=rf"model.engine was built by tensorrt-rtx {built}, and 9.9 is installed"):
        load(artifact, providers=RTX)


def test_a_gpu_that_the_engine_was_not_built_for_is_refused(
    artifact: Path, package: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_gpu(monkeypatch, FakeCuda(capability=120))
    with pytest.raises(ArtifactError, match="built for GPUs of sm 80, 89, and this one has 120: compile with --opt sm"):
        load(artifact, providers=RTX)


def test_an_engine_that_the_package_refuses_is_told_in_its_words(artifact: Path, package: FakeTensorRT) -> None:
    package._known.clear()
    with pytest.raises(ArtifactError, match=r"tensorrt-rtx cannot load .*model.engine: the engine plan file is not c"):
        load(artifact, providers=RTX)


def test_an_artifact_without_engines_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no model.engine of tensorrt: compile it with --target tensorrt"):
        load(write_small(tmp_path / "small"), providers=["tensorrt"])


def test_an_engine_that_is_in_no_list_of_hashes_is_not_loaded(artifact: Path, package: FakeTensorRT) -> None:
    text = (artifact / "manifest.json").read_text()
    (artifact / "manifest.json").unlink()  # a link to that of the other tests
    (artifact / "manifest.json").write_text(text)
    edit_manifest(artifact, lambda data: data["files"].pop("step.engine"))
    with pytest.raises(ArtifactError, match=r"holds no step\.engine of tensorrt-rtx"):
        load(artifact, providers=RTX)


@pytest.mark.parametrize(
    ("providers", "message"),
    [
        (["tensorrt-rtx", "CPUExecutionProvider"], "goes with no other provider, 2 were named"),
        ([("tensorrt-rtx", {"device": 1})], "has no option 'device': did you mean 'device_id'"),
        ([("tensorrt-rtx", {"cuda_graph": "yes"})], "cuda_graph of tensorrt-rtx is on or off, not 'yes'"),
        ([("tensorrt-rtx", {"device_id": "first"})], "device_id of tensorrt-rtx is the number of a GPU, not 'first'"),
    ],
)
def test_wrong_providers_are_refused(artifact: Path, providers: list[Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        load(artifact, providers=providers)


def test_a_full_memory_is_said_when_nothing_idle_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = put_gpu(monkeypatch, FakeCuda(limit=1000))
    memory = Memory(open_device())
    first = DeviceArray(memory, (100,), np.dtype(np.float32))
    del first
    second = DeviceArray(memory, (200,), np.dtype(np.float32))  # takes the place of what is idle
    assert cuda.used == 800 and second.address in cuda.held
    with pytest.raises(ArtifactError, match="CUDA failed: cudaErrorMemoryAllocation: out of memory"):
        DeviceArray(memory, (100,), np.dtype(np.float32))


def test_an_array_comes_back_from_the_gpu_as_it_was(cuda: FakeCuda) -> None:
    memory = Memory(open_device())
    for array in (np.arange(6.0).reshape(2, 3), np.zeros((2, 0), np.float32), np.array(3), np.array([True, False])):
        there = DeviceArray(memory, array.shape, array.dtype)
        there.fill(array)
        back = there.numpy()
        assert back.dtype == array.dtype and back.shape == array.shape and (back == array).all()
        assert there.tensor_size_in_bytes() == array.nbytes
    del there, memory
    assert cuda.used == 0


def public(kind: Any) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]


def test_the_double_has_no_name_that_the_package_has_not() -> None:
    trt = importlib.import_module("tensorrt_rtx")
    own = {"deserialize_cuda_engine": trt.Runtime}
    pairs = [(Context, trt.IExecutionContext), (FakeEngine, trt.ICudaEngine), (Config, trt.IRuntimeConfig)]
    for double, real in [*pairs, (Cache, trt.IRuntimeCache)]:
        assert [name for name in public(double) if not hasattr(real, name)] == []
    assert [n for n in public(FakeTensorRT) if n != "log" and not hasattr(own.get(n, trt), n)] == []
    for kind in ("TensorIOMode", "TensorLocation"):
        assert all(hasattr(getattr(trt, kind), member.name) for member in getattr(FakeTensorRT, kind))
    assert hasattr(trt.IRuntimeConfig, "cuda_graph_strategy") and trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert hasattr(trt.IExecutionContext, "active_optimization_profile")


def test_the_double_of_cuda_has_no_name_that_cuda_python_has_not() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    for name in (n for n in dir(FakeCuda) if n.startswith("cuda")):
        assert hasattr(runtime, name)
    for kind in ("cudaMemcpyKind", "cudaDeviceAttr"):
        for member in getattr(FakeCuda, kind):
            assert int(getattr(getattr(runtime, kind), member.name)) == member
    assert runtime.cudaStreamNonBlocking == FakeCuda.cudaStreamNonBlocking


def test_sessions_may_run_in_several_threads(artifact: Path, package: FakeTensorRT) -> None:
    from concurrent.futures import ThreadPoolExecutor

    session: Session = load(artifact, providers=RTX)
    given = [some(n, seed=n) for n in itertools.islice(itertools.cycle((3, 9, 5)), 12)]
    expected = [session.run(x)["output"] for x in given]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda x: session.run(x)["output"], given), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
