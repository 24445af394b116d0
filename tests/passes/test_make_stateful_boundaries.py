"""MakeStateful on chunks that begin at fixed places: the steps of the last one are kept, and what was carried before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqc
from seqc.errors import UnsupportedModelError
from seqc.program import Program
from tests.helpers.streams import in_pieces, random_pieces, stream_form

D = 3
CHUNK = 5
Function = Callable[[torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """A module of one function."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def in_chunks(x: torch.Tensor) -> torch.Tensor:
    """[batch, chunks, CHUNK, D] with zeros behind the last step."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % CHUNK)).reshape(x.shape[0], -1, CHUNK, D)


def padded(x: torch.Tensor) -> torch.Tensor:
    """A state that decays behind the last step too."""
    chunks = in_chunks(x)
    state, ys = x.new_zeros(x.shape[0], D), []
    for i in range(chunks.shape[1]):
        ys.append(chunks[:, i].cumsum(1) + state[:, None])
        state = torch.tanh(state * 0.5 + chunks[:, i].sum(1))
    return torch.cat(ys, 1)[:, : x.shape[1]]


def ragged(x: torch.Tensor) -> torch.Tensor:
    """Two states, one of which the other reads."""
    fast, slow, ys = x.new_zeros(x.shape[0], D), x.new_ones(x.shape[0], D), []
    for start in range(0, x.shape[1], CHUNK):
        part = x[:, start : start + CHUNK]
        ys.append(part.cummax(1).values * slow[:, None] + fast[:, None])
        fast, slow = torch.tanh(part.mean(1) - slow), 0.5 * slow + 0.25 * fast
    return torch.cat(ys, 1)


def sums_of_chunks_from_their_beginning(x: torch.Tensor) -> torch.Tensor:
    return in_chunks(x).cumsum(2).reshape(x.shape[0], -1, D)[:, : x.shape[1]]


def two_inputs_of_a_chunk(x: torch.Tensor) -> torch.Tensor:
    """Attention within each chunk: its keys and its values are kept."""
    q, k, v = in_chunks(x.sin()), in_chunks(x.cos()), in_chunks(x)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2)).masked_fill(later, -torch.inf)
    return (scores.softmax(-1) @ v).reshape(x.shape[0], -1, D)[:, : x.shape[1]]


def one_behind_the_other(x: torch.Tensor) -> torch.Tensor:
    return ragged(padded(x) * 0.5) + x


STEPS = "past_key_values.0.chunk{}[batch, pending, 3]"
STATE = "past_key_values.0.recurrent_state{}[batch, 3]"
STREAMS: dict[str, tuple[Function, list[str]]] = {
    "filled up": (padded, [STEPS.format(""), STATE.format("")]),
    "ragged": (ragged, [STEPS.format(""), STATE.format(""), STATE.format("_2")]),
    "nothing carried": (sums_of_chunks_from_their_beginning, [STEPS.format("")]),
    "attention within chunks": (
        two_inputs_of_a_chunk,
        [STEPS.format(""), STEPS.format("_2"), STEPS.format("_3")],
    ),
    "one behind the other": (
        one_behind_the_other,
        [STEPS.format(""), STATE.format(""), STEPS.format("_2"), STATE.format("_2"), STATE.format("_3")],
    ),
}


def derived(function: Function, steps: int | None = None) -> Program:
    torch.manual_seed(0)
    shapes = {"x": {0: "batch", 1: "sequence"}}
    return stream_form(seqc.trace(Model(function).eval(), (torch.randn(2, 13, D),), dynamic_shapes=shapes), steps)


@pytest.mark.parametrize("name", STREAMS)
def test_any_pieces_are_the_whole(name: str) -> None:
    function, states = STREAMS[name]
    program = derived(function)
    found = [f"{p.name}[{', '.join(map(str, p.shape))}]" for p in program.inputs[1:]]
    assert sorted(found) == sorted(states)
    assert program.outputs[0].shape == ("batch", "sequence", 3)
    torch.manual_seed(1)
    for rows, length, seed in ((1, 4, 0), (3, 23, 1), (2, 40, 2)):
        x = torch.randn(rows, length, D)
        (pieces,) = in_pieces(program, {"x": x}, random_pieces(x.shape[1], seed))
        torch.testing.assert_close(pieces, function(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STREAMS)
def test_one_step_at_a_time_is_the_whole(name: str) -> None:
    function, _ = STREAMS[name]
    x = torch.randn(2, 12, D)
    (pieces,) = in_pieces(derived(function, steps=1), {"x": x}, [1] * x.shape[1])
    torch.testing.assert_close(pieces, function(x), rtol=1e-4, atol=1e-5)


def test_no_more_steps_are_kept_than_a_chunk_has() -> None:
    program = derived(padded)
    (pending,) = (d for d in program.dims if d.name == "pending")
    assert (pending.min, pending.max) == (0, CHUNK)
    states = [s.initial for s in program.states]
    at = next(i for i, s in enumerate(program.states) if s.pending is not None)
    sizes = []
    for steps in (1, 3, 1, 1, 9, 5):
        states = list(program(torch.randn(1, steps, D), *states)[1:])
        sizes.append(states[at].shape[1])
    assert sizes == [1, 4, 5, 1, 5, 5]


def whole_chunks_only(x: torch.Tensor) -> torch.Tensor:
    """What a step gives changes when its chunk is full."""
    count, state, ys = x.shape[1] // CHUNK, x.new_zeros(x.shape[0], D), []
    for i in range(count):
        part = x[:, CHUNK * i : CHUNK * (i + 1)]
        ys.append(part.cumsum(1) + state[:, None])
        state = torch.tanh(part.sum(1))
    return torch.cat([*ys, x[:, CHUNK * count :]], 1)


def centred(x: torch.Tensor) -> torch.Tensor:
    """Each step reads the later ones of its chunk."""
    ys = []
    for start in range(0, x.shape[1], CHUNK):
        part = x[:, start : start + CHUNK]
        ys.append(part - part.mean(1, keepdim=True))
    return torch.cat(ys, 1)


def begun_with_the_mean(x: torch.Tensor) -> torch.Tensor:
    state, ys = x.mean(1), []
    for start in range(0, x.shape[1], CHUNK):
        part = x[:, start : start + CHUNK]
        ys.append(part.cumsum(1) + state[:, None])
        state = torch.tanh(state + part.sum(1))
    return torch.cat(ys, 1)


REFUSED = {
    "whole chunks only": (whole_chunks_only, "does not walk along all chunks of 5 steps"),
    "later steps of a chunk": (centred, "does not go on from the end or a chunk"),
    "first state of the sequence": (begun_with_the_mean, "begins with a value of the sequence"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_later_steps_change_is_refused_with_its_line(name: str) -> None:
    function, why = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=why) as refused:
        derived(function)
    assert "test_make_stateful_boundaries.py" in str(refused.value)
