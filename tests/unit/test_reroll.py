"""Which unrolled loops become a recurrence, what it looks like, and what must not be taken for a loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import seqc
from seqc.errors import UnsupportedModelError
from seqc.ops.recurrence import is_recurrence, parts
from seqc.program import Program
from seqc.text import text

SHAPES = {"x": {0: "batch", 1: "sequence"}}
LENGTHS = (1, 2, 3, 13, 40)
Function = Callable[[torch.Tensor], Any]


class Module(nn.Module):
    """In this file, because refusals name the line of the forward that they come from."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def traced(function: Function) -> Program:
    return seqc.trace(Module(function), (torch.randn(2, 9, 4),), SHAPES)


def loops(program: Program) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if is_recurrence(n)]


def start(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(x.shape[0], 4)


def step(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.5 * h + x)


def smallest(x: torch.Tensor) -> torch.Tensor:
    h, out = start(x), []
    for t in range(x.shape[1]):
        h = step(x[:, t], h)
        out.append(h)
    return torch.stack(out, 1)


def test_the_smallest_loop_after_rerolling() -> None:
    assert text(traced(smallest), provenance=False) == SMALLEST


SMALLEST = """\
input %x: f32[batch, sequence, 4]
%0: sym[sequence] = aten.sym_size.int(%x, 1)
%1: sym[batch] = aten.sym_size.int(%x, 0)
%2: f32[batch, 4] = aten.zeros([%1, 4])
%3: f32[sequence, batch, 4] = aten.permute(%x, [1, 0, 2])
%4: (f32[batch, 4], f32[sequence, batch, 4]) = recurrence(trip=%0) {
  carry %5: f32[batch, 4] = %2
  x %6: f32[batch, 4] = %3
  %7: f32[batch, 4] = aten.mul.Tensor(%5, 0.5)
  %8: f32[batch, 4] = aten.add.Tensor(%7, %6)
  %9: f32[batch, 4] = aten.tanh(%8)
  next %9
  y %9
}
%10: f32[sequence, batch, 4] = %4[1]
%11: f32[batch, sequence, 4] = aten.permute(%10, [1, 0, 2])
output output = %11
"""


def backwards(x: torch.Tensor) -> torch.Tensor:
    h, out = start(x), []
    for t in reversed(range(x.shape[1])):
        h = step(x[:, t], h)
        out.append(h)
    return torch.stack(out[::-1], 1)


def peeled(x: torch.Tensor) -> torch.Tensor:
    h = x[:, 0].sin()
    out = [h]
    for t in range(1, x.shape[1]):
        h = step(x[:, t], h)
        out.append(h)
    return torch.stack(out, 1)


def last_state(x: torch.Tensor) -> torch.Tensor:
    h = start(x)
    for t in range(x.shape[1]):
        h = step(x[:, t], h)
    return h


def two_carries(x: torch.Tensor) -> torch.Tensor:
    h, c, out = start(x), start(x), []
    for t in range(x.shape[1]):
        c = 0.9 * c + x[:, t]
        h = step(c, h)
        out.append(h * c)
    return torch.stack(out, 1)


def ragged_chunks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h, out = start(x), []
    for i in range(0, x.shape[1], 4):
        out.append(x[:, i : i + 4].cumsum(1) + h.unsqueeze(1))
        h = step(x[:, i : i + 4].sum(1), h)
    return torch.cat(out, 1), h


def chunks_with_two_states(x: torch.Tensor) -> torch.Tensor:
    """Each state is read by the next of the other, the last of both by a ragged chunk."""
    fast, slow, out = start(x), x.new_ones(x.shape[0], 4), []
    for i in range(0, x.shape[1], 4):
        part = x[:, i : i + 4]
        out.append(part * slow.unsqueeze(1) + fast.unsqueeze(1))
        fast, slow = torch.tanh(part.mean(1) - slow), 0.5 * slow + 0.25 * fast
    return torch.cat(out, 1)


def chunks_without_a_state(x: torch.Tensor) -> torch.Tensor:
    out = []
    for i in range(0, x.shape[1], 4):
        part = x[:, i : i + 4]
        out.append(part - part.mean(1, keepdim=True))
    return torch.cat(out, 1)


def part_of_the_length(x: torch.Tensor) -> torch.Tensor:
    h, out, steps = start(x), [], x.shape[1]
    for t in range(steps):
        h = step((1 - t / steps) * x[:, t], h / steps**0.5)
        out.append(h * ((steps - 1 - t) / (2 * steps)))
    return torch.stack(out, 1)


def steps_to_come(x: torch.Tensor) -> torch.Tensor:
    """The trace has T, T - 1, T - 2, ...: a number that is carried."""
    h, out, steps = start(x), [], x.shape[1]
    for t in range(steps):
        h = step(x[:, t] / (steps - t), h) + 0.1 * (t - steps / 2)
        out.append(h)
    return torch.stack(out, 1)


def sum_of_states(x: torch.Tensor) -> torch.Tensor:
    """Each state is read by the next sum: the last one too, and not by itself."""
    h, total = start(x), 0
    for t in range(x.shape[1]):
        h = step(x[:, t], h)
        total = total + h * h
    return total / x.shape[1]


def growing_list(x: torch.Tensor) -> torch.Tensor:
    history, out = [], []
    for t in range(x.shape[1]):
        history.append(step(x[:, t], x[:, 0]))
        out.append(torch.stack(history, 1).amax(1))
    return torch.stack(out, 1)


def growing_tensor(x: torch.Tensor) -> torch.Tensor:
    history, out = x[:, :1], []
    for t in range(x.shape[1]):
        out.append(step(x[:, t], history.amax(1)))
        history = torch.cat([history, out[-1].unsqueeze(1)], 1)
    return torch.stack(out, 1)


def of_positions(x: torch.Tensor) -> torch.Tensor:
    """What the refusal of ``quadratic`` says to do."""
    h, out, at = start(x), [], torch.arange(x.shape[1])
    for t in range(x.shape[1]):
        h = step(x[:, t], h) * (0.1 * at[t] ** 2)
        out.append(h)
    return torch.stack(out, 1)


def even_times(x: torch.Tensor) -> torch.Tensor:
    h, out, times = start(x), [], torch.linspace(-1, 2, x.shape[1])
    for t in range(x.shape[1]):
        h = step(x[:, t] * torch.cos(times[t]), h)
        out.append(h)
    return torch.stack(out, 1)


ACCEPTED: dict[str, Function] = {
    "even times": even_times,
    "of positions": of_positions,
    "part of the length": part_of_the_length,
    "steps to come": steps_to_come,
    "smallest": smallest,
    "backwards": backwards,
    "peeled first step": peeled,
    "last state": last_state,
    "two carries": two_carries,
    "ragged chunks": ragged_chunks,
    "chunks with two states": chunks_with_two_states,
    "chunks without a state": chunks_without_a_state,
}
CARRIES = {"steps to come": 2, "two carries": 2, "chunks with two states": 2, "chunks without a state": 0}


@pytest.mark.parametrize("name", ACCEPTED)
def test_one_loop_becomes_one_recurrence_right_at_any_length(name: str) -> None:
    function = ACCEPTED[name]
    program = traced(function)
    (loop,) = loops(program)
    assert parts(loop).reverse == (name == "backwards")
    assert len(parts(loop).carries) == CARRIES.get(name, 1)
    assert all("Min" not in str(size) for port in program.outputs for size in port.shape)
    for length in LENGTHS:
        x = torch.randn(3, length, 4)
        expected = function(x)
        torch.testing.assert_close(program(x), expected if isinstance(expected, tuple) else (expected,))


def test_a_sum_of_all_states_reads_the_last_one_as_it_reads_the_others() -> None:
    program = traced(sum_of_states)
    for length in LENGTHS:
        x = torch.randn(3, length, 4)
        torch.testing.assert_close(program(x), (sum_of_states(x),))


def test_two_loops_one_behind_the_other_become_two_recurrences() -> None:
    program = traced(lambda x: backwards(smallest(x)))
    assert [parts(n).reverse for n in loops(program)] == [False, True]
    x = torch.randn(2, 13, 4)
    torch.testing.assert_close(program(x)[0], backwards(smallest(x)))


def fixed_steps(x: torch.Tensor) -> torch.Tensor:
    out = []
    for _ in range(4):
        x = torch.tanh(x * 0.5)
        out.append(x)
    return torch.stack(out, 1)


def heads(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[..., i : i + 1] * (i + 1) for i in range(4)], dim=-1)


@pytest.mark.parametrize("function", [fixed_steps, heads], ids=["four steps", "four heads"])
def test_loops_that_do_not_depend_on_the_length_stay_as_written(function: Function) -> None:
    program = traced(function)
    assert loops(program) == []
    x = torch.randn(3, 13, 4)
    torch.testing.assert_close(program(x)[0], function(x))


def every_third(x: torch.Tensor) -> torch.Tensor:
    h, out = start(x), []
    for t in range(x.shape[1]):
        h = torch.relu(h) if t % 3 == 0 else step(x[:, t], h)
        out.append(h)
    return torch.stack(out, 1)


def quadratic(x: torch.Tensor) -> torch.Tensor:
    h, out = start(x), []
    for t in range(x.shape[1]):
        h = step(x[:, t], h) * (0.1 * t**2)
        out.append(h)
    return torch.stack(out, 1)


@pytest.mark.parametrize("function", [growing_list, growing_tensor])
def test_what_grows_in_each_step_is_refused_with_what_to_write(function: Function) -> None:
    class Grows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    with pytest.raises(
        UnsupportedModelError, match=r"all steps so far is made in each step at .*test_reroll\.py:\d+.*mask"
    ):
        seqc.trace(Grows(), (torch.randn(2, 9, 4),), SHAPES)


@pytest.mark.parametrize("function", [every_third, quadratic])
def test_steps_that_differ_are_refused_with_their_line_and_what_to_try(function: Function) -> None:
    with pytest.raises(UnsupportedModelError, match=r"test_reroll\.py:\d+.*loops=unroll") as refused:
        traced(function)
    assert ("torch.arange(length)[t]" in str(refused.value)) == (function is quadratic)
