"""The operators LinearAttention and CausalConvWithState of ONNX 27: in ONNX Runtime, in ONNX's evaluator, and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import seqc
import seqc.runtime
from seqc.backends.onnx import export
from seqc.errors import UnsupportedOpError
from seqc.lowerings.lower import Lower
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.target import TARGETS
from tests.backends.test_causal_conv import Convolves
from tests.backends.test_causal_conv import inputs as conv_inputs
from tests.backends.test_lowerings import CASES, Calls
from tests.helpers.onnx import assert_same, checked, run, session

ATTENTION = [name for name, case in CASES.items() if case[0] == "linear_attention" and not case[3]]


def lowered(program: Program, op: str, opset: int = 27, form: str = "standard") -> str:
    (record,) = run_passes(program, [Lower(TARGETS["onnx"], {op: form}, opset)])
    return record.reasons[0]


@pytest.mark.parametrize("name", ATTENTION)
def test_linear_attention_equals_the_reference_in_onnx_runtime_and_in_onnx_s_evaluator(name: str) -> None:
    op, function, make, _ = CASES[name]
    program = seqc.trace(Calls(function), make(5), [{0: "sequence"}] * 3 + [{}] + [{0: "sequence"}] * 2)
    assert "linear_attention as standard: the operator LinearAttention of ONNX 27" in lowered(program, op)
    model = export(program, 27)
    compiled, evaluator = session(model), ReferenceEvaluator(checked(model))
    for length in (1, 2, 17):
        torch.manual_seed(length)
        given = make(length)
        expected = [x.float() for x in function(*(x.double() for x in given))]
        assert_same(run(compiled, given), expected, 2e-5)
        feeds = {i.name: x.numpy() for i, x in zip(compiled.get_inputs(), given, strict=True)}
        assert_same(evaluator.run(None, feeds), expected, 2e-5)


@pytest.mark.parametrize("stateful", [False, True])
def test_causal_convolutions_equal_the_reference(stateful: bool) -> None:
    model = Convolves(4, 1, True, slice(None))
    program = seqc.trace(
        model, conv_inputs(model, 9, stateful), [{0: "batch", 2: "sequence"}, {0: "batch"}][: 1 + stateful]
    )
    assert "causal_conv as standard" in lowered(program, "causal_conv")
    exported = export(program, 27)
    compiled, evaluator = session(exported), ReferenceEvaluator(checked(exported))
    for length in (1, 2, 17):
        given = conv_inputs(model, length, stateful)
        expected = model(*given)
        assert_same(run(compiled, given), expected, 1e-6)
        feeds = {i.name: x.numpy() for i, x in zip(compiled.get_inputs(), given, strict=True)}
        assert_same(evaluator.run(None, feeds), expected, 1e-6)


def test_the_operators_are_refused_below_their_opset_and_for_what_they_do_not_take() -> None:
    dilated = Convolves(3, 2, True, slice(None))
    program = seqc.trace(dilated, conv_inputs(dilated, 9, False), [{2: "sequence"}])
    with pytest.raises(UnsupportedOpError, match="standard: the operator of ONNX 27 has no dilation"):
        lowered(program, "causal_conv")
    op, function, make, _ = CASES["linear_attention gated plain"]
    for dtype, opset, why in (
        (torch.float32, 26, "needs opset 27, not 26"),
        (torch.float64, 27, "not take torch.float64"),
    ):
        given = tuple(x.to(dtype) for x in make(5))
        program = seqc.trace(Calls(function), given, [{0: "sequence"}] * 3 + [{}] + [{0: "sequence"}] * 2)
        with pytest.raises(UnsupportedOpError, match=why):
            lowered(program, op, opset)


def test_a_model_is_compiled_at_27_checked_loaded_and_told_about(tmp_path: Path) -> None:
    _, function, make, _ = CASES["linear_attention gated_delta plain"]
    shapes = [{0: "sequence"}] * 3 + [{}] + [{0: "sequence"}] * 2
    compiled = seqc.compile(Calls(function), make(5), dynamic_shapes=shapes, opset=27)
    assert compiled.report["check"]["ok"]
    directory = compiled.save(tmp_path / "artifact")
    model = onnx.load(directory / "model.onnx")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 27)]
    assert [n.op_type for n in model.graph.node].count("LinearAttention") == 1
    notes = json.loads((directory / "manifest.json").read_text())["notes"]
    assert any("refuses opset 27 unless ALLOW_RELEASED_ONNX_OPSET_ONLY=0" in note for note in notes)
    assert "ALLOW_RELEASED_ONNX_OPSET_ONLY" not in os.environ
    with pytest.raises(Exception, match="Opset 27 is under development"):
        onnxruntime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
    seqc.runtime.load(directory)
