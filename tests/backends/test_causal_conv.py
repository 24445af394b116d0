"""Every form of ``seqc::causal_conv`` in ONNX Runtime: lengths below the kernel, states, dilation, single steps."""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import seqc
import seqc.ops
from seqc.backends.onnx import export
from seqc.backends.onnx.left_padded_conv import FEW_STEPS, MANY_TAPS, WIDE
from seqc.lowerings import FORMS
from seqc.lowerings.lower import Lower
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.target import TARGETS
from tests.helpers.onnx import assert_same, checked, run, session

LENGTHS = (1, 2, 3, 4, 5, 15, 16, 17, 257, 4096)
B, D = 2, 6


class Convolves(nn.Module):
    """Calls the op, with weights of its own; only the final state is returned where ``outputs`` says so."""

    def __init__(self, taps: int, dilation: int, bias: bool, outputs: slice) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, 1, taps))
        self.bias = nn.Parameter(torch.randn(D)) if bias else None
        self.dilation, self.outputs = dilation, outputs

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        found = torch.ops.seqc.causal_conv(x, self.weight, self.bias, state, self.dilation)
        return tuple(found)[self.outputs]


def inputs(model: Convolves, length: int, stateful: bool) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(length)
    steps = (model.weight.shape[2] - 1) * model.dilation
    return (torch.randn(B, D, length), *([torch.randn(B, D, steps)] if stateful else []))


def lowered(model: Convolves, form: str, stateful: bool, fixed: int | None = None) -> Program:
    axes = {0: "batch"} if fixed else {0: "batch", 2: "sequence"}
    program = seqc.trace(model, inputs(model, fixed or 9, stateful), [axes, {0: "batch"}][: 1 + stateful])
    (record,) = run_passes(program, [Lower(TARGETS["ort-cpu"], {"causal_conv": form})])
    assert f"causal_conv as {form}: " in record.reasons[0]
    return program


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


@pytest.mark.parametrize("form", [f for f in FORMS["causal_conv"] if f != "standard"])  # tested in test_standard_scans
@pytest.mark.parametrize(("taps", "dilation", "stateful"), itertools.product((2, 3, 4), (1, 2), (False, True)))
def test_every_form_equals_the_reference(form: str, taps: int, dilation: int, stateful: bool) -> None:
    for bias in (False, True):
        model = Convolves(taps, dilation, bias, slice(None))
        compiled = session(export(lowered(model, form, stateful)))
        for length in LENGTHS:
            given = inputs(model, length, stateful)
            expected = model.double()(*(x.double() for x in given))
            assert_same(run(compiled, given), [x.float() for x in expected], 1e-6)
            model.float()


@pytest.mark.parametrize("fixed", [1, 5])
def test_a_length_that_is_known_needs_no_branch(fixed: int) -> None:
    for stateful in (False, True):
        model = Convolves(4, 1, True, slice(0, 1))
        exported = export(lowered(model, "conv", stateful, fixed))
        given = inputs(model, fixed, stateful)
        assert_same(run(session(exported), given), model(*given), 1e-6)
        assert "If" not in operators(exported) and ("Conv" in operators(exported)) == (fixed != 1)


def test_the_padding_is_the_convolution_s_own() -> None:
    exported = export(lowered(Convolves(4, 1, True, slice(0, 1)), "conv", False))
    (conv,) = [n for n in exported.graph.all_nodes() if n.op_type == "Conv"]
    assert list(conv.attributes["pads"].as_ints()) == [3, 0]
    assert not {"Pad", "Concat", "Slice"} & set(operators(exported))
    checked(exported)


class Wide(nn.Module):
    def __init__(self, channels: int, taps: int, stateful: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(channels, 1, taps)), nn.Parameter(torch.randn(channels))
        self.stateful = stateful

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = torch.ops.seqc.causal_conv(x, self.weight, self.bias, state if self.stateful else None, 1)
        return (found[0],)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize(("channels", "taps"), [(WIDE, 4), (16, MANY_TAPS)])
def test_weights_are_laid_out_by_the_runtime(channels: int, taps: int, stateful: bool, tmp_path: Path) -> None:
    """Over an image of one row, in a branch that holds the weights: few steps of many channels, or many taps."""
    model = Wide(channels, taps, stateful)
    given = torch.randn(1, channels, 9), torch.randn(1, channels, taps - 1)
    program = seqc.trace(model, given, [{2: "sequence"}, {}])
    run_passes(program, [Lower(TARGETS["ort-cpu"], {"causal_conv": "conv"})])
    exported = export(program)
    checked(exported)
    assert all(value.uses() for value in exported.graph.initializers.values()), "none is left behind"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    compiled = onnxruntime.InferenceSession(ir.serde.serialize_model(exported).SerializeToString(), options)
    optimized = ir.load(tmp_path / "optimized.onnx")
    assert [n.domain for n in optimized.graph.all_nodes() if n.op_type == "Conv"].count("com.microsoft.nchwc") == 1
    names = [i.name for i in compiled.get_inputs()]
    for length in (1, 2, taps, FEW_STEPS - 1, FEW_STEPS, FEW_STEPS + 1, 300):
        given = torch.randn(1, channels, length), torch.randn(1, channels, taps - 1)
        feeds = {name: x.numpy() for name, x in zip(("x", "state"), given, strict=True) if name in names}
        assert_same(compiled.run(None, feeds), model(*given), 1e-5)


def test_weights_that_are_computed_stay_over_a_line() -> None:
    class Computed(nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return torch.ops.seqc.causal_conv(x, weight, None, None, 1)[0]

    given = torch.randn(1, WIDE, 9), torch.randn(WIDE, 1, MANY_TAPS)
    program = seqc.trace(Computed(), given, [{2: "sequence"}, {}])
    run_passes(program, [Lower(TARGETS["ort-cpu"], {"causal_conv": "conv"})])
    exported = export(program)
    (conv,) = [n for n in exported.graph.all_nodes() if n.op_type == "Conv"]
    assert len(conv.attributes["kernel_shape"].as_ints()) == 1
    assert_same(run(session(exported), given), [Computed()(*given)], 1e-5)


def test_extreme_values_stay_where_they_are() -> None:
    """Infinity reaches the steps that read it and no other; zeros in front are not multiplied into NaN."""
    model = Convolves(3, 1, False, slice(0, 1))
    compiled = session(export(lowered(model, "conv", False)))
    for length in (1, 5):
        (x,) = inputs(model, length, False)
        x[0, :, 0], x[1, :, -1] = float("inf"), 1e38
        assert_same(run(compiled, [x]), model(x), 1e-6)


def test_taps_have_no_branch_and_wide_kernels_stay_convolutions() -> None:
    for taps, expected in ((4, "as taps"), (40, "as conv: ")):
        model = Convolves(taps, 1, True, slice(None))
        program = seqc.trace(model, inputs(model, 9, True), [{0: "batch", 2: "sequence"}, {0: "batch"}])
        (record,) = run_passes(program, [Lower(TARGETS["tensorrt"])])
        assert expected in record.reasons[0]
        assert ("If" in operators(export(program))) == (taps == 40)
    assert "40 taps, more than 32" in record.reasons[0]
