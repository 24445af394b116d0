"""What the target ort-cuda takes. There is no GPU here: the operators run on the CPU provider, nothing is measured."""

from __future__ import annotations

import pytest

import seqc
from seqc.backends.onnx import export
from seqc.cli import main
from seqc.lowerings.lower import Lower
from seqc.ops.recurrence import is_recurrence
from seqc.pipeline import run_passes
from seqc.target import TARGETS
from tests.backends.test_causal_conv import Convolves
from tests.backends.test_causal_conv import inputs as conv_inputs
from tests.backends.test_lowerings import CASES, Calls, lowered
from tests.helpers.onnx import assert_same, run, session


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("linear_scan plain", "prefix"),
        ("selective_scan plain", "prefix"),
        ("linear_attention gated plain", "contrib"),
        ("linear_attention gated_delta extreme per key", "contrib"),
    ],
)
def test_forms_without_loops_come_first_and_are_said_not_to_be_measured(name: str, form: str) -> None:
    program, (reason,) = lowered(name, "ort-cuda", "auto")
    assert f" as {form}: " in reason and "not measured on 'ort-cuda'" in reason
    assert not any(is_recurrence(node) for node in program.graph.nodes)


def test_measured_targets_do_not_say_so() -> None:
    for target in ("onnx", "ort-cpu"):
        _, (reason,) = lowered("linear_scan plain", target, "auto")
        assert "not measured" not in reason


@pytest.mark.parametrize(("dilation", "form"), [(1, "contrib"), (2, "conv")])
def test_a_convolution_takes_the_fused_operator_where_its_gpu_kernel_is_known_to(dilation: int, form: str) -> None:
    model = Convolves(3, dilation, True, slice(0, 1))
    program = seqc.trace(model, conv_inputs(model, 9, False), [{0: "batch", 2: "sequence"}])
    (record,) = run_passes(program, [Lower(TARGETS["ort-cuda"])])
    assert f"causal_conv as {form}: " in record.reasons[0]
    assert ("that kernels for GPUs take a dilation is not known" in record.reasons[0]) == (dilation == 2)
    given = conv_inputs(model, 17, False)
    assert_same(run(session(export(program)), given), model(*given), 1e-6)


def test_a_model_is_compiled_and_checked_where_its_operators_exist() -> None:
    _, function, make, _ = CASES["linear_attention gated_delta plain"]
    sequence, state = {0: "sequence"}, {}
    shapes = [sequence, sequence, sequence, state, sequence, sequence]
    compiled = seqc.compile(Calls(function), make(5), dynamic_shapes=shapes, target="ort-cuda")
    assert compiled.report["check"]["ok"] and compiled.manifest["target"] == "ort-cuda"
    assert {node.domain for node in compiled.model.graph} == {"", "com.microsoft"}
    assert any("not measured" in r for p in compiled.report["passes"] if p["name"] == "lower" for r in p["reasons"])


def test_the_target_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["targets"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ort-cuda")]
    assert "opset 18 to 26" in line and "not measured yet" in line
