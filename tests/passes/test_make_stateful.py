"""MakeStateful: the derived step form, in any pieces, is the whole sequence; what looks ahead is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqc
from seqc.errors import UnsupportedModelError
from seqc.passes import MakeStateful
from seqc.program import Program
from seqc.text import text
from seqc.verify import verify
from tests.helpers.programs import capture_program
from tests.helpers.streams import in_pieces, random_pieces, stream_form

D = 4


class Model(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[..., torch.Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, *self.parts)


def derived(model: nn.Module) -> Program:
    torch.manual_seed(0)
    return stream_form(capture_program(model, torch.randn(2, 9, D)))


def check(model: nn.Module, program: Program, rows: int = 3, length: int = 23) -> None:
    torch.manual_seed(1)
    x = torch.randn(rows, length, D)
    with torch.no_grad():
        whole = model(x)
    for seed in range(2):
        (pieces,) = in_pieces(program, {"x": x}, random_pieces(x.shape[1], seed))
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)


def lower(n: int) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def scores(x: torch.Tensor) -> torch.Tensor:
    return x @ x.transpose(1, 2) / 2


def rotary(x: torch.Tensor) -> torch.Tensor:
    angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.3])
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def shifted(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.shape[0], x.shape[1], 2, 2).transpose(1, 2)


CAUSAL: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], list[nn.Module]], list[str]]] = {
    "each step by itself": (lambda x, f: F.silu(f(x)), lambda: [nn.Linear(D, D)], []),
    "norm of each step": (lambda x, f: f(x) * x.softmax(-1), lambda: [nn.LayerNorm(D)], []),
    "heads merged with the batch and the steps": (
        lambda x, f: (
            f(x.reshape(-1, 2)).reshape(x.shape)
            + x.transpose(0, 1).reshape(-1, D).reshape(-1, *x.shape[::2]).transpose(0, 1)
        ),
        lambda: [nn.LayerNorm(2)],
        [],
    ),
    "merged with the batch": (lambda x, f: f(x.reshape(-1, D)).reshape(x.shape), lambda: [nn.Linear(D, D)], []),
    "convolution padded on both sides": (
        lambda x, f: f(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2),
        lambda: [nn.Conv1d(D, D, 4, padding=3, groups=D)],
        ["past_key_values.0.conv_state[batch, 4, 3]"],
    ),
    "dilated convolution padded in front": (
        lambda x, f: f(F.pad(x.transpose(1, 2), (4, 0))).transpose(1, 2),
        lambda: [nn.Conv1d(D, D, 3, dilation=2)],
        ["past_key_values.0.conv_state[batch, 4, 4]"],
    ),
    "step before, by cat": (lambda x: x + 2 * shifted(x), list, ["past_key_values.0.conv_state[batch, 1, 4]"]),
    "step before, by pad": (lambda x: x * F.pad(x, (0, 0, 1, -1)), list, ["past_key_values.0.conv_state[batch, 1, 4]"]),
    "step before the step before": (
        lambda x: shifted(shifted(x) + x),
        list,
        ["past_key_values.0.conv_state[batch, 1, 4]", "past_key_values.0.conv_state_2[batch, 1, 4]"],
    ),
    "as many as there are, counted from the end": (
        lambda x: torch.cat([x.cumsum(1), x], 2)[:, -x.shape[1] :, :D],
        list,
        ["past_key_values.0.recurrent_state[batch, 2, 4]"],
    ),
    "a place in front that is not read": (
        lambda x: torch.cat([torch.zeros(x.shape[0], x.shape[1] + 1, D)[:, :1], x], 1)[:, 1:].cumsum(1),
        list,
        ["past_key_values.0.recurrent_state[batch, 2, 4]"],
    ),
    "padding that is no zero": (
        lambda x: F.pad(x, (0, 0, 2, 0), value=3.0)[:, : x.shape[1]] + x,
        list,
        ["past_key_values.0.conv_state[batch, 2, 4]"],
    ),
    "running sum": (lambda x: x.cumsum(1), list, ["past_key_values.0.recurrent_state[batch, 2, 4]"]),
    "running sum of infinities": (
        lambda x: torch.exp(torch.where(x > 1, -math.inf, -x.abs()).cumsum(1)),
        list,
        ["past_key_values.0.recurrent_state[batch, 2, 4]"],
    ),
    "running mean": (
        lambda x: x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None],
        list,
        ["past_key_values.0.recurrent_state[batch, 2, 4]", "past_position[]"],
    ),
    "log of a running sum": (
        lambda x: x.logcumsumexp(1),
        list,
        ["past_key_values.0.recurrent_state[batch, 1, 4]"],
    ),
    "recurrent layer": (
        lambda x, f: f(x)[0],
        lambda: [nn.GRU(D, D, num_layers=2, batch_first=True)],
        ["past_key_values.0.recurrent_state[2, batch, 4]"],
    ),
    "learned positions": (
        lambda x, f: x + f(torch.arange(x.shape[1])),
        lambda: [nn.Embedding(64, D)],
        ["past_position[]"],
    ),
    "rotary positions": (rotary, list, ["past_position[]"]),
    "positions with an upper limit": (
        lambda x: x * torch.arange(x.shape[1]).clamp(max=6)[:, None],
        list,
        ["past_position[]"],
    ),
    "scaled_dot_product_attention, is_causal": (
        lambda x: (
            F.scaled_dot_product_attention(heads(x), heads(x) * 2, heads(x) + 1, is_causal=True)
            .transpose(1, 2)
            .reshape(x.shape)
        ),
        list,
        [
            "past_key_values.0.key[batch, 2, capacity, 2]",
            "past_key_values.0.value[batch, 2, capacity, 2]",
            "past_position[]",
        ],
    ),
    "scaled_dot_product_attention, mask": (
        lambda x: F.scaled_dot_product_attention(x, x * 2, x + 1, attn_mask=lower(x.shape[1])),
        list,
        ["past_key_values.0.key[batch, capacity, 4]", "past_key_values.0.value[batch, capacity, 4]", "past_position[]"],
    ),
    "scaled_dot_product_attention, window": (
        lambda x: F.scaled_dot_product_attention(
            x,
            x * 2,
            x + 1,
            attn_mask=(torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1]) < 3) & lower(x.shape[1]),
        ),
        list,
        ["past_key_values.0.key[batch, 2, 4]", "past_key_values.0.value[batch, 2, 4]", "past_position[]"],
    ),
    "softmax of masked scores": (
        lambda x: scores(x).masked_fill(~lower(x.shape[1]), float("-inf")).softmax(-1) @ (x + 1),
        list,
        ["past_key_values.0.key[batch, capacity, 4]", "past_key_values.0.value[batch, capacity, 4]", "past_position[]"],
    ),
    "mask added to scores": (
        lambda x: (scores(x) + torch.full((x.shape[1], x.shape[1]), -1e38).triu(1)).softmax(-1) @ (x + 1),
        list,
        ["past_key_values.0.key[batch, capacity, 4]", "past_key_values.0.value[batch, capacity, 4]", "past_position[]"],
    ),
    "bias by relative positions": (
        lambda x, f: (
            (scores(x) + f((torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).clamp(0, 7)).squeeze(-1))
            .masked_fill(~lower(x.shape[1]), float("-inf"))
            .softmax(-1)
            @ (x + 1)
        ),
        lambda: [nn.Embedding(8, 1)],
        ["past_key_values.0.key[batch, capacity, 4]", "past_key_values.0.value[batch, capacity, 4]", "past_position[]"],
    ),
    "masked scores without a softmax": (
        lambda x: scores(x).tril() @ (x + 1),
        list,
        ["past_key_values.0.key[batch, capacity, 4]", "past_key_values.0.value[batch, capacity, 4]", "past_position[]"],
    ),
    "last step": (lambda x, f: f(x)[:, -1], lambda: [nn.Linear(D, D)], []),
    "mean over all steps": (
        lambda x: x.mean(1),
        list,
        ["past_key_values.0.cache[batch, capacity, 4]", "past_position[]"],
    ),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_any_pieces_are_the_whole(name: str) -> None:
    function, parts, states = CAUSAL[name]
    torch.manual_seed(0)
    model = Model(function, *parts()).eval()
    program = derived(model)
    found = [f"{p.name}[{', '.join(map(str, p.shape))}]" for p in program.inputs[1:]]
    assert found == states
    check(model, program)


AHEAD: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], list[nn.Module]], str]] = {
    "convolution around the step": (
        lambda x, f: f(x.transpose(1, 2)).transpose(1, 2),
        lambda: [nn.Conv1d(D, D, 3, padding=1)],
        "a later step is read",
    ),
    "merged with the heads in two orders": (
        lambda x: (x.reshape(-1, 2) * heads(x).reshape(-1, 2)).reshape(x.shape),
        list,
        "mixes the steps",
    ),
    "step behind": (lambda x: F.pad(x, (0, 0, -1, 1)) + x, list, "a later step is read"),
    "softmax over the sequence": (lambda x: x.softmax(1), list, "a softmax over the sequence reads later steps"),
    "attention without a mask": (
        lambda x: F.scaled_dot_product_attention(x, x, x),
        list,
        "each step attends to later ones",
    ),
    "attention with a mask that is not causal": (
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(x.shape[1], x.shape[1]).tril(1) > 0),
        list,
        "each step attends to later ones",
    ),
    "scores without a mask": (lambda x: scores(x).softmax(-1) @ x, list, "each step reads later ones"),
    "norm over the sequence": (lambda x: x - x.mean(1, keepdim=True), list, "known at the end of the sequence only"),
    "last step at every other": (lambda x: x * x[:, -1:], list, "read at every other"),
    "reversed": (lambda x: x.flip(1), list, "no rule"),
    "recurrent layer in both directions": (
        lambda x, f: f(x)[0],
        lambda: [nn.GRU(D, D, batch_first=True, bidirectional=True)],
        "the layer walks from the end",
    ),
    "length of the sequence as a number": (lambda x: x.cumsum(1) / x.shape[1], list, "length of the whole sequence"),
    "positions from the end": (
        lambda x: (x * torch.arange(x.shape[1] - 1, -1, -1)[:, None]).cumsum(1),
        list,
        "mixes the steps",
    ),
    "spectrum": (lambda x: torch.fft.rfft(x, dim=1).abs().sum(1, keepdim=True) + x, list, "no streaming form"),
}


@pytest.mark.parametrize("name", AHEAD)
def test_what_looks_ahead_is_refused_with_its_line(name: str) -> None:
    function, parts, why = AHEAD[name]
    with pytest.raises(UnsupportedModelError, match=why) as refused:
        derived(Model(function, *parts()))
    assert "test_make_stateful.py" in str(refused.value)


def part_of_the_length(x: torch.Tensor) -> torch.Tensor:
    h, out = torch.zeros(x.shape[0], D), []
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] + h / x.shape[1])
        out.append(h)
    return torch.stack(out, 1)


def part_of_the_rows(x: torch.Tensor) -> torch.Tensor:
    h, out = torch.zeros(x.shape[0], D), []
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] + h / x.shape[0]) / x.shape[0] ** 0.5
        out.append(h)
    return torch.stack(out, 1).cumsum(1) / x.shape[0] ** 0.5


def test_a_loop_that_computes_with_the_length_is_refused_and_with_the_batch_goes_on() -> None:
    with pytest.raises(UnsupportedModelError, match=r"computes with the length of the whole.*test_make_stateful\.py"):
        stream_form(seqc.trace(Model(part_of_the_length), (torch.randn(2, 9, D),)))
    model = Model(part_of_the_rows)
    check(model, stream_form(seqc.trace(model, (torch.randn(2, 9, D),))))


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(D, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = c = x.new_zeros(x.shape[0], D)
        out = []
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            out.append(h)
        return torch.stack(out, 1)


def test_a_loop_goes_on_from_its_states() -> None:
    torch.manual_seed(0)
    model = Loop().eval()
    program = seqc.trace(model, (torch.randn(2, 9, D),))
    one = program.copy()
    MakeStateful()(program)
    assert [s.name for s in program.states] == [
        "past_key_values.0.recurrent_state",
        "past_key_values.0.recurrent_state_2",
    ]
    check(model, program)
    MakeStateful(steps=1)(one)
    verify(one)
    assert "recurrence" not in text(one)
    x = torch.randn(3, 7, D)
    torch.testing.assert_close(in_pieces(one, {"x": x}, [1] * x.shape[1])[0], model(x), rtol=1e-4, atol=1e-5)
