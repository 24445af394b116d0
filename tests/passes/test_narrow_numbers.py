"""NarrowNumbers: which float64 is made of positions and lengths, what it becomes, and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import seqc
from seqc.passes import NarrowNumbers
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.text import text
from seqc.verify import verify
from tests.helpers.modules import Applied

Function = Callable[[torch.Tensor], torch.Tensor]


def times_the_step(x: torch.Tensor) -> torch.Tensor:
    h, out = torch.zeros(x.shape[0], x.shape[2]), []
    for t in range(x.shape[1]):
        h = torch.tanh(h + x[:, t] + 0.01 * t)
        out.append(h)
    return torch.stack(out, 1)


def part_of_the_length(x: torch.Tensor) -> torch.Tensor:
    h, out = torch.zeros(x.shape[0], x.shape[2]), []
    for t in range(x.shape[1]):
        h = torch.tanh(h + (1 - t / x.shape[1]) * x[:, t])
        out.append(h)
    return torch.stack(out, 1)


def positions(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(x.shape[1], dtype=torch.float64)[:, None]


STAYS: dict[str, Function] = {
    "an angle": lambda x: x + torch.sin(0.01 * positions(x)).float(),
    "a power": lambda x: x * (0.99 ** positions(x)).float(),
    "a comparison": lambda x: torch.where(0.1 * positions(x) < 0.3, x, -x),
    "a sum over the steps": lambda x: x + (0.01 * positions(x)).cumsum(0).float(),
    "values of the model": lambda x: x + (x.double() / 3).float(),
}


def passed(function: Function) -> tuple[Program, Program, int]:
    program = seqc.trace(Applied(function), (torch.randn(2, 9, 3),))
    before = program.copy()
    (record,) = run_passes(program, [NarrowNumbers()])
    verify(program)
    return before, program, record.changes


@pytest.mark.parametrize("function", [times_the_step, part_of_the_length])
def test_numbers_made_of_positions_and_lengths_become_float32(function: Function) -> None:
    before, program, changes = passed(function)
    assert changes and "f64" in text(before) and "f64" not in text(program)
    assert any("a number made of positions is float32" in reason for reason in program.reasons)
    for length in (1, 2, 9, 300):
        x = torch.randn(3, length, 3)
        torch.testing.assert_close(program(x)[0], function(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STAYS)
def test_other_float64_stays(name: str) -> None:
    before, program, changes = passed(STAYS[name])
    assert changes == 0 and text(program) == text(before)


def test_it_runs_for_targets_without_float64_alone() -> None:
    for target, options in (("tensorrt", {"engines": "off"}), ("onnx", {})):
        made = seqc.compile(Applied(times_the_step), (torch.randn(2, 9, 3),), target=target, options=options)
        assert ("narrow_numbers" in [record["name"] for record in made.report["passes"]]) == (target == "tensorrt")
        x = torch.randn(3, 40, 3)
        torch.testing.assert_close(made(x), times_the_step(x), rtol=1e-5, atol=1e-5)
