"""FillLoops: which loops make a step that nothing reads, and what they give with and without steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import seqc
from seqc.passes import FillLoops
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.text import text
from seqc.verify import verify
from tests.helpers.modules import Applied

Function = Callable[[torch.Tensor], torch.Tensor]


def chunks_of_four(x: torch.Tensor) -> torch.Tensor:
    """None is whole at fewer than four steps."""
    h, out = torch.zeros(x.shape[0], x.shape[2]), []
    for i in range(x.shape[1] // 4):
        h = torch.tanh(h / x[:, 4 * i : 4 * i + 4].sum(1))  # of zeros this is no number
        out.append(h)
    return torch.stack([h, *out], 1)


def differences(x: torch.Tensor) -> torch.Tensor:
    """One fewer than steps."""
    h, out = torch.zeros(x.shape[0], x.shape[2]), [x[:, 0]]
    for t in range(x.shape[1] - 1):
        h = torch.tanh(h + x[:, t + 1] - x[:, t])
        out.append(h)
    return torch.stack(out, 1)


def every_step(x: torch.Tensor) -> torch.Tensor:
    h, out = torch.zeros(x.shape[0], x.shape[2]), []
    for t in range(x.shape[1]):
        h = torch.tanh(h + x[:, t])
        out.append(h)
    return torch.stack(out, 1)


def passed(function: Function) -> tuple[Program, Program, int]:
    program = seqc.trace(Applied(function), (torch.randn(2, 19, 3),))
    before = program.copy()
    (record,) = run_passes(program, [FillLoops()])
    verify(program)
    return before, program, record.changes


@pytest.mark.parametrize("function", [chunks_of_four, differences])
def test_a_loop_that_may_have_no_step_makes_one_that_nothing_reads(function: Function) -> None:
    before, program, changes = passed(function)
    assert changes == text(before).count("= recurrence(") > 0
    assert "sym_max" not in text(before) and text(program).count("= sym_max(") == changes
    for length in (1, 3, 4, 5, 19):
        x = torch.randn(3, length, 3)
        (found,), (expected,) = program(x), before(x)
        assert torch.equal(found, expected) and torch.equal(found, function(x))


def test_a_loop_that_always_makes_a_step_stays() -> None:
    _, _, changes = passed(every_step)
    assert changes == 0


def test_a_loop_is_filled_once() -> None:
    _, program, _ = passed(chunks_of_four)
    (record,) = run_passes(program, [FillLoops()])
    assert record.changes == 0


def test_it_runs_where_engines_are_built_and_leaves_no_branch() -> None:
    for target, branches in (("tensorrt", False), ("onnx", True)):
        options = {"engines": "off"} if target == "tensorrt" else {}
        made = seqc.compile(Applied(chunks_of_four), (torch.rand(2, 9, 3) + 1,), target=target, options=options)
        assert any(node.op_type == "If" for node in made.model.graph.all_nodes()) == branches
