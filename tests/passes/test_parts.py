"""Reads of parts of what a loop's body puts together, as Hoist's cleanup sees through them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from seqc.ops.recurrence import is_recurrence
from seqc.passes.hoist import Hoist
from seqc.program import Program
from seqc.verify import verify
from tests.helpers.programs import body_of, count_ops, equal_at, loop_program

aten = torch.ops.aten
SIZES = [(3, 7), (1, 1), (2, 13)]
Step = Callable[..., tuple[torch.Tensor, ...]]


def part(x: torch.Tensor, start: int, end: int = 2**63 - 1, step: int = 1, dim: int = 1) -> torch.Tensor:
    """One slice; Python's brackets make one along each axis, which the frontend removes."""
    return aten.slice.Tensor(x, dim, start, end, step)


def hoisted(step: Step, wide: int = 5, *starts: torch.Tensor) -> Program:
    before = loop_program(step, [torch.randn(2, 3, wide)], starts or (torch.zeros(3),))
    after = before.copy()
    Hoist()(after)
    verify(after)
    assert equal_at(before, after, SIZES, (wide,)) <= 1e-5
    return after


@pytest.mark.parametrize("dim", [0, -2])
def test_two_states_that_a_cell_stacks_are_read_by_themselves(dim: int) -> None:
    def step(h: torch.Tensor, c: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        both = torch.stack([torch.tanh(h + x), c * 0.5 + h], dim)
        return both.select(dim, 0), both.select(dim, 1), h

    program = hoisted(step, 3, torch.zeros(3), torch.ones(3))
    assert count_ops(body_of(program), aten.stack.default) == count_ops(body_of(program), aten.select.int) == 0


@pytest.mark.parametrize("start", [-3, 5])
def test_a_context_that_the_newest_frame_fills_is_no_state(start: int) -> None:
    def step(context: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = torch.cat([context, x], 1)
        return part(whole, start), whole.square().sum(1)

    program = hoisted(step)
    assert not any(is_recurrence(n) and n.args[2] for n in program.graph.nodes)


def test_a_piece_that_is_read_as_a_whole_is_that_piece() -> None:
    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = torch.cat([torch.tanh(h), x], 1)
        return part(whole, 0, 3) + part(whole, 3, 6), part(whole, 4, 7)

    program = hoisted(step)
    assert count_ops(body_of(program), aten.cat.default) == 0


def test_what_reaches_over_two_pieces_stays() -> None:
    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = torch.cat([h, x], 1)
        return part(whole, 2, 5), part(whole, 1, 8, 2)

    program = hoisted(step)
    (loop,) = (n for n in program.graph.nodes if is_recurrence(n))
    assert loop.args[2] and count_ops(body_of(program), aten.cat.default) == 1


def test_reads_along_another_axis_stay() -> None:
    def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        both = torch.stack([torch.tanh(h), x], 1)
        joined = torch.cat([h.unsqueeze(1), x.unsqueeze(1)], 1)
        return (both.select(2, 0).sum(1, keepdim=True) * h + part(joined, 0, 2, dim=2).sum((1, 2)).unsqueeze(1),)

    program = hoisted(step, 3)
    assert count_ops(body_of(program), aten.stack.default) == count_ops(body_of(program), aten.cat.default) == 1
