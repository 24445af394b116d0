"""Engines of TensorRT for RTX, built for real: no GPU is needed. Tiny models, about a second each."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import seqc
import seqc.runtime
from seqc.cli.main import run
from seqc.compiler import Compiled
from seqc.errors import ArtifactError, EngineError, MissingExtraError, UnsupportedOpError, UsageError
from seqc.runtime.manifest import read

RANGES = ["profile.batch=1,2,4", "profile.sequence=1,9,32"]
X = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))


class Decays(nn.Module):
    """Its state decays: what becomes a scan without a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(x.shape[0], 4)
        steps = []
        for t in range(x.shape[1]):
            h = self.decay * h + x[:, t]
            steps.append(h)
        return torch.stack(steps, 1)


class Nonlinear(nn.Module):
    """No known cell, and no scan: it stays a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(x.shape[0], 4)
        steps = []
        for t in range(x.shape[1]):
            h = torch.tanh(self.mix(h)) + torch.sin(h) * x[:, t]
            steps.append(h)
        return torch.stack(steps, 1)


class Attends(nn.Module):
    """Causal attention: its step form keeps the keys and values of all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


class MambaLike(nn.Module):
    """A causal convolution over channels and a selective scan behind it, as in Mamba's mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, groups=4, padding=2)
        self.to_dt, self.to_bc = nn.Linear(4, 4), nn.Linear(4, 4)
        self.rate = nn.Parameter(-torch.rand(4, 2) - 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = nn.functional.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        dt = nn.functional.softplus(self.to_dt(u))
        b, c = self.to_bc(u).chunk(2, -1)
        h = torch.zeros(x.shape[0], 4, 2)
        steps = []
        for t in range(x.shape[1]):
            h = torch.exp(dt[:, t, :, None] * self.rate) * h + (dt[:, t] * u[:, t])[..., None] * b[:, t, None]
            steps.append((h * c[:, t, None]).sum(-1))
        return torch.stack(steps, 1)


class Bits(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.int() & 3).float()


class Wide(nn.Module):
    """Takes its input to float64 inside."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double().sin().float()


class Largest(nn.Module):
    """More values than the builder's kernel takes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.topk(torch.cat([x] * 1000, 2), 3900).values


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 1


def compiled(model: nn.Module, *options: str, **told: Any) -> Compiled:
    torch.manual_seed(0)
    told = {"target": "tensorrt-rtx", "check": False, **told}
    return seqc.compile(model, (X,), options=["sm=89", *RANGES, *options], **told)


def test_an_engine_is_built_and_recorded(tmp_path: Path) -> None:
    stages: list[str] = []
    made = compiled(Decays(), check=True, progress=lambda stage, nodes, seconds: stages.append(stage))
    (entry,) = made.manifest["engines"]
    assert entry["file"] == "model.engine" and entry["sm"] == [89]
    assert entry["profiles"] == [{"batch": {"min": 1, "opt": 2, "max": 4}, "sequence": {"min": 1, "opt": 9, "max": 32}}]
    assert 1 <= entry["kernels"] <= 6 and entry["has_step_loop"] is False
    assert entry["activation_bytes"] >= entry["scratch_bytes"] > 0
    assert entry["precision"] == ["float32"] and entry["package"] == "tensorrt-rtx"
    assert {f"model.engine: {phase}" for phase in ("check", "parse", "prepare", "build", "write")} <= set(stages)
    assert any("built and not run" in note for note in made.manifest["notes"])
    artifact = made.save(tmp_path / "made")
    manifest = read(artifact)
    assert (artifact / "model.engine").read_bytes() == made.engines["model.engine"]
    assert manifest.files["model.engine"].bytes == len(made.engines["model.engine"]) > 10000
    assert manifest.dims["sequence"].max == 32 and manifest.tools["tensorrt-rtx"] == entry["version"]
    found = seqc.runtime.load(artifact).run({"x": X.numpy()})["output"]  # the ONNX form is there as before
    np.testing.assert_allclose(found, made(X).numpy())


def test_kernels_lead_to_source_lines() -> None:
    made = compiled(Outer(nn.Linear(4, 4)))
    (engine,) = made.report["engines"]
    assert len(engine["kernels"]) == made.manifest["engines"][0]["kernels"]
    assert any("inner" in kernel["modules"] for kernel in engine["kernels"])
    assert any("return self.inner(x) + 1" in line for kernel in engine["kernels"] for line in kernel["source"])
    assert all(kernel["outputs"] for kernel in engine["kernels"])


def test_a_loop_over_steps_is_told() -> None:
    made = compiled(Nonlinear())
    assert made.manifest["engines"][0]["has_step_loop"] is True
    inside = [kernel for kernel in made.report["engines"][0]["kernels"] if kernel["in_loop"]]
    assert inside and len(inside) < made.manifest["engines"][0]["kernels"]
    assert any("torch.sin(h)" in line for kernel in inside for line in kernel["source"])


def test_two_builds_are_equal_byte_by_byte() -> None:
    assert compiled(nn.Linear(4, 4)).engines == compiled(nn.Linear(4, 4)).engines


def test_a_streaming_model_has_an_engine_for_prefill_and_one_for_steps(tmp_path: Path) -> None:
    made = compiled(Attends(), "profile.capacity=16,64,64", stateful=True, check=True)
    prefill, step = made.manifest["engines"]
    assert [prefill["file"], step["file"]] == ["model.engine", "step.engine"]
    room = {"min": 16, "opt": 64, "max": 64}
    rows = {"min": 1, "opt": 2, "max": 4}
    assert prefill["profiles"] == [{"batch": rows, "sequence": {"min": 1, "opt": 9, "max": 32}, "capacity": room}]
    assert step["profiles"] == [{"batch": rows, "capacity": room}]
    artifact = made.save(tmp_path / "made")
    assert {"model.engine", "step.engine", "model.onnx", "step.onnx"} <= set(read(artifact).files)


def test_a_streaming_mamba_has_no_loop_over_steps() -> None:
    made = compiled(MambaLike(), stateful=True, check=True)
    prefill, step = made.manifest["engines"]
    assert not prefill["has_step_loop"] and not step["has_step_loop"]
    assert 1 <= step["kernels"] < prefill["kernels"] < 30
    (lowered,) = [r for r in made.report["passes"] if r["name"] == "lower"]
    assert any("causal_conv as taps" in r for r in lowered["reasons"])
    assert any("selective_scan as prefix" in r for r in lowered["reasons"])


def test_without_a_name_all_compute_capabilities_are_built_for() -> None:
    made = seqc.compile(nn.Tanh(), (X,), target="tensorrt-rtx", check=False)
    assert made.manifest["engines"][0]["sm"] == [75, 80, 86, 89, 120, 121]
    assert made.manifest["dims"]["batch"]["max"] == 8 and made.manifest["dims"]["sequence"]["max"] == 4096
    assert any(
        "'batch' is at most 8, for want of a bound: set --opt profile.batch" in n for n in made.manifest["notes"]
    )


def test_a_gpu_that_nobody_named_is_left_out_with_a_note_where_it_cannot_do_it() -> None:
    made = seqc.compile(nn.Linear(4, 4), (X,), target="tensorrt-rtx", check=False)  # in float32
    assert made.manifest["engines"][0]["sm"] == [80, 86, 89, 120, 121]
    assert any("no engine for sm=75" in note and "FP32 GEMM" in note for note in made.manifest["notes"])
    with pytest.raises(EngineError, match=r"Turing \(SM75\): FP32 GEMM.*name other GPUs"):
        seqc.compile(nn.Linear(4, 4), (X,), target="tensorrt-rtx", check=False, options={"sm": [75, 89]})


def test_half_precision_is_built_and_told() -> None:
    made = seqc.compile(nn.Linear(4, 4).half(), (X.half(),), target="tensorrt-rtx", check=False)
    assert made.manifest["engines"][0]["sm"] == [75, 80, 86, 89, 120, 121]
    assert made.manifest["engines"][0]["precision"] == ["float16"]


@pytest.mark.parametrize("model", [MambaLike, Attends])
@pytest.mark.parametrize(("dtype", "name", "kernel"), [("fp16", "float16", "Half"), ("bf16", "bfloat16", "BFloat16")])
def test_a_float32_model_is_built_in_a_narrow_type(model: type[nn.Module], dtype: str, name: str, kernel: str) -> None:
    made = compiled(model(), f"dtype={dtype}", stateful=True, check=True)
    assert made.report["check"]["ok"] and made.report["check_in_chunks"]["ok"]
    wide = compiled(model(), stateful=True).manifest["engines"]
    for entry, other in zip(made.manifest["engines"], wide, strict=True):
        assert entry["precision"] == sorted(["float32", name]) and other["precision"] == ["float32"]
        assert not entry["has_step_loop"]
    for engine in made.report["engines"]:
        assert any(output.startswith(f"{kernel}[") for k in engine["kernels"] for output in k["outputs"])


def test_narrow_attention_is_one_kernel() -> None:
    """Its softmax in float32 is fused all the same."""

    class Heads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.unflatten(-1, (2, 64)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(q, q, q)

    made = seqc.compile(
        Heads(), (torch.randn(2, 9, 128),), target="tensorrt-rtx", options=["dtype=fp16", "sm=89", *RANGES]
    )
    assert any("_gemm_mha" in kernel["name"] for kernel in made.report["engines"][0]["kernels"])


def test_a_causal_mask_takes_no_memory() -> None:
    """Whether each step attends to anything is not asked where the mask is known: it would stand in memory for that."""

    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            places = torch.arange(x.shape[1])
            q = x.unflatten(-1, (1, 64)).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=places[:, None] >= places)

    longest, options = 8192, ["sm=89", "profile.batch=1", "profile.sequence=1,2048,8192"]
    known, asked = (
        seqc.compile(
            Masked(), (torch.randn(2, 9, 64),), target="tensorrt-rtx", options=options, passes=passes, check=False
        ).manifest["engines"][0]
        for passes in (None, ["-causal_masks"])
    )
    assert known["kernels"] < asked["kernels"]
    assert known["scratch_bytes"] <= asked["scratch_bytes"] - longest**2


def test_narrow_attention_of_grouped_queries_is_one_kernel() -> None:
    class Groups(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (p.transpose(1, 2) for p in x.unflatten(-1, (8, 32)).split([4, 2, 2], 2))
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    made = seqc.compile(
        Groups(), (torch.randn(2, 9, 256),), target="tensorrt-rtx", options=["dtype=fp16", "sm=89", *RANGES]
    )
    assert any("_gemm_mha" in kernel["name"] for kernel in made.report["engines"][0]["kernels"])


def test_only_the_onnx_is_written_where_engines_are_off() -> None:
    made = seqc.compile(nn.Linear(4, 4), (X,), target="tensorrt", options={"engines": "off"}, check=False)
    assert made.engines == {} and made.manifest["engines"] == []


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (
            Bits(),
            UnsupportedOpError,
            r"cannot parse BitwiseAnd \(.*\) at inner .*test_tensorrt_engines.py:\d+: .*& 3.*no such",
        ),
        (Wide(), UnsupportedOpError, r"Cast .* at inner .*x\.double\(\).*computes in float64, which becomes float32"),
        (Largest(), EngineError, r"near TopK \(.*torch\.topk.*maximum value allowed \(3840\).*try smaller ranges"),
    ],
)
def test_what_is_refused_is_named_with_its_line(model: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="(?s)" + message) as caught:
        compiled(Outer(model))
    assert "_src" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sm": "89,90"}, r"builds no engine for sm=90: it knows 75, 80, 86, 89, 120, 121"),
        ({"sm": "fast"}, "takes compute capabilities such as 89,120"),
        ({"profile.sequenc": "1,2,3"}, "names no dimension of the model; did you mean 'sequence'"),
        ({"profile.batch": "3,2,1"}, "takes MIN,OPT,MAX"),
        ({"profile.capacity": 9}, "names no dimension"),  # nothing grows in a model of whole sequences
        ({"workspace": "lots"}, "a size such as 2GiB"),
        ({"workspac": 1}, "did you mean 'workspace'"),
        ({"engines": "off", "sm": 89}, "'sm' is about engines, and none are built with engines=off"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_traced(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        seqc.compile(nn.Linear(4, 4), (X,), target="tensorrt-rtx", options=options, progress=_fail)


def _fail(stage: str, nodes: int, seconds: float) -> None:
    raise AssertionError(f"{stage} was reached")


def test_options_of_engines_are_refused_for_other_targets() -> None:
    with pytest.raises(UsageError, match="none are built for target 'onnx'"):
        seqc.compile(nn.Linear(4, 4), (X,), options={"sm": 89})


def test_a_loop_that_may_have_no_step_is_built() -> None:
    """In an ``If`` TensorRT builds none."""

    class Chunks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h, out = torch.zeros(x.shape[0], 4), []
            for i in range(0, x.shape[1], 4):
                h = torch.tanh(0.5 * h + x[:, i : i + 4].sum(1))
                out.append(h.unsqueeze(1) + x[:, i : i + 4])
            return torch.cat(out, 1)

    assert compiled(Chunks()).manifest["engines"][0]["has_step_loop"]


def test_a_triangular_solve_of_any_length_is_built() -> None:
    class Solves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.solve_triangular(x @ x.transpose(1, 2), x, upper=False, unitriangular=True)

    assert compiled(Solves()).manifest["engines"][0]["kernels"] > 0


@pytest.mark.parametrize("length", [1, 16])
def test_an_engine_can_be_for_one_row_and_one_length(length: int) -> None:
    only = ["sm=89", "profile.batch=1", f"profile.sequence={length}"]
    made = seqc.compile(Decays(), (X,), target="tensorrt-rtx", check=False, options=only)
    assert made.manifest["engines"][0]["profiles"] == [
        {"batch": {"min": 1, "opt": 1, "max": 1}, "sequence": {"min": length, "opt": length, "max": length}}
    ]


def test_a_range_is_inside_the_dimension_s_own() -> None:
    shapes = {"x": {0: "batch", 1: torch.export.Dim("sequence", max=16)}}
    with pytest.raises(UsageError, match=r"profile\.sequence is 1 to 32, but sequence goes from 1 to 16"):
        compiled(Decays(), dynamic_shapes=shapes)


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"seqc\[tensorrt\].*engines=off"):
        seqc.compile(nn.Linear(4, 4), (X,), target="tensorrt", progress=_fail)


def test_a_workspace_that_is_too_small_is_told() -> None:
    with pytest.raises(EngineError, match="leave it more room than workspace=1"):
        compiled(Decays(), "workspace=1B")


def _children() -> list[int]:
    return [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]


def test_a_process_that_dies_becomes_one_line() -> None:
    def abort(stage: str, nodes: int, seconds: float) -> None:
        if stage.endswith(": parse"):
            (child,) = _children()
            os.kill(child, signal.SIGABRT)

    with pytest.raises(EngineError, match=r"the process in which .* builds model.onnx was ended by SIGABRT"):
        compiled(Decays(), progress=abort)


def test_an_interrupt_ends_the_build_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[int] = []

    def interrupt(stage: str, nodes: int, seconds: float) -> None:
        if stage.endswith(": parse"):
            seen.extend(_children())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled(Decays(), progress=interrupt)
    assert len(seen) == 1 and not Path(f"/proc/{seen[0]}").exists()
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_builds_and_shows_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shapes = {"x": {0: torch.export.Dim("batch", max=4), 1: torch.export.Dim("seq", max=16)}}
    torch.export.save(torch.export.export(Outer(nn.Linear(4, 4)), (X,), dynamic_shapes=shapes), "model.pt2")
    assert run(["compile", "model.pt2", "-o", "made", "--target", "tensorrt-rtx", "--opt", "sm=89,120"]) == 0
    assert "model.engine  sm 89,120; " in capsys.readouterr().out
    assert run(["inspect", "made", "--engine"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("model.engine: sm 89,120; ") and "return self.inner(x) + 1" in shown
    assert run(["inspect", "made", "--engine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"][0]["file"] == "model.engine"
    assert run(["compile", "model.pt2", "-o", "plain", "--no-check"]) == 0
    capsys.readouterr()
    assert run(["inspect", "plain", "--engine"]) == 2
    assert "holds no engines: compile it with --target tensorrt-rtx" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../x"}, "not a path inside"),
        ({"sm": ["89"]}, "sm must be a list of integers"),
        ({"kernels": "3"}, "kernels must be an integer"),
        ({"has_step_loop": 1}, "has_step_loop must be a boolean"),
        ({"profiles": [{"batch": {"min": 1}}]}, "must give the min, opt and max"),
    ],
)
def test_an_entry_that_is_no_engine_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    from tests.helpers.artifacts import edit_manifest, write_small

    entry = {
        "file": "model.engine",
        "sm": [89],
        "profiles": [{"batch": {"min": 1, "opt": 1, "max": 2}}],
        "kernels": 3,
        "has_step_loop": False,
        "scratch_bytes": 1,
        "activation_bytes": 2,
        "weight_bytes": 3,
    }
    artifact = write_small(tmp_path / "small", engines=[entry])
    assert read(artifact).engines[0]["kernels"] == 3
    edit_manifest(artifact, lambda data: data["engines"][0].update(change))
    with pytest.raises(ArtifactError, match=message):
        read(artifact)
