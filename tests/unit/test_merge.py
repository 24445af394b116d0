"""Numbers that differ between two traces become functions of the sizes; those that fit none are refused."""

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

SHAPES = {"x": {0: "batch", 1: "sequence"}}
Function = Callable[[torch.Tensor], torch.Tensor]


class Module(nn.Module):
    """In this file, because refusals name the line of the forward that they come from."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


def traced(function: Function) -> Program:
    return seqc.trace(Module(function), (torch.randn(2, 9, 4),), SHAPES)


def decayed(x: torch.Tensor, steps: range) -> torch.Tensor:
    h, out = x[:, 0] * 0, []
    for t in steps:
        h = torch.tanh(0.5 * h + x[:, t])
        out.append(h)
    return torch.stack(out, 1)


def trip(program: Program) -> str:
    (loop,) = [n for n in program.graph.nodes if is_recurrence(n)]
    count = parts(loop).trip
    return str(program.size_of(count.meta["val"]))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (lambda length: range(length), "sequence"),
        (lambda length: range(1, length), "sequence - 1"),
        (lambda length: range(length - 2), "sequence - 2"),
        (lambda length: range(0, length, 2), "((sequence + 1)//2)"),
        (lambda length: range(length // 2), "(sequence//2)"),
        (lambda length: range(2, length, 3), "(sequence//3)"),
    ],
)
def test_trip_counts(steps: Callable[[int], range], expected: str) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return decayed(x, steps(x.shape[1]))

    program = traced(function)
    assert trip(program) == expected
    for length in (4, 5, 6, 8, 30, 31):
        x = torch.randn(3, length, 4)
        torch.testing.assert_close(program(x)[0], function(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + torch.arange(int(x.shape[1]))[:, None],
        lambda x: x * torch.full((int(x.shape[1]), 1), 0.5) / int(x.shape[1]),
        lambda x: x.reshape(int(x.shape[0]), int(x.shape[1]) * 4),
        lambda x: x[:, : int(x.shape[1]) // 2].sum(1),
    ],
    ids=["arange", "full", "reshape", "half"],
)
def test_numbers_taken_by_int_stay_symbolic(function: Function) -> None:
    program = traced(function)
    for batch, length in ((1, 5), (3, 6), (4, 30), (2, 31)):
        x = torch.randn(batch, length, 4)
        torch.testing.assert_close(program(x)[0], function(x))


def test_a_number_that_fits_no_function_of_the_sizes_is_refused_with_its_line() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        odd = {5: 3, 7: 1, 8: 2}.get(int(x.shape[1]), int(x.shape[1]) ** 2 % 11)
        return x.sum(1) + torch.arange(4 * odd * odd).sum()  # the culprit

    with pytest.raises(UnsupportedModelError, match=r"test_merge\.py:\d+.*at another length"):
        traced(function)


def test_numbers_that_do_not_depend_on_the_length_stay_numbers() -> None:
    program = traced(lambda x: decayed(x, range(x.shape[1])) * 3 + torch.arange(4))
    assert all(type(a) is not torch.SymInt for n in program.graph.nodes for a in n.args)
    (arange,) = [n for n in program.graph.nodes if n.target is torch.ops.aten.arange.default]
    assert arange.args[0] == 4
