"""MakeStateful on what computes in chunks: in any pieces it is the whole sequence, where it goes on from its own states."""

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


class Model(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def filled_up(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[1] % CHUNK))


def in_chunks(x: torch.Tensor) -> torch.Tensor:
    """[batch, chunks, CHUNK, D] with zeros behind the last step."""
    return filled_up(x).reshape(x.shape[0], -1, CHUNK, D)


def segments(x: torch.Tensor) -> torch.Tensor:
    """exp of the sums of ``x`` [..., n] from each element to each later one, 0 elsewhere: [..., n, n]."""
    n = x.shape[-1]
    lower = torch.ones(n, n, dtype=torch.bool).tril(-1)
    sums = x[..., None].expand(*x.shape, n).masked_fill(~lower, 0).cumsum(-2)
    return sums.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).exp()


def dual_form(x: torch.Tensor) -> torch.Tensor:
    """State space duality (arXiv 2405.21060, listing 1): within chunks, and from each chunk to all later ones."""
    decay = in_chunks(-F.softplus(x))[..., 0]
    v, k, q = in_chunks(x), in_chunks(x.sin()), in_chunks(x.cos() * 0.5)
    sums = decay.cumsum(-1)
    within = ((q @ k.transpose(-1, -2)) * segments(decay)) @ v
    states = (k * (sums[..., -1:] - sums).exp()[..., None]).transpose(-1, -2) @ v
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    carried = segments(F.pad(sums[..., -1], (1, 0)))
    states = torch.einsum("bzc,bcnp->bznp", carried, states)[:, :-1]
    y = within + (q @ states) * sums.exp()[..., None]
    return y.reshape(x.shape[0], -1, D)[:, : x.shape[1]] + x


def loop_over_chunks(x: torch.Tensor) -> torch.Tensor:
    """Linear attention with a decay for each step."""
    decay = in_chunks(-F.softplus(x))[..., 0].cumsum(-1)
    v, k, q = in_chunks(x), in_chunks(x.sin()), in_chunks(x.cos())
    state = x.new_zeros(x.shape[0], D, D)
    lower = torch.ones(CHUNK, CHUNK).tril()
    ys = []
    for i in range(v.shape[1]):
        g = decay[:, i]
        scores = (q[:, i] @ k[:, i].transpose(1, 2)) * lower * (g[:, :, None] - g[:, None]).exp()
        ys.append(scores @ v[:, i] + (q[:, i] * g.exp()[..., None]) @ state)
        left = (g[:, -1:] - g).exp()[..., None]
        state = state * g[:, -1].exp()[:, None, None] + (k[:, i] * left).transpose(1, 2) @ v[:, i]
    return torch.cat(ys, 1)[:, : x.shape[1]]


def sums_of_chunks(x: torch.Tensor) -> torch.Tensor:
    """A running sum, by sums within chunks and of the chunks before."""
    within = in_chunks(x).cumsum(2)
    before = torch.cat([torch.zeros_like(within[:, :1, -1]), within[:, :, -1]], 1).cumsum(1)[:, :-1]
    return (within + before[:, :, None]).reshape(x.shape[0], -1, D)[:, : x.shape[1]]


def twice(x: torch.Tensor) -> torch.Tensor:
    return sums_of_chunks(torch.tanh(dual_form(x)))


STREAMS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], list[str]]] = {
    "state space duality": (dual_form, ["past_key_values.0.recurrent_state[batch, 1, 3, 3]"]),
    "loop over chunks": (loop_over_chunks, ["past_key_values.0.recurrent_state[batch, 3, 3]"]),
    "running sum": (sums_of_chunks, ["past_key_values.0.recurrent_state[batch, 1, 3]"]),
    "one behind the other": (
        twice,
        ["past_key_values.0.recurrent_state[batch, 1, 3, 3]", "past_key_values.0.recurrent_state_2[batch, 1, 3]"],
    ),
    "each step by itself": (lambda x: in_chunks(x).tanh().reshape(x.shape[0], -1, D)[:, : x.shape[1]], []),
}


def derived(model: nn.Module, steps: int | None = None) -> Program:
    torch.manual_seed(0)
    shapes = {"x": {0: "batch", 1: "sequence"}}
    return stream_form(seqc.trace(model.eval(), (torch.randn(2, 13, D),), dynamic_shapes=shapes), steps)


@pytest.mark.parametrize("name", STREAMS)
def test_any_pieces_are_the_whole(name: str) -> None:
    function, states = STREAMS[name]
    program = derived(Model(function))
    assert [f"{p.name}[{', '.join(map(str, p.shape))}]" for p in program.inputs[1:]] == states
    assert program.outputs[0].shape == ("batch", "sequence", 3)
    torch.manual_seed(1)
    for rows, length, seed in ((1, 4, 0), (3, 23, 1), (2, 40, 2)):
        x = torch.randn(rows, length, D)
        (pieces,) = in_pieces(program, {"x": x}, random_pieces(x.shape[1], seed))
        torch.testing.assert_close(pieces, function(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [dual_form, loop_over_chunks, sums_of_chunks])
def test_one_step_at_a_time_is_the_whole_in_chunks_of_one(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    program = derived(Model(function), steps=1)
    x = torch.randn(2, 12, D)
    (pieces,) = in_pieces(program, {"x": x}, [1] * x.shape[1])
    torch.testing.assert_close(pieces, function(x), rtol=1e-4, atol=1e-5)
    shapes = [tuple(n.meta["val"].shape) for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert all(CHUNK not in shape for shape in shapes)


def test_a_chunk_as_long_as_another_axis_stays_a_chunk() -> None:
    """Chunks of three steps of three numbers."""

    def function(x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (0, 0, 0, -x.shape[1] % 3)).reshape(x.shape[0], -1, 3, 3)
        before = torch.cat([torch.zeros_like(padded[:, :1, 0]), padded.sum(2)], 1).cumsum(1)[:, :-1]
        return (padded.cumsum(2) + before[:, :, None]).reshape(x.shape[0], -1, 3)[:, : x.shape[1]]

    program = derived(Model(function), steps=1)
    x = torch.randn(2, 8, 3)
    (pieces,) = in_pieces(program, {"x": x}, [1] * x.shape[1])
    torch.testing.assert_close(pieces, function(x), rtol=1e-4, atol=1e-5)


def test_states_of_chunks_in_float16_are_float32_and_lose_nothing_to_pieces() -> None:
    torch.manual_seed(0)
    shapes = {"x": {0: "batch", 1: "sequence"}}
    program = stream_form(seqc.trace(Model(sums_of_chunks), (torch.randn(2, 13, D).half(),), dynamic_shapes=shapes))
    assert [s.initial.dtype for s in program.states] == [torch.float32]
    assert program.outputs[0].dtype is torch.float16
    x = torch.rand(1, 4000, D).half()
    (pieces,) = in_pieces(program, {"x": x}, [16] * 250)
    exact = x.double().cumsum(1)
    assert ((pieces - exact) / exact).abs().max() <= 2**-11


def test_a_compiled_model_is_checked_in_pieces() -> None:
    """And its dimension of steps is found where the last chunk's rest is cut off."""
    shapes = {"x": {0: "batch", 1: "sequence"}}
    compiled = seqc.compile(Model(sums_of_chunks), {"x": torch.randn(2, 9, D)}, dynamic_shapes=shapes, stateful=True)
    assert compiled.report["check_in_chunks"]["error"] < 1e-4


def all_chunks(x: torch.Tensor) -> torch.Tensor:
    chunks = in_chunks(x)
    return (chunks + chunks.sum((1, 2), keepdim=True)).reshape(x.shape[0], -1, D)[:, : x.shape[1]]


REFUSED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "mean of each chunk": (
        lambda x: (in_chunks(x) - in_chunks(x).mean(2, keepdim=True)).reshape(x.shape[0], -1, D)[:, : x.shape[1]],
        "does not go on from the end or a chunk of a piece",
    ),
    "all chunks": (all_chunks, "does not go on from the end or a chunk of a piece"),
    "one element a chunk": (lambda x: in_chunks(x).sum(2), "has not one element for each step"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_on_is_refused_with_its_line(name: str) -> None:
    function, why = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=why) as refused:
        derived(Model(function))
    assert "test_make_stateful_chunks.py" in str(refused.value)
