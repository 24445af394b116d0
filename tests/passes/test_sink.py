"""Sink: what moves into the loop, what stays in front of it, and that the numbers are the same bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import seqc
from seqc.lowerings.lower import Lower
from seqc.passes.classify_recurrence import ClassifyRecurrence
from seqc.passes.sink import Sink
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.target import get_target
from seqc.verify import verify
from tests.helpers.programs import body_of

WIDTH, STATES = 6, 8


class Discretised(nn.Module):
    """All steps discretised before the loop, as most libraries do."""

    def __init__(self, axis: int = 1) -> None:
        super().__init__()
        self.rates = nn.Parameter(-torch.rand(WIDTH, STATES))
        self.axis = axis

    def forward(self, dt: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self.axis == 1:
            decay = torch.exp(dt.unsqueeze(-1) * self.rates)
            added = dt.unsqueeze(-1) * b.unsqueeze(2)
        else:  # [batch, width, time, states]
            decay = torch.exp(dt.transpose(1, 2).unsqueeze(-1) * self.rates[None, :, None])
            added = dt.transpose(1, 2).unsqueeze(-1) * b.unsqueeze(1)
        h = torch.zeros(dt.shape[0], WIDTH, STATES)
        out = []
        for t in range(dt.shape[1]):
            h = decay.select(self.axis, t) * h + added.select(self.axis, t)
            out.append(h.sum(-1))
        return torch.stack(out, 1)


def inputs(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(batch, length, WIDTH), torch.randn(batch, length, STATES)


def sunk(model: nn.Module, make: Callable[[int, int], tuple[torch.Tensor, ...]] = inputs) -> tuple[Program, int]:
    program = seqc.trace(model, make(2, 9))
    before = program.copy()
    (record,) = run_passes(program, [Sink()])
    verify(program)
    for batch, length in ((1, 1), (3, 13)):
        values = make(batch, length)
        for a, b in zip(before(*values), program(*values), strict=True):
            assert torch.equal(a, b)
    return program, record.changes


def x_shapes(program: Program) -> list[tuple[int | str, ...]]:
    (loop,) = [n for n in program.graph.nodes if "recurrence" in str(n.target)]
    return sorted(program.shape_of(x.meta["val"]) for x in loop.args[3])


def test_broadcasts_over_the_state_move_into_the_loop() -> None:
    program, changes = sunk(Discretised())
    assert changes == 2
    assert x_shapes(program) == [("sequence", "batch", WIDTH), ("sequence", "batch", STATES)]
    assert "aten.exp.default" in [str(n.target) for n in body_of(program).graph.nodes]


def test_the_time_axis_may_lie_anywhere_and_have_size_one_in_an_operand() -> None:
    program, changes = sunk(Discretised(axis=2))
    assert changes == 2
    assert x_shapes(program) == [("sequence", "batch", WIDTH), ("sequence", "batch", STATES)]


def test_the_reason_says_how_much_less_is_read() -> None:
    program = seqc.trace(Discretised(), inputs(2, 9))
    (record,) = run_passes(program, [Sink()])
    (reason,) = record.reasons
    assert "test_sink.py" in reason and "a step instead of" in reason


def test_what_is_no_larger_than_its_operands_stays_outside() -> None:
    class Gated(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = torch.sigmoid(x * 2)
            h, out = torch.zeros(x.shape[0], WIDTH), []
            for t in range(x.shape[1]):
                h = gate[:, t] * h + x[:, t]
                out.append(h)
            return torch.stack(out, 1)

    program, changes = sunk(Gated(), lambda batch, length: (torch.randn(batch, length, WIDTH),))
    assert changes == 0
    assert "aten.sigmoid.default" not in [str(n.target) for n in body_of(program).graph.nodes]


def test_what_reads_other_steps_stays_outside() -> None:
    class Cumulative(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.cumsum(1).unsqueeze(-1) * torch.ones(STATES)
            h, out = torch.zeros(x.shape[0], WIDTH, STATES), []
            for t in range(x.shape[1]):
                h = 0.5 * h + wide[:, t]
                out.append(h.sum(-1))
            return torch.stack(out, 1)

    program, _ = sunk(Cumulative(), lambda batch, length: (torch.randn(batch, length, WIDTH),))
    assert "aten.cumsum.default" not in [str(n.target) for n in body_of(program).graph.nodes]
    assert x_shapes(program) == [("sequence", "batch", WIDTH)]


def test_what_is_the_same_in_each_step_is_not_repeated_for_all_steps() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decay = nn.Parameter(torch.rand(WIDTH, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            decay = self.decay.expand(x.shape[1], WIDTH, STATES)
            h, out = torch.zeros(x.shape[0], WIDTH, STATES), []
            for t in range(x.shape[1]):
                h = decay[t] * h + x[:, t, :, None]
                out.append(h.sum(-1))
            return torch.stack(out, 1)

    program, changes = sunk(Fixed(), lambda batch, length: (torch.randn(batch, length, WIDTH),))
    assert changes == 1
    assert x_shapes(program) == [("sequence", "batch", WIDTH)]


def test_an_expand_to_a_size_that_the_body_does_not_know_stays_outside() -> None:
    class Free(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.unsqueeze(-1).expand(-1, -1, -1, x.shape[0])
            h, out = torch.zeros(x.shape[0], WIDTH, x.shape[0]), []
            for t in range(x.shape[1]):
                h = 0.5 * h + wide[:, t]
                out.append(h.sum(-1))
            return torch.stack(out, 1)

    program, changes = sunk(Free(), lambda batch, length: (torch.randn(batch, length, WIDTH),))
    assert changes == 0
    assert x_shapes(program) == [("sequence", "batch", WIDTH, "batch")]


def scan_over_states(last: bool) -> Program:
    class Scan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rates = nn.Parameter(-torch.rand(WIDTH, STATES))

        def forward(self, dt: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            h = torch.zeros(dt.shape[0], WIDTH, STATES)
            out = []
            for t in range(dt.shape[1]):
                h = torch.exp(dt[:, t, :, None] * self.rates) * h + dt[:, t, :, None] * b[:, t, None]
                out.append(h)
            return h if last else torch.stack(out, 1)

    program = seqc.trace(Scan(), inputs(2, 9))
    run_passes(program, [ClassifyRecurrence(), Lower(get_target("onnx"))])
    return program


def test_a_scan_written_as_a_loop_gets_its_broadcasts_back() -> None:
    program = scan_over_states(last=False)
    assert x_shapes(program) == 2 * [("sequence", "batch", WIDTH, STATES)]
    before = program.copy()
    run_passes(program, [Sink()])
    assert set(x_shapes(program)) == {("sequence", "batch", WIDTH), ("sequence", "batch", STATES)}
    for values in (inputs(1, 1), inputs(3, 13)):
        assert torch.equal(before(*values)[0], program(*values)[0])


def test_of_a_scan_whose_last_state_is_read_nothing_else_is_kept() -> None:
    program = scan_over_states(last=True)
    run_passes(program, [Sink()])
    (loop,) = [n for n in program.graph.nodes if "recurrence" in str(n.target)]
    assert [program.shape_of(v) for v in loop.meta["val"]] == [("batch", WIDTH, STATES)]
    large = ("sequence", "batch", WIDTH, STATES)  # not even for its length
    assert large not in [program.shape_of(n.meta["val"]) for n in program.graph.nodes if n.op == "call_function"
                         and isinstance(n.meta["val"], torch.Tensor)]  # fmt: skip
