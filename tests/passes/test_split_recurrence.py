"""SplitRecurrence: which layers of one loop become loops of their own, and which stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from seqc.ops.recurrence import is_recurrence, parts
from seqc.passes.split_recurrence import SplitRecurrence
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.verify import verify
from tests.helpers.programs import equal_at, loop_program

D = 5
Step = Callable[..., tuple[torch.Tensor, ...]]


def split(
    step: Step, carries: Sequence[torch.Tensor], weights: int, reverse: bool = False
) -> tuple[Program, list[str]]:
    torch.manual_seed(0)
    program = loop_program(
        step, [torch.randn(2, 7, D)], carries, [torch.randn(D, D) / 4 for _ in range(weights)], reverse
    )
    before = program.copy()
    (record,) = run_passes(program, [SplitRecurrence()])
    verify(program)
    assert equal_at(before, program, [(1, 1), (3, 8)], (D,)) < 1e-6
    assert record.changes == len(loops(program)) - 1
    return program, list(record.reasons)


def loops(program: Program) -> list[int]:
    """The number of carries of each loop."""
    return [len(parts(n).carries) for n in program.graph.nodes if is_recurrence(n)]


def two_layers(a, b, x, w, u, v):
    a = torch.tanh(x + F.linear(a, w))
    b = torch.tanh(F.linear(a, u) + F.linear(b, v) + x)
    return a, b, a + b


def test_a_layer_behind_a_projection_gets_a_loop_of_its_own() -> None:
    program, (reason,) = split(two_layers, [torch.zeros(D), torch.ones(D)], 3)
    assert loops(program) == [1, 1]
    assert "2 layers in one loop become a loop each" in reason


def test_loops_from_the_end_are_split_too() -> None:
    program, _ = split(two_layers, [torch.zeros(D), torch.ones(D)], 3, reverse=True)
    assert loops(program) == [1, 1]
    assert all(parts(n).reverse for n in program.graph.nodes if is_recurrence(n))


def test_states_that_depend_on_each_other_stay_in_one_loop() -> None:
    def step(h, c, a, x, w, u, v):
        c = torch.sigmoid(F.linear(h, w)) * c + x
        h = torch.tanh(c)
        return h, c, 0.9 * a + F.linear(h, u)

    program, _ = split(step, [torch.zeros(D), torch.zeros(D), torch.ones(D)], 3)
    assert loops(program) == [2, 1]


def test_sizes_are_read_where_they_are_known() -> None:
    def step(a, b, x, w):
        a = 0.5 * a + x
        return a, b + F.linear(a, w).view(a.shape[0], -1)

    program, _ = split(step, [torch.zeros(D), torch.zeros(D)], 1)
    assert loops(program) == [1, 1]


def test_feedback_from_the_last_layer_keeps_all_in_one_loop() -> None:
    def step(a, b, x, w, u):
        a = torch.tanh(x + F.linear(b, w))
        return a, torch.tanh(F.linear(a, u) + b)

    program, reasons = split(step, [torch.zeros(D), torch.zeros(D)], 2)
    assert loops(program) == [2] and not reasons


def test_a_chain_without_a_projection_stays_one_loop() -> None:
    def step(a, b, x):
        a = 0.9 * a + x
        return a, 0.5 * b + a

    program, reasons = split(step, [torch.zeros(D), torch.zeros(D)], 0)
    assert loops(program) == [2] and not reasons


def test_what_would_be_kept_for_all_steps_must_not_be_large() -> None:
    def step(a, b, x, w):
        a = 0.9 * a + x.unsqueeze(1)
        return a, b + F.linear(a, w)

    program, (reason,) = split(step, [torch.zeros(64, D), torch.zeros(64, D)], 1)
    assert loops(program) == [2]
    assert "2 layers stay one loop: between them" in reason
