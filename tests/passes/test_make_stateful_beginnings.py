"""MakeStateful on what begins with the first steps, or with an input of its own: any pieces are the whole sequence."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

import seqc
from seqc.errors import UnsupportedModelError
from seqc.program import Program
from tests.helpers.streams import in_pieces, random_pieces, stream_form

D = 3


class Model(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def derived(model: nn.Module, *inputs: torch.Tensor, steps: int | None = None) -> Program:
    names = ["x", "start"][: len(inputs)]
    shapes = {n: {0: "batch", 1: "sequence"} if n == "x" else {0: "batch"} for n in names}
    return stream_form(seqc.trace(model.eval(), inputs, dynamic_shapes=shapes), steps)


def from_first_step(x: torch.Tensor) -> torch.Tensor:
    """The first state is computed from the first step, which the loop walks over too."""
    h = x[:, 0].tanh() * 2
    ys = []
    for t in range(x.shape[1]):
        h = torch.tanh(h * 0.9 + x[:, t])
        ys.append(h)
    return torch.stack(ys, 1)


def peeled(x: torch.Tensor) -> torch.Tensor:
    """The first step stands in front of the loop, and computes something else."""
    h = x[:, 0].sin()
    ys = [h * 3]
    for t in range(1, x.shape[1]):
        h = 0.8 * h + x[:, t].tanh()
        ys.append(h)
    return torch.stack(ys, 1)


def peeled_twice(x: torch.Tensor) -> torch.Tensor:
    h = x[:, 0].sin()
    ys = [h]
    h = h * x[:, 1].cos()
    ys.append(h)
    for t in range(2, x.shape[1]):
        h = 0.8 * h + x[:, t].tanh()
        ys.append(h * 2)
    return torch.stack(ys, 1)


BEGINNINGS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], list[str]]] = {
    "first step at every other": (lambda x: x * x[:, 0, None].cos(), ["past_key_values.0.first_steps[batch, 1, 3]"]),
    "first steps as a slice": (lambda x: x - x[:, :1], ["past_key_values.0.first_steps[batch, 1, 3]"]),
    "differences, a constant in front": (
        lambda x: torch.cat([torch.ones_like(x[:, :1]), x[:, 1:] - x[:, :-1]], 1),
        ["past_key_values.0.conv_state[batch, 1, 3]"],
    ),
    "differences, the first step in front": (
        lambda x: torch.cat([x[:, :1], x[:, 1:] - 0.5 * x[:, :-1]], 1),
        ["past_key_values.0.conv_state[batch, 1, 3]", "past_key_values.0.first_steps[batch, 1, 3]"],
    ),
    "differences, padded": (
        lambda x: nn.functional.pad(x[:, 1:] - x[:, :-1], (0, 0, 1, 0), value=2.0),
        ["past_key_values.0.conv_state[batch, 1, 3]"],
    ),
    "loop from the first step": (
        from_first_step,
        ["past_key_values.0.first_steps[batch, 1, 3]", "past_key_values.0.recurrent_state[batch, 3]"],
    ),
    "peeled loop": (peeled, []),
    "loop peeled twice": (peeled_twice, []),
    "last step, then a layer": (lambda x: torch.tanh(x[:, -1]) * 2, []),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_any_pieces_are_the_whole(name: str) -> None:
    function, states = BEGINNINGS[name]
    program = derived(Model(function), torch.randn(2, 9, D))
    found = [f"{p.name}[{', '.join(map(str, p.shape))}]" for p in program.inputs[1:] if "position" not in p.name]
    assert not states or found == states
    for rows, length, seed in ((1, 5, 0), (3, 17, 1), (2, 11, 2)):
        x = torch.randn(rows, length, D)
        (pieces,) = in_pieces(program, {"x": x}, random_pieces(x.shape[1], seed))
        torch.testing.assert_close(pieces, function(x), rtol=1e-4, atol=1e-5)
    (pieces,) = in_pieces(derived(Model(function), torch.randn(2, 9, D), steps=1), {"x": x}, [1] * x.shape[1])
    expected = function(x)
    torch.testing.assert_close(pieces if expected.dim() == 3 else pieces[:, -D:], expected, rtol=1e-4, atol=1e-5)


class Started(nn.Module):
    """A loop, and a layer, whose first states are inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(D, D, batch_first=True)

    def forward(self, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        h, ys = start, []
        for t in range(x.shape[1]):
            h = torch.tanh(h * 0.9 + x[:, t])
            ys.append(h)
        y, _ = self.layer(torch.stack(ys, 1), start[None].sin())
        return y


def test_inputs_without_steps_are_first_states() -> None:
    torch.manual_seed(0)
    model = Started()
    program = derived(model, torch.randn(2, 9, D), torch.randn(2, D))
    x, start = torch.randn(3, 14, D), torch.randn(3, D)
    states = [s.initial if s.batch_axis is None else torch.cat([s.initial] * 3, s.batch_axis) for s in program.states]
    generator = random.Random(0)
    ys, at = [], 0
    while at < x.shape[1]:
        count = generator.choice([1, 2, 5])
        # Later calls do not read it any more.
        y, *states = program(x[:, at : at + count], start if at == 0 else start * 0 - 7, *states)
        ys.append(y)
        at += count
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(ys, 1), model(x, start), rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "second step at the first": (
        lambda x: x * x[:, 1, None],
        "step 1 of the sequence, counted from 0, is read at step 0",
    ),
    "mean of the first steps": (lambda x: x - x[:, :4].mean(1, keepdim=True), "known at the end of the sequence only"),
    "differences to the next": (
        lambda x: torch.cat([x[:, 1:] - x[:, :-1], x[:, -1:]], 1),
        "put together in another order|later step",
    ),
    "loop from the second step": (
        lambda x: from_first_step(x) * x[:, 1, None],
        "step 1 of the sequence, counted from 0, is read at step 0",
    ),
    "last step in front": (lambda x: torch.cat([x[:, -1:], x[:, 1:]], 1), "some steps of the sequence are read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_known_later_is_refused_with_its_line(name: str) -> None:
    function, why = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=why) as refused:
        derived(Model(function), torch.randn(2, 9, D))
    assert "test_make_stateful_beginnings.py" in str(refused.value)
