"""The forms of ``seqc::gated_rnn`` in ONNX Runtime, against the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import seqc
from seqc.backends.onnx import export
from seqc.errors import UnsupportedOpError
from seqc.lowerings.lower import Lower
from seqc.ops.gated_rnn import GATES
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.target import TARGETS
from tests.helpers.onnx import assert_same, run, session

ops = torch.ops.seqc
LENGTHS = (1, 2, 15, 16, 17, 257, 4096)
B, D, H = 2, 3, 4


class Layer(nn.Module):
    """A projection in some spelling, and the cells."""

    def __init__(self, kind: str, reverse: bool = False, spelling: str = "linear") -> None:
        super().__init__()
        torch.manual_seed(0)
        rows = GATES[kind] * H
        self.kind, self.reverse, self.spelling = kind, reverse, spelling
        self.inputs = nn.Linear(D, rows, bias=spelling != "no bias")
        self.matrix, self.bias = nn.Parameter(torch.randn(rows, H) / H), nn.Parameter(torch.randn(rows))

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        if self.spelling == "batch first":
            return self.inputs(x.transpose(0, 1)).transpose(0, 1)
        if self.spelling == "in parts, with another bias":
            return torch.cat([part + 0.5 for part in self.inputs(x).chunk(GATES[self.kind], -1)], -1)
        if self.spelling == "parts with biases":
            parts = self.inputs(x).split(H, -1)
            return torch.cat([p + self.bias[:H] for p in parts], -1)
        if self.spelling == "plain product":
            return x @ self.inputs.weight.t() + self.inputs.bias
        return torch.relu(self.inputs(x)) if self.spelling == "not one product" else self.inputs(x)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gates = self.gates(x)
        return tuple(ops.gated_rnn(gates, self.matrix, self.bias, h, c, self.kind, self.reverse))


def given(length: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(length, B, D), torch.randn(B, H), torch.randn(B, H)


def lowered(model: nn.Module, form: str) -> Program:
    shapes = [{0: "sequence", 1: "batch"}, {0: "batch"}, {0: "batch"}]
    program = seqc.trace(model, given(5), shapes)
    run_passes(program, [Lower(TARGETS["onnx"], {} if form == "auto" else {"gated_rnn": form})])
    return program


def assert_right(model: nn.Module, form: str) -> Program:
    program = lowered(model, form)
    compiled = session(export(program))
    for length in LENGTHS:
        torch.manual_seed(length)
        values = given(length)
        expected = model.double()(*(v.double() for v in values))
        model.float()
        assert_same(run(compiled, values), [x.float() for x in expected], 2e-5)
    return program


@pytest.mark.parametrize(("kind", "form", "reverse"), itertools.product(GATES, ("native", "sequential"), (False, True)))
def test_every_form_of_every_kind_equals_the_reference(kind: str, form: str, reverse: bool) -> None:
    assert_right(Layer(kind, reverse), form)


@pytest.mark.parametrize("spelling", ["no bias", "batch first", "parts with biases", "plain product"])
def test_the_projection_of_the_input_goes_into_the_operator(spelling: str) -> None:
    program = assert_right(Layer("lstm", spelling=spelling), "auto")
    assert any("onnx_rnn" in str(n.target) for n in program.graph.nodes)
    assert not any(n.target in (torch.ops.aten.linear.default, torch.ops.aten.mm.default) for n in program.graph.nodes)


@pytest.mark.parametrize("spelling", ["not one product", "in parts, with another bias"])
def test_what_is_no_projection_is_computed_before_a_loop(spelling: str) -> None:
    program = assert_right(Layer("gru", spelling=spelling), "auto")
    assert not any("onnx_rnn" in str(n.target) for n in program.graph.nodes)
    with pytest.raises(UnsupportedOpError, match="not one matrix product of an input"):
        lowered(Layer("gru", spelling=spelling), "native")
