"""Matrices in int8 and int4: exactly what the rounded weights compute, and how far that is from the source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqc
from seqc.backends.onnx.quantize import Stored, dequantized, quantize, stored_matrices
from seqc.cli.main import run
from seqc.compiler import Compiled
from seqc.errors import UsageError, VerificationError
from seqc.rounded_source import round_weights
from seqc.runtime import load

X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))


class Attends(nn.Module):
    """A product with a bias, attention, a product without; the keys and values of a stream grow."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 48, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))


class Mixes(nn.Module):
    """A loop, with a product in its body."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, steps = torch.zeros(x.shape[0], 32), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.mix(h)) + torch.sin(h) * x[:, t]
            steps.append(h)
        return torch.stack(steps, 1)


def compiled(model: nn.Module, bits: str, **told: Any) -> Compiled:
    torch.manual_seed(0)
    options = {"weights": bits, **told.pop("options", {})}
    return seqc.compile(model, (X,), options=options, **told)


def product(weight: np.ndarray[Any, Any], transposed: bool) -> ir.Model:
    """y = x w, or x w^T."""
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[B, 256] x) => (float[B, C] y) {'
        + ("t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }" if transposed else "y = MatMul(x, w) }")
    )
    loose = next(v for n in model.graph for v in n.inputs if v is not None and v.name == "w")
    value = ir.val("weight", const_value=ir.tensor(weight, name="weight"))
    model.graph.register_initializer(value)
    ir.convenience.replace_all_uses_with(loose, value)
    return model


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("bits", "largest", "size"), [("int8", 127, 256), ("int4", 7, 128)])
def test_weights_are_off_by_half_a_unit_of_their_block(bits: str, largest: int, size: int, transposed: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((256, 48)).astype(np.float32) * np.logspace(-3, 3, 48, dtype="f")
    weight[:, 3] = 0
    model = product(weight.T.copy() if transposed else weight, transposed)
    (found,) = [v.const_value.numpy() for v in dequantized(model, bits).graph.initializers.values()]  # type: ignore[union-attr]
    found = found.T if transposed else found
    blocks = np.abs(weight).reshape(256 // size, size, 48).max(1) / largest
    error = np.abs(found - weight).reshape(256 // size, size, 48).max(1)
    assert (error <= blocks * 0.5001).all() and (error[:, :3] > blocks[:, :3] * 0.3).all()
    assert (found[:, 3] == 0).all()
    made, told = quantize(model, bits)
    (node,) = [n for n in made.graph if n.op_type == "DequantizeLinear"]
    assert node.inputs[0].dtype is {"int8": ir.DataType.INT8, "int4": ir.DataType.INT4}[bits]  # type: ignore[union-attr]
    assert told.count == 1 and told.bytes_before == 256 * 48 * 4
    assert told.bytes_after == 256 * 48 * (1 if bits == "int8" else 0.5) + 4 * blocks.size
    assert "weight" in model.graph.initializers, "the model given stays as it was"


@pytest.mark.parametrize("model", [Attends, Mixes])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_it_computes_what_the_rounded_weights_do(model: type[nn.Module], bits: str) -> None:
    made = compiled(model(), bits)
    found = made.report["quantization"]
    assert found["check"]["ok"] and found["check"]["error"] < 1e-5
    assert made.report["check"]["ok"] and made.report["check"]["error"] < 1e-5  # the form in floats, with the source


def test_how_far_it_is_from_the_source_is_measured_and_told() -> None:
    drift = {bits: compiled(Attends(), bits).report["quantization"]["drift"] for bits in ("int8", "int4")}
    assert 1e-4 < drift["int8"] < 0.05 < drift["int4"] < 0.5
    made = compiled(Attends(), "int4")
    (note,) = [n for n in made.manifest["notes"] if "matrices are int4" in n]
    assert f"off from the source by up to {drift['int4']:.2g} of an output's scale, which is not limited" in note
    torch.manual_seed(0)
    model = Attends().eval()
    exact, found = model(X).detach(), made(X)
    assert 1e-3 < float((found - exact).abs().max() / exact.abs().max()) <= drift["int4"]


def test_a_form_that_computes_otherwise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(model: ir.Model, bits: str) -> ir.Model:
        result = dequantized(model, bits)
        for name, value in result.graph.initializers.items():
            if name.endswith(".dequantized"):
                assert value.const_value is not None
                value.const_value = ir.tensor(value.const_value.numpy() * np.float32(0.5), name=name)
        return result

    monkeypatch.setattr("seqc.quantized.dequantized", halved)
    with pytest.raises(VerificationError, match="differs from the source"):
        compiled(Attends(), "int8")


def test_a_stream_with_quantised_weights_agrees_with_the_whole(tmp_path: Path) -> None:
    plain = seqc.compile(Attends(), (X,), stateful=True, check=False).save(tmp_path / "plain")
    made = compiled(Attends(), "int4", stateful=True)
    session = load(made.save(tmp_path / "made"))
    whole, stream = session.run({"x": X.numpy()})["output"], session.stream(2)
    parts = [stream.step({"x": X[:, t : t + 1].numpy()})["output"] for t in range(9)]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-5)
    sizes = {p: sum(f.stat().st_size for f in p.glob("model.onnx*")) for p in (plain, tmp_path / "made")}
    assert sizes[tmp_path / "made"] < sizes[plain] - 10_000


def test_narrow_types_and_quantised_weights_go_together() -> None:
    made = compiled(Attends(), "int8", options={"dtype": "fp16"})
    assert made.report["quantization"]["check"]["ok"]
    scales = [v.dtype for n, v in made.model.graph.initializers.items() if n.endswith(".scale")]
    assert scales == [ir.DataType.FLOAT16] * 2


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.odd = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.narrow = nn.Linear(20, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x)
        return self.up(h + self.narrow(h[..., :20])) @ self.table.weight.T + self.odd(h).sum(-1, keepdim=True)


def test_what_stays_is_told_with_the_reason() -> None:
    torch.manual_seed(0)
    made = seqc.compile(Tied(), (torch.randint(0, 40, (2, 9)),), options={"weights": "int4"})
    stayed = made.report["quantization"]["stayed"]
    assert stayed["odd.weight"] == "has 8 x 32 numbers only"
    assert stayed["narrow.weight"] == "sums over 20, which is no multiple of 16"
    assert "Gather" in stayed["table.weight"] and set(stayed) == {"odd.weight", "narrow.weight", "table.weight"}
    assert made.report["quantization"]["matrices"] == 1


class Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.each = nn.Conv1d(32, 48, 3), nn.Conv1d(48, 48, 4, groups=48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.wide(F.pad(x.transpose(1, 2), (2, 0))))
        return self.each(F.pad(y, (3, 0))).transpose(1, 2)


def test_kernels_of_convolutions_have_a_scale_for_each_output_channel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = Convolves()
    made = compiled(model, "int8")
    found = made.report["quantization"]
    assert found["matrices"] == 1 and found["check"]["ok"] and 1e-5 < found["drift"] < 0.05
    assert any(reason == "has 4 numbers for an output channel only" for reason in found["stayed"].values())
    (kernel,) = stored_matrices(made.model)
    weight = model.wide.weight.detach().numpy()
    unit = np.abs(weight).reshape(48, -1).max(1)[:, None, None] / 127
    assert kernel.values.shape == weight.shape and (np.abs(kernel.values - weight) <= unit * 0.5001).all()
    assert found["bytes_after"] == weight.size + 4 * 48
    art = str(made.save(tmp_path / "made"))
    assert run(["verify", art, "--against", saved(model, tmp_path / "model.pt2")]) == 0
    assert "the source with its 1 matrices rounded as in the artifact" in capsys.readouterr().out
    with pytest.raises(UsageError, match="is the kernel of a convolution, for which there is int8 only"):
        compiled(model, "int4")


def test_a_model_without_matrices_is_refused() -> None:
    with pytest.raises(UsageError, match=r"weights=int8 is about matrices.*and there are none; weight has 4 x 32 num"):
        compiled(nn.Linear(32, 4), "int8")


def test_int4_takes_the_opset_that_has_it() -> None:
    assert compiled(nn.Linear(32, 32), "int4").manifest["opset"] == 21
    assert compiled(nn.Linear(32, 32), "int8").manifest["opset"] == 20
    with pytest.raises(UsageError, match="weights=int4 needs opset 21, not 20"):
        compiled(nn.Linear(32, 32), "int4", opset=20)


def test_engines_take_small_kernels_of_convolutions() -> None:
    options = {"sm": 89, "profile.sequence": (1, 9, 32), "profile.batch": (1, 2, 4)}
    made = compiled(Convolves(), "int8", target="tensorrt-rtx", options=options)
    assert made.manifest["engines"][0]["kernels"] > 0 and made.report["quantization"]["matrices"] == 1


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_engines_keep_the_weights_small(bits: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 512), nn.SiLU(), nn.Linear(512, 128))
    options = {"sm": 89, "profile.sequence": (1, 9, 32), "profile.batch": (1, 2, 4), "dtype": "fp16"}
    x = torch.randn(2, 9, 128)
    plain, made = (
        seqc.compile(model, (x,), target="tensorrt-rtx", options={**options, "weights": weights})
        for weights in ("float", bits)
    )
    before, after = (m.manifest["engines"][0]["weight_bytes"] for m in (plain, made))
    assert after < before * (0.6 if bits == "int8" else 0.4)
    assert made.report["quantization"]["check"]["ok"]


def test_the_command_line_tells_the_drift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.export.save(torch.export.export(nn.Linear(32, 32), (X,)), tmp_path / "model.pt2")
    command = ["compile", str(tmp_path / "model.pt2"), "-o", str(tmp_path / "made"), "--opt", "weights=int4"]
    assert run(command) == 0
    assert "note: 1 matrices are int4" in capsys.readouterr().out


def saved(model: nn.Module, path: Path) -> str:
    torch.export.save(torch.export.export(model, (X,)), path)
    return str(path)


@pytest.mark.parametrize(("bits", "dtype"), [("int8", "auto"), ("int4", "auto"), ("int8", "fp16")])
def test_verify_compares_with_the_source_that_has_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: str, dtype: str
) -> None:
    torch.manual_seed(0)
    model, art = Attends(), str(tmp_path / "made")
    source = saved(model, tmp_path / "model.pt2")
    assert run(["compile", source, "-o", art, "--opt", f"weights={bits}", "--opt", f"dtype={dtype}"]) == 0
    capsys.readouterr()
    assert run(["verify", art, "--against", source]) == 0
    out = capsys.readouterr().out
    drift = load(art).manifest.quantization
    assert drift is not None and drift.weights == bits and drift.drift is not None
    assert "compared with the source with its 2 matrices rounded as in the artifact" in out
    assert f"when it was compiled: up to {drift.drift:.2g} of an output's scale" in out
    if dtype == "auto":
        assert run(["verify", art, "--against", source, "--tolerance", "1e-4"]) == 1  # the source as it is
        assert "differs from the source" in capsys.readouterr().err
    with torch.no_grad():
        model.out.weight[3, 4] += 0.5
    assert run(["verify", art, "--against", saved(model, tmp_path / "other.pt2")]) == 1
    assert "out.weight is not the source's, rounded: it is off by" in capsys.readouterr().err


def test_verify_sees_another_computation_with_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other(Attends):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.01

    model, other = Attends(), Other()
    other.load_state_dict(model.state_dict())
    art = str(compiled(model, "int8").save(tmp_path / "made"))
    assert run(["verify", art, "--against", saved(other, tmp_path / "other.pt2")]) == 1
    assert "differs from the source" in capsys.readouterr().err


class Doubles(nn.Module):
    """Its matrix is computed at compile time: the source has none like it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ torch.sinh(self.weight)


def test_verify_of_matrices_that_the_source_has_not_takes_the_drift(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = Doubles()
    art = str(compiled(model, "int4").save(tmp_path / "made"))
    source = saved(model, tmp_path / "model.pt2")
    assert run(["verify", art, "--against", source]) == 0
    out = capsys.readouterr().out
    assert "the source as it is (weight.sinh is computed of the model's weights), within 2 times what it was off" in out
    unchecked = str(compiled(model, "int4", check=False).save(tmp_path / "unchecked"))
    assert run(["verify", unchecked, "--against", source]) == 2
    assert "compiled without a check: say the --tolerance" in capsys.readouterr().err


def test_weights_that_are_also_read_as_they_were_cannot_be_rounded() -> None:
    model = nn.Linear(4, 4, bias=False)
    before = model.weight.detach().clone()
    matrix = Stored("weight", np.round(before.numpy()), np.ones((4, 4), np.float32))
    assert round_weights(model, [matrix], ["weight.to_copy"]) == "weight is also read as it was"
    assert torch.equal(model.weight, before)
    assert round_weights(model, [matrix], ["bias"]) == "" and torch.equal(model.weight, before.round())
