"""What real models' loops become, end to end: compiled, checked, run, and said in words."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import seqc
from seqc.cli.main import run
from seqc.memory import nbytes, node_bytes
from tests.models.measure import became, example
from tests.models.onnx_count import op_counts
from tests.models.zoo import ALL


@pytest.mark.parametrize("name", ["deltanet", "linear_attention"])
def test_a_target_with_its_own_operators_gets_its_fastest_form(name: str, tmp_path: Path) -> None:
    zoo = ALL[name]
    compiled = seqc.compile(zoo.build(), example(zoo), dynamic_shapes=zoo.dynamic_shapes, target="ort-cpu")
    assert compiled.report["check"]["ok"]
    (record,) = [r for r in compiled.report["passes"] if r["name"] == "lower"]
    assert any("linear_attention as contrib: " in reason for reason in record["reasons"])
    compiled.save(tmp_path / "artifact")
    domains = {node.domain for node in onnx.load(tmp_path / "artifact" / "model.onnx").graph.node}
    assert "com.microsoft" in domains


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("lssl", "lti_scan as prefix: "),
        ("s5_resets", "recurrence as blocked: affine, "),
        ("liquid_s4", "recurrence as blocked: affine, "),
    ],
)
def test_affine_loops_become_none_where_a_target_avoids_them(name: str, form: str, tmp_path: Path) -> None:
    zoo = ALL[name]
    compiled = seqc.compile(
        zoo.build(), example(zoo), dynamic_shapes=zoo.dynamic_shapes, target="tensorrt", options={"engines": "off"}
    )
    assert compiled.report["check"]["ok"]
    (record,) = [r for r in compiled.report["passes"] if r["name"] == "lower"]
    assert any(form in reason for reason in record["reasons"])
    compiled.save(tmp_path / "artifact")
    counts = op_counts(tmp_path / "artifact" / "model.onnx")
    assert counts["Scan"] == counts["Loop"] == 0


def test_a_convolution_can_be_the_target_s_own_operator(tmp_path: Path) -> None:
    zoo, options = ALL["lfm2"], {"lowering.causal_conv": "contrib"}
    compiled = seqc.compile(
        zoo.build(), example(zoo), dynamic_shapes=zoo.dynamic_shapes, target="ort-cpu", options=options
    )
    assert compiled.report["check"]["ok"]
    (record,) = [r for r in compiled.report["passes"] if r["name"] == "causal_conv"]
    assert record["changes"] == 1 and "3 taps" in record["reasons"][0]
    compiled.save(tmp_path / "artifact")
    nodes = onnx.load(tmp_path / "artifact" / "model.onnx").graph.node
    assert [node.op_type for node in nodes if node.domain == "com.microsoft"] == ["CausalConvWithState"]


def test_inspect_says_layer_by_layer_what_was_recognised_and_what_it_became(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = ALL["mamba"]
    compiled = seqc.compile(zoo.build(), example(zoo), dynamic_shapes=zoo.dynamic_shapes, check=False)
    compiled.save(tmp_path / "artifact")
    assert run(["inspect", str(tmp_path / "artifact")]) == 0
    shown = capsys.readouterr().out
    for layer in range(2):
        lines = [line for line in shown.splitlines() if f"layers.{layer}.mixer" in line]
        assert any("is a selective_scan" in line and "confirmed in float64" in line for line in lines)
        assert any("selective_scan as channels_last" in line for line in lines)
        assert any("is a causal_conv (4 taps" in line for line in lines)
        assert any("causal_conv as conv" in line for line in lines)
    (memory,) = [line for line in shown.splitlines() if "peak activations" in line]
    assert "batch=1, sequence=2048" in memory and "before the passes" in memory
    # transformers discretises all steps in front of the loop; of [batch, length, channels, states] nothing must be left.
    (rates, _) = [t for name, t in compiled.program.weights.items() if "a_log" in name]
    states = nbytes((1024, 1024, *rates.shape), torch.float32)
    sizes = [node_bytes([n]) for n in compiled.program.graph.nodes if n.op == "call_function"]
    assert max(sizes) < states


def test_two_heads_of_retention_with_constants_made_in_the_loop() -> None:
    """Constants that each step makes anew are one constant; their logarithm is taken because they are positive."""

    class Retention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            s, out = torch.zeros(x.shape[0], 2, 8, 8), []
            for t in range(x.shape[1]):
                q = x[:, t].view(-1, 2, 8)
                s = s * torch.tensor([0.9, 0.97]).view(1, 2, 1, 1) + q.unsqueeze(-1) * q.unsqueeze(-2)
                out.append(torch.einsum("bhkv,bhk->bhv", s, q))
            return torch.stack(out, 1)

    compiled = seqc.compile(Retention(), (torch.randn(2, 9, 16),))
    assert became(compiled.report) == "linear_attention"
