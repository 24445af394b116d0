"""Peak activation memory: hand-computed on small graphs, and what the passes make of state-space models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqc
from seqc.memory import Peak, node_bytes, nominal_sizes, peak_activations
from seqc.program import Program
from tests.helpers.programs import capture_program, loop_program

SIZES = {"batch": 2, "sequence": 10}
ROW = 2 * 10 * 4 * 4
"""Bytes of an input [batch, sequence, 4] of float32 at these sizes."""


def program_of(function: Callable[..., torch.Tensor], *weights: torch.Tensor) -> Program:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(weights)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x, *self.weights)

    return capture_program(Model(), torch.randn(3, 5, 4))


def peak(function: Callable[..., torch.Tensor], *weights: torch.Tensor) -> Peak:
    return peak_activations(program_of(function, *weights), SIZES)


def test_a_value_lives_from_its_node_to_its_last_reader() -> None:
    assert peak(lambda x: x.relu().exp().sin().cos()).bytes == 3 * ROW  # the input, and two values of the chain

    def kept(x: torch.Tensor) -> torch.Tensor:
        first = x.relu()
        return first.exp().sin().cos() + first

    assert peak(kept).bytes == 4 * ROW


def test_the_node_of_the_peak_is_told() -> None:
    found = peak(lambda x: (x.exp().unsqueeze(-1) * torch.ones(5)).sum(-1).sin())
    assert found.node is not None and "mul" in str(found.node.target)
    assert found.bytes == 7 * ROW  # the input, its exponential, and five times that


def test_reshapes_share_memory_and_transposed_values_do_not() -> None:
    assert peak(lambda x: x.exp().unsqueeze(2).flatten(2)).bytes == 2 * ROW
    assert peak(lambda x: x.exp().transpose(1, 2)).bytes == 3 * ROW


def test_results_of_one_operation_end_on_their_own() -> None:
    def parts(x: torch.Tensor) -> torch.Tensor:
        values, _ = x.topk(4)  # type: ignore[misc]
        return values.exp().sin()

    assert peak(parts).bytes == ROW + ROW + 2 * ROW  # the input, values, and indices of int64, which nothing reads


def test_weights_and_what_is_computed_from_them_are_no_activations() -> None:
    large = torch.randn(4, 4000)
    assert peak(lambda x, w: x * w.exp().sum(1), large).bytes == 2 * ROW


def test_attention_counts_its_scores() -> None:
    def attention(x: torch.Tensor) -> torch.Tensor:
        q = x.unsqueeze(1)
        return F.scaled_dot_product_attention(q, q, q)

    assert peak(attention).bytes == 2 * ROW + 2 * (2 * 10 * 10 * 4)


def test_a_recurrence_takes_its_results_and_one_step() -> None:
    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.unsqueeze(-1) * h  # [batch, 4, 6]
        return wide, wide.sum(-1)

    program = loop_program(step, [torch.randn(3, 5, 4)], carries=[torch.ones(4, 6)], results=[1])
    state = 2 * 4 * 6 * 4
    outside = ROW + ROW + state + (state + ROW)  # the input, x by time, the first state; the last state, y
    assert (
        peak_activations(program, SIZES).bytes == outside + 2 * state + 2 * 4 * 4
    )  # the state, the next one, a step of y


def test_nominal_sizes_stay_in_range() -> None:
    dims = {"x": {0: "rows", 1: torch.export.Dim("time", min=2, max=64)}}
    program = seqc.trace(nn.ReLU(), {"input": torch.randn(2, 9, 4)}, dynamic_shapes={"input": dims["x"]})
    assert nominal_sizes(program) == {"rows": 1, "time": 64}
    assert peak_activations(program).bytes == 2 * 64 * 4 * 4


WIDTH, STATES = 6, 8


class DiagonalStateSpace(nn.Module):
    """A diagonal state [batch, WIDTH, STATES], discretised by ``rule`` in front of the loop or inside."""

    def __init__(self, rule: str, front: bool, last: bool = False) -> None:
        super().__init__()
        self.rule, self.front, self.last = rule, front, last
        self.log_rates = nn.Parameter(torch.randn(WIDTH, STATES) * 0.3)
        self.tau = nn.Parameter(torch.rand(WIDTH, 1))
        self.project = nn.Linear(WIDTH, WIDTH + 2 * STATES)

    def discretised(self, dt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rates, step = -torch.exp(self.log_rates), dt.unsqueeze(-1)
        if self.rule == "mixed":
            return torch.exp(step * rates), step
        if self.rule == "zero-order hold":
            return torch.exp(step * rates), (torch.exp(step * rates) - 1) / rates
        if self.rule == "bilinear":
            half = step * rates / 2
            return (1 + half) / (1 - half), step / (1 - half)
        if self.rule == "euler":
            return 1 + step * rates, step
        return torch.exp(rates * self.tau * step), (torch.exp(rates * self.tau) - 1) / rates + 0 * step

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        dt, b, c = self.project(u).split([WIDTH, STATES, STATES], -1)
        dt = F.softplus(dt)
        if self.front:
            decay, gain = self.discretised(dt)
            added = gain * b.unsqueeze(2) * u.unsqueeze(-1)
        h, out = torch.zeros(u.shape[0], WIDTH, STATES), []
        for t in range(u.shape[1]):
            if self.front:
                h = decay[:, t] * h + added[:, t]
            else:
                one, gain = self.discretised(dt[:, t])
                h = one * h + gain * b[:, t].unsqueeze(1) * u[:, t].unsqueeze(-1)
            out.append((h * c[:, t].unsqueeze(1)).sum(-1))
        return h if self.last else torch.stack(out, 1)


def largest(program: Program) -> int:
    """Bytes of the largest value of the top-level graph; free sizes count as 1024."""
    return max(node_bytes([n]) for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor | tuple))


CASES = [
    ("mixed", False, False),
    ("mixed", True, False),
    ("zero-order hold", True, False),
    ("bilinear", True, True),
    ("euler", False, True),
    ("event", True, True),
]


@pytest.mark.parametrize(("rule", "front", "last"), CASES)
def test_no_value_holds_the_states_of_all_steps(rule: str, front: bool, last: bool) -> None:
    model = DiagonalStateSpace(rule, front, last)
    program = seqc.compile(model, (torch.randn(2, 9, WIDTH),), check=False).program
    assert largest(program) < 1024 * 1024 * WIDTH * STATES * 4
    for batch, length in ((1, 1), (3, 13)):
        u = torch.randn(batch, length, WIDTH)
        torch.testing.assert_close(program(u)[0], model(u), rtol=1e-4, atol=1e-5)


def test_the_states_of_all_steps_are_seen_where_a_model_writes_them_out() -> None:
    traced = seqc.trace(DiagonalStateSpace("mixed", True), (torch.randn(2, 9, WIDTH),))
    assert largest(traced) == 1024 * 1024 * WIDTH * STATES * 4


def test_the_report_tells_the_peak_before_and_after() -> None:
    compiled = seqc.compile(DiagonalStateSpace("mixed", True), (torch.randn(2, 9, WIDTH),), check=False)
    told = compiled.report["peak_activations"]
    assert told["sizes"] == {"batch": 1, "sequence": 2048}
    assert told["after_passes"] * 3 < told["before_passes"]
    assert told["after_passes"] == peak_activations(compiled.program).bytes
    assert "test_memory.py" in told["at"]
    assert compiled.manifest["peak_activations"] == told
