"""MakeStateful on operations that treat each step by itself only together: tokens sorted by expert, and put back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import seqc
from seqc.errors import UnsupportedModelError
from seqc.program import Program
from tests.helpers.streams import in_pieces, random_pieces, stream_form

D, EXPERTS = 4, 3
Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Mixture(nn.Module):
    """Scores of experts for each token; ``function`` computes with all tokens of all rows in one axis."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.gate = nn.Linear(D, EXPERTS)
        self.scale = nn.Parameter(torch.randn(EXPERTS, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.cumsum(1).flatten(0, 1)
        chosen = self.gate(tokens).argmax(-1)
        return self.function(tokens * self.scale[chosen], chosen).view_as(x) + x


def sorted_by_expert(tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    order = chosen.argsort()
    there = torch.tanh(tokens[order] * (chosen[order] + 1)[:, None])
    return there[order.argsort()]


def sorted_and_left_so(tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return tokens[chosen.argsort()]


def added_up_in_that_order(tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    order = chosen.argsort()
    return tokens[order].cumsum(0)[order.argsort()]


def derived(function: Function, steps: int | None = None) -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    model = Mixture(function).eval()
    shapes = {"x": {0: "batch", 1: "sequence"}}
    return model, stream_form(seqc.trace(model, (torch.randn(2, 9, D),), dynamic_shapes=shapes), steps)


@pytest.mark.parametrize("rows", [1, 3])
def test_any_pieces_are_the_whole(rows: int) -> None:
    model, program = derived(sorted_by_expert)
    assert len(program.states) == 1  # of the running sum in front
    x = torch.randn(rows, 21, D)
    (pieces,) = in_pieces(program, {"x": x}, random_pieces(21))
    torch.testing.assert_close(pieces, model(x), rtol=1e-4, atol=1e-5)


def test_one_step_at_a_time_is_the_whole() -> None:
    model, program = derived(sorted_by_expert, steps=1)
    x = torch.randn(2, 8, D)
    (pieces,) = in_pieces(program, {"x": x}, [1] * 8)
    torch.testing.assert_close(pieces, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [sorted_and_left_so, added_up_in_that_order])
def test_what_mixes_the_steps_is_refused_with_its_line(function: Function) -> None:
    with pytest.raises(UnsupportedModelError, match="mixes the steps of the sequence") as refused:
        derived(function)
    assert "test_make_stateful_together.py" in str(refused.value)
