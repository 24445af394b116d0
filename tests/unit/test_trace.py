"""From a module to a Program: symbolic dimensions by name, provenance, refusals with the source line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import seqc
from seqc.errors import UnsupportedModelError, UsageError
from seqc.frontend.signature import bind
from seqc.frontend.trace import trace_signature
from seqc.ops.recurrence import is_recurrence
from seqc.program import module_path, source_line

X = torch.randn(2, 9, 4)
SHAPES = {"x": {0: "batch", 1: "sequence"}}


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(4, 4)
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = torch.zeros(x.shape[0], 4), []
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(h) + x[:, t])
            out.append(h)
        self.last = h
        return torch.stack(out, dim=1)


class Plain(nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scaled": x * scale.unsqueeze(-1), "total": x.sum(1)}


def test_ports_carry_the_names_of_inputs_outputs_and_dimensions() -> None:
    shapes = {"x": {0: "batch", 1: "time"}, "scale": {0: "batch", 1: "time"}}
    program = seqc.trace(Plain(), {"x": X, "scale": torch.randn(2, 9)}, shapes)
    assert [(p.name, p.shape) for p in program.inputs] == [("x", ("batch", "time", 4)), ("scale", ("batch", "time"))]
    assert [(p.name, p.shape) for p in program.outputs] == [("scaled", ("batch", "time", 4)), ("total", ("batch", 4))]
    assert [d.name for d in program.dims] == ["batch", "time"]


def test_a_model_without_loops_has_no_recurrence() -> None:
    program = seqc.trace(Plain(), {"x": X, "scale": torch.randn(2, 9)})
    assert not any(is_recurrence(n) for n in program.graph.nodes)


def test_an_exported_program_keeps_its_dynamic_dimensions() -> None:
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    linear = nn.Linear(4, 3)
    exported = torch.export.export(linear, (X,), dynamic_shapes=({0: batch, 1: time},))
    program = seqc.trace(exported, (X,))
    assert program.inputs[0].shape == ("batch", "sequence", 4)  # torch.export keeps no names
    other = torch.randn(5, 3, 4)
    torch.testing.assert_close(program(other)[0], linear(other))


def test_tracing_leaves_the_module_as_it_was() -> None:
    model = Loop()
    model(X)
    last, weight = model.last, model.cell.weight.clone()
    seqc.trace(model, (X,), SHAPES)
    assert model.last is last
    assert torch.equal(model.cell.weight, weight)


def test_operations_know_their_module_and_line() -> None:
    program = seqc.trace(Loop(), (X,), SHAPES)
    (loop,) = [n for n in program.graph.nodes if is_recurrence(n)]
    assert "test_trace.py" in source_line(loop)
    body = program.graph_module.get_submodule(str(loop.args[0].target))
    assert "cell" in {module_path(n) for n in body.graph.nodes}


def test_control_flow_on_values_is_refused_with_line_and_hint(capfd: pytest.CaptureFixture[str]) -> None:
    class Halting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(UnsupportedModelError, match=r"test_trace\.py:\d+.*make it a mask"):
        seqc.trace(Halting(), (X,), SHAPES)
    assert capfd.readouterr() == ("", "")


def test_an_output_that_is_no_tensor_is_left_out_and_noted() -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
            return x * 2, 3

    program = seqc.trace(Constant(), (X,), SHAPES)
    assert len(program.outputs) == 1 and any("output" in note for note in program.notes)


def test_what_is_no_module_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="not function"):
        seqc.trace(lambda x: x, (X,), SHAPES)  # type: ignore[arg-type]


def test_loops_kept_unrolled_fix_the_length_and_say_so() -> None:
    model = Loop().eval()
    program = trace_signature(model, bind(model, (X,), SHAPES), loops="unroll")
    assert not any(is_recurrence(n) for n in program.graph.nodes)
    assert program.inputs[0].shape == ("batch", 9, 4)
    assert any("'sequence' is FIXED at 9" in note for note in program.notes)
    torch.testing.assert_close(program(X)[0], model(X))


def test_compiling_leaves_modes_and_random_numbers_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3).eval())
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    expected = [torch.rand(2).tolist() for _ in range(2)]
    torch.manual_seed(3)
    found = [torch.rand(2).tolist()]
    seqc.compile(model, (torch.ones(2, 7, 3),), stateful=True)
    seqc.trace(model, (torch.ones(2, 7, 3),))
    found.append(torch.rand(2).tolist())
    assert found == expected
    assert [m.training for m in model.modules()] == modes and True in modes and False in modes
