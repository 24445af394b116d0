"""Narrow: products and what is elementwise between them in float16 or bfloat16, the rest in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqc
from seqc.cli.main import run
from seqc.errors import ArtifactError, UnsupportedModelError, UsageError
from seqc.passes import DEFAULT, Narrow
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.runtime import load
from seqc.text import text
from seqc.verify import verify
from tests.backends.test_tensorrt_engines import Attends, MambaLike, Nonlinear
from tests.helpers.modules import Applied

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
X = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
aten = torch.ops.aten


def narrowed(model: nn.Module, dtype: torch.dtype = HALF, x: torch.Tensor = X, passes: Any = ()) -> Program:
    program = seqc.trace(model.eval(), (x,))
    run_passes(program, [*passes, Narrow(dtype)])
    verify(program)
    return program


def types(program: Program, target: Any) -> set[torch.dtype]:
    """What the calls of ``target`` read and give."""
    calls = [n for n in program.graph.nodes if n.target is target]
    assert calls
    values = [n.meta["val"] for c in calls for n in (c, *c.all_input_nodes)]
    return {v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(a * F.silu(b))


BEFORE = """\
weight @norm.weight: f32[4]
weight @norm.bias: f32[4]
weight @up.weight: f32[8, 4]
weight @up.bias: f32[8]
weight @down.weight: f32[4, 4]
weight @down.bias: f32[4]
input %x: f32[batch, sequence, 4]
%0: f32[batch, sequence, 4] = aten.layer_norm(%x, [4], @norm.weight, @norm.bias, 1e-05, False)
%1: f32[batch, sequence, 8] = aten.linear(%0, @up.weight, @up.bias)
%2: (f32[batch, sequence, 4], f32[batch, sequence, 4]) = aten.split.Tensor(%1, 4, -1)
%3: f32[batch, sequence, 4] = %2[0]
%4: f32[batch, sequence, 4] = %2[1]
%5: f32[batch, sequence, 4] = aten.silu(%4)
%6: f32[batch, sequence, 4] = aten.mul.Tensor(%3, %5)
%7: f32[batch, sequence, 4] = aten.linear(%6, @down.weight, @down.bias)
%8: f32[batch, sequence, 4] = aten.add.Tensor(%x, %7)
output output = %8
"""

AFTER = """\
weight @norm.weight: f32[4]
weight @norm.bias: f32[4]
weight @up.weight: f32[8, 4]
weight @up.bias: f32[8]
weight @down.weight: f32[4, 4]
weight @down.bias: f32[4]
input %x: f32[batch, sequence, 4]
%0: f16[batch, sequence, 4] = aten._to_copy(%x, dtype=f16)
%1: f16[4] = aten._to_copy(@down.bias, dtype=f16)
%2: f16[4, 4] = aten._to_copy(@down.weight, dtype=f16)
%3: f16[8] = aten._to_copy(@up.bias, dtype=f16)
%4: f16[8, 4] = aten._to_copy(@up.weight, dtype=f16)
%5: f32[batch, sequence, 4] = aten.layer_norm(%x, [4], @norm.weight, @norm.bias, 1e-05, False)
%6: f16[batch, sequence, 4] = aten._to_copy(%5, dtype=f16)
%7: f16[batch, sequence, 8] = aten.linear(%6, %4, %3)
%8: (f16[batch, sequence, 4], f16[batch, sequence, 4]) = aten.split.Tensor(%7, 4, -1)
%9: f16[batch, sequence, 4] = %8[0]
%10: f16[batch, sequence, 4] = %8[1]
%11: f16[batch, sequence, 4] = aten.silu(%10)
%12: f16[batch, sequence, 4] = aten.mul.Tensor(%9, %11)
%13: f16[batch, sequence, 4] = aten.linear(%12, %2, %1)
%14: f16[batch, sequence, 4] = aten.add.Tensor(%0, %13)
%15: f32[batch, sequence, 4] = aten._to_copy(%14, dtype=f32)
output output = %15
"""


def plain(program: Program) -> str:
    return "\n".join(line.split("  #")[0] for line in text(program).splitlines()) + "\n"


def test_a_gated_layer_before_and_after() -> None:
    program = seqc.trace(Gated().eval(), (X,))
    assert plain(program) == BEFORE
    run_passes(program, [Narrow(HALF)])
    assert plain(program) == AFTER
    assert program.outputs[0].dtype is FULL
    (reason,) = program.reasons
    assert reason == "8 of 9 floating-point values are computed in float16, the others in float32"


def test_the_program_computes_what_it_did_but_for_rounding() -> None:
    torch.manual_seed(0)
    model = Gated().eval()
    exact = model(X).detach()
    for dtype in (HALF, BF16):
        (found,) = narrowed(model, dtype)(X)
        error = float((found - exact).abs().max() / exact.abs().max())
        assert 0 < error < 8 * torch.finfo(dtype).eps, error


@pytest.mark.parametrize(
    ("function", "target"),
    [
        (lambda x: torch.softmax(x @ x.transpose(1, 2), -1) @ x, aten.softmax.int),
        (lambda x: (x @ x.transpose(1, 2)).exp().sum(-1), aten.exp.default),
        (lambda x: F.layer_norm(x @ x.transpose(1, 2) @ x, (4,)), aten.layer_norm.default),
        (lambda x: (x @ x.transpose(1, 2)).mean(-1), aten.mean.dim),
        (lambda x: (x @ x.transpose(1, 2)).cumsum(1), aten.cumsum.default),
        (lambda x: F.softplus(x @ x.transpose(1, 2)), aten.softplus.default),
        (lambda x: (x @ x.transpose(1, 2)).masked_fill(x[:, :, :1] > 0, -1e9), aten.masked_fill.Scalar),
        (lambda x: x / (x.abs().amax(-1, keepdim=True) + 1e-8), aten.add.Tensor),
        (lambda x: x * torch.cos(torch.arange(x.shape[1])[:, None] * 0.001), aten.cos.default),
        (lambda x: (x @ x.transpose(1, 2)).float().double().sum(1).float(), aten.sum.dim_IntList),
    ],
)
def test_what_needs_float32_stays_in_it(function: Callable[[torch.Tensor], torch.Tensor], target: Any) -> None:
    found = types(narrowed(Applied(function)), target)
    assert HALF not in found and found


def test_decays_and_steps_of_a_scan_stay_in_float32() -> None:
    class Decayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            decay, h, steps = torch.sigmoid(self.gate(x)), torch.zeros(x.shape[0], 4), []
            for t in range(x.shape[1]):
                h = decay[:, t] * h + x[:, t]
                steps.append(h)
            return torch.stack(steps, 1)

    program = narrowed(Decayed(), passes=DEFAULT)
    assert types(program, aten.sigmoid.default) == {FULL} and types(program, aten.linear.default) == {HALF}
    assert types(program, torch.ops.seqc.linear_scan.default) == {FULL}
    assert types(narrowed(Applied(lambda x: torch.sigmoid(x @ x.transpose(1, 2)) @ x)), aten.sigmoid.default) == {HALF}


def test_a_mask_of_numbers_stays_in_float32_where_attention_is_narrow() -> None:
    mask = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1) > 0, torch.finfo(FULL).min)

    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    made = seqc.compile(Masked(), (X,), dynamic_shapes={"x": {0: "batch"}}, options={"dtype": "fp16"})
    assert made.report["check"]["ok"]
    (node,) = [n for n in made.program.graph.nodes if n.target is aten.scaled_dot_product_attention.default]
    assert [a.meta["val"].dtype for a in node.args[:4]] == [HALF, HALF, HALF, FULL]


def test_weights_that_float16_cannot_hold_are_refused() -> None:
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, 1e6)
    with pytest.raises(UnsupportedModelError, match=r"weight weight holds numbers that are infinite in torch.float16"):
        narrowed(model)
    assert types(narrowed(model, BF16), aten.linear.default) == {BF16}


def test_a_half_model_is_computed_in_float32_where_that_is_asked() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU()).half()
    made = seqc.compile(model, (X.half(),), options={"dtype": "fp32"})
    assert {n.meta["val"].dtype for n in made.program.graph.nodes if n.target is aten.linear.default} == {FULL}
    assert made.manifest["outputs"][0]["dtype"] == made.manifest["inputs"][0]["dtype"] == "float16"


def test_a_float32_model_stays_where_float32_is_asked() -> None:
    program = seqc.trace(Gated().eval(), (X,))
    before = text(program)
    (record,) = run_passes(program, [Narrow(FULL)])
    assert record.changes == 0 and text(program) == before and record.reasons == ()


@pytest.mark.parametrize("model", [MambaLike, Attends, Nonlinear])
def test_narrow_streams_agree_with_the_source(model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    made = seqc.compile(model(), (X,), stateful=True, options={"dtype": "fp16"})
    assert made.report["check"]["ok"] and made.report["check_in_chunks"]["ok"]
    assert made.manifest["tolerances"] == {"output": 2.0**-8}
    kept = {s["name"]: (s["dtype"], s["grows"] is not None) for s in made.manifest["states"]}
    expected = {grows: "float16" if grows else "float32" for grows in (False, True)}
    assert all(dtype == expected[grows] for dtype, grows in kept.values() if dtype != "int64") and kept
    narrow = any(v.dtype is ir.DataType.FLOAT16 for n in made.model.graph.all_nodes() for v in n.outputs)
    assert narrow == (model is not Nonlinear)  # all of it is its recurrence


def test_a_step_is_computed_as_in_the_loop() -> None:
    """The form for one step has no loop, and its products are those of the recurrence all the same."""
    torch.manual_seed(0)
    made = seqc.compile(Nonlinear(), (X,), stateful=True, options={"dtype": "fp16"}, check=False)
    assert made.step_model is not None
    for node in made.step_model.graph.all_nodes():
        assert all(v.dtype is not ir.DataType.FLOAT16 for v in node.outputs)
    assert made.report["check"] is None


def test_the_softmax_of_narrow_attention_is_float32_in_onnx() -> None:
    made = seqc.compile(Attends().half(), (X.half(),))
    (node,) = [n for n in made.model.graph if n.op_type == "Softmax"]
    assert node.outputs[0].dtype is ir.DataType.FLOAT
    assert np.dtype(made.manifest["outputs"][0]["dtype"]) == np.float16


def test_bfloat16_is_refused_where_nothing_runs_it() -> None:
    with pytest.raises(UsageError, match="target 'onnx' has no kernels for bfloat16: take float16, or target tensorrt"):
        seqc.compile(nn.Linear(4, 4), (X,), options={"dtype": "bf16"})


def test_bfloat16_is_checked_in_pytorch_and_in_float32_in_onnxruntime() -> None:
    torch.manual_seed(0)
    options = {"dtype": "bf16", "engines": "off"}
    made = seqc.compile(MambaLike(), (X,), stateful=True, target="tensorrt-rtx", options=options)
    assert all(made.report[key]["ok"] for key in ("check", "check_in_bfloat16", "check_in_chunks"))
    assert 1e-4 < made.report["check_in_bfloat16"]["error"] <= 2.0**-5
    assert any("what was checked is the Program in PyTorch" in note for note in made.manifest["notes"])
    assert any(v.dtype is ir.DataType.BFLOAT16 for n in made.model.graph for v in n.outputs)  # itself it stays
    assert {s["dtype"] for s in made.manifest["states"]} == {"float32"}


def test_loading_bfloat16_in_onnxruntime_says_what_it_is_for(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"dtype": "bf16", "engines": "off"}
    art = seqc.compile(Gated().eval(), (X,), target="tensorrt-rtx", options=options).save(tmp_path / "made")
    assert run(["run", str(art), "--random", "sequence=9"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "onnxruntime here has no MatMul in bfloat16, in which" in line
    assert "that is for engines: run them on a GPU (--provider tensorrt-rtx, or tensorrt), or compile with" in line
    with pytest.raises(ArtifactError, match="onnxruntime with CPUExecutionProvider has no MatMul in bfloat16"):
        load(art, providers=["CPUExecutionProvider"])


def test_a_wrong_type_is_refused() -> None:
    with pytest.raises(UsageError, match="option 'dtype' takes fp32, fp16 or bf16, or auto, not 'fp8'"):
        seqc.compile(nn.Linear(4, 4), (X,), options={"dtype": "fp8"})


def test_the_command_line_takes_a_type(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.export.save(torch.export.export(Gated().eval(), (X,)), tmp_path / "model.pt2")
    command = ["compile", str(tmp_path / "model.pt2"), "-o", str(tmp_path / "made"), "--dtype", "fp16"]
    assert run(command) == 0
    found = [n for n in ir.load(tmp_path / "made" / "model.onnx").graph if n.op_type in ("MatMul", "Gemm")]
    assert found and all(n.inputs[1].dtype is ir.DataType.FLOAT16 for n in found)
    capsys.readouterr()
    assert run([*command, "--opt", "dtype=bf16"]) == 2
    assert "given twice" in capsys.readouterr().err
