"""The text form: exact for a small loop, the same for two traces, honest about what differs."""

from __future__ import annotations

import torch
from torch import nn

import seqc
from seqc.text import text
from tests.helpers.programs import capture_program, loop_program

LOOP = """\
weight @w0: f32[4, 5]
input %input_0: f32[batch, sequence, 4]
%0: sym[batch] = aten.sym_size.int(%input_0, 0)
%1: f32[batch, 5] = aten.new_zeros(%input_0, [%0, 5], dtype=f32)
%2: f32[sequence, batch, 4] = aten.transpose.int(%input_0, 0, 1)
%3: sym[sequence] = aten.sym_size.int(%2, 0)
%4: (f32[batch, 5], f32[sequence, batch, 5]) = recurrence(trip=%3, reverse) {
  carry %5: f32[batch, 5] = %1
  x %6: f32[batch, 4] = %2
  invariant %7: f32[4, 5] = @w0
  %8: f32[batch, 5] = aten.matmul(%6, %7)
  %9: f32[batch, 5] = aten.add.Tensor(%8, %5)
  next %9
  y %9
}
%10: f32[batch, 5] = %4[0]
%11: f32[sequence, batch, 5] = %4[1]
output output_0 = %10
output output_1 = %11
"""


def test_a_recurrence_is_printed_as_a_nested_region() -> None:
    def step(h, x, w):
        h = x @ w + h
        return h, h

    program = loop_program(step, [torch.randn(2, 3, 4)], [torch.zeros(5)], [torch.randn(4, 5)], reverse=True)
    assert text(program, provenance=False) == LOOP


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.cell(x).tanh().chunk(2, dim=-1)
        return torch.cat([first, second + 1.5], dim=-1)[:, 1:]


def test_two_traces_print_the_same_and_name_weights_as_the_model_does() -> None:
    model = Cell()
    first, second = (text(capture_program(model, torch.randn(2, 3, 4))) for _ in range(2))
    assert first == second
    assert "@cell.weight" in first and "# cell (" in first and "sequence - 1" in first


def test_a_change_of_a_literal_shows() -> None:
    program = capture_program(Cell(), torch.randn(2, 3, 4))
    before = text(program)
    (add,) = [n for n in program.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    add.args = (add.args[0], 2.5)
    assert text(program) == before.replace("1.5", "2.5") != before


def test_a_program_and_what_is_compiled_from_it_are_told_in_one_line() -> None:
    """In a Python shell, where thousands of lines of weights would hide all before them."""
    compiled = seqc.compile(nn.Linear(4, 5), (torch.randn(2, 4),), dynamic_shapes=[{0: "batch"}])
    told = "input: float32[batch, 4] -> output: float32[batch, 5]>"
    assert repr(compiled.program) == f"<Program of 1 nodes: {told}"
    assert repr(compiled) == f"<Compiled for onnx: <Program of 1 nodes: {told}>"
