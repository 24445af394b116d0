"""Attention over a window keeps the window: a state of fixed size, however the mask is spelled; no other mask does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqc
from seqc.program import Program
from seqc.runtime import Session, load
from tests.helpers.modules import Applied
from tests.helpers.programs import capture_program
from tests.helpers.streams import in_pieces, random_pieces, stream_form

D, WINDOW = 4, 5
Function = Callable[[torch.Tensor], torch.Tensor]


def back(x: torch.Tensor) -> torch.Tensor:
    """How many steps back each step reads."""
    at = torch.arange(x.shape[1])
    return at[:, None] - at


def inside(x: torch.Tensor) -> torch.Tensor:
    return (back(x) >= 0) & (back(x) < WINDOW)


def scores(x: torch.Tensor) -> torch.Tensor:
    return x @ x.transpose(1, 2) / 2


def whole(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x * 2, x + 1, attn_mask=mask)


def by_hand(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scores(x).masked_fill(~mask, float("-inf")).softmax(-1) @ (x + 1)


def square(x: torch.Tensor, value: float | bool) -> torch.Tensor:
    return torch.full((x.shape[1], x.shape[1]), value)


def grouped(x: torch.Tensor) -> torch.Tensor:
    """Two heads of queries read one of keys, repeated."""
    q = x.reshape(x.shape[0], x.shape[1], 2, 2).transpose(1, 2)
    k = x[:, None, :, :2].expand(-1, 2, -1, -1)
    found = F.scaled_dot_product_attention(q, k, k + 1, attn_mask=inside(x))
    return found.transpose(1, 2).reshape(x.shape)


def chunk(x: torch.Tensor) -> torch.Tensor:
    at = torch.arange(x.shape[1]) // WINDOW
    return (at[:, None] == at) & (back(x) >= 0)


def sinks(x: torch.Tensor, count: int) -> torch.Tensor:
    return ((back(x) < WINDOW) | (torch.arange(x.shape[1]) < count)) & (back(x) >= 0)


WINDOWS: dict[str, Function] = {
    "differences of positions": lambda x: whole(x, inside(x)),
    "two triangles": lambda x: whole(x, square(x, True).tril().triu(1 - WINDOW)),
    "numbers added to scores": lambda x: (
        (scores(x) + square(x, -1e38).triu(1) + square(x, -1e38).tril(-WINDOW)).softmax(-1) @ (x + 1)
    ),
    "a mask of numbers": lambda x: whole(x, torch.where(inside(x), 0.0, float("-inf"))),
    "masked scores": lambda x: by_hand(x, inside(x)),
    "scores cut to a band, no softmax": lambda x: scores(x).tril().triu(1 - WINDOW) @ (x + 1),
    "scores times a mask": lambda x: (scores(x) * inside(x)) @ (x + 1),
    "a bias by distance": lambda x: (scores(x) - 0.1 * back(x)).masked_fill(~inside(x), -1e38).softmax(-1) @ (x + 1),
    "every second step of the window": lambda x: by_hand(x, inside(x) & (back(x) % 2 == 0)),
    "chunks": lambda x: by_hand(x, chunk(x)),
    "keys that are repeated": grouped,
}

NO_WINDOWS: dict[str, Function] = {
    "all before": lambda x: by_hand(x, back(x) >= 0),
    "first step always seen": lambda x: whole(x, sinks(x, 1)),
    "first steps always seen": lambda x: by_hand(x, sinks(x, 3)),
    "every second step": lambda x: by_hand(x, (back(x) >= 0) & (back(x) % 2 == 0)),
    "a window that grows": lambda x: by_hand(
        x, (back(x) >= 0) & (back(x) < WINDOW + torch.arange(x.shape[1])[:, None] // 2)
    ),
    "numbers that are not large": lambda x: (
        (scores(x).masked_fill(back(x) < 0, -1e38) + square(x, -3.0).tril(-WINDOW)).softmax(-1) @ (x + 1)
    ),
}


def derived(function: Function) -> Program:
    torch.manual_seed(0)
    return stream_form(capture_program(Applied(function), torch.randn(2, 9, D)))


def lengths(program: Program) -> set[int | str]:
    """The sizes of the caches along the steps."""
    caches = [s.name for s in program.states if s.batch_axis is not None]
    assert caches
    return {p.shape[-2] for p in program.inputs if p.name in caches}


def check(function: Function, program: Program) -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 4 * WINDOW + 3, D)
    for pieces in (random_pieces(x.shape[1]), [2 * WINDOW, 2 * WINDOW, 3]):
        (found,) = in_pieces(program, {"x": x}, pieces)
        torch.testing.assert_close(found, function(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_what_is_kept(name: str) -> None:
    program = derived(WINDOWS[name])
    assert lengths(program) == {WINDOW - 1}
    assert [d.name for d in program.dims] == ["batch", "sequence"]
    check(WINDOWS[name], program)


@pytest.mark.parametrize("name", NO_WINDOWS)
def test_what_is_no_window_is_kept_whole(name: str) -> None:
    program = derived(NO_WINDOWS[name])
    assert lengths(program) == {"capacity"}
    check(NO_WINDOWS[name], program)


def test_a_layer_of_a_window_and_one_of_everything_keep_what_they_read() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        x = x + whole(x, inside(x))
        return x + whole(x, back(x) >= 0)

    program = derived(function)
    assert lengths(program) == {WINDOW - 1, "capacity"}
    check(function, program)


class Rotary(nn.Module):
    """Windowed attention with rotary positions, as an artifact."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])
        a, b = x.chunk(2, -1)
        q = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
        return x + F.scaled_dot_product_attention(q, q, x, attn_mask=inside(x))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    compiled = seqc.compile(Rotary(), (torch.randn(2, 9, D),), stateful=True)
    assert compiled.report["check_in_chunks"]["ok"]
    directory: Path = compiled.save(tmp_path_factory.mktemp("window") / "artifact")
    return load(directory)


def test_memory_is_the_window_from_the_first_step_on(session: Session) -> None:
    x = np.random.default_rng(0).standard_normal((2, 6 * WINDOW, D)).astype(np.float32)
    stream = session.stream(2)
    memory = {stream.memory()}
    for at in range(0, 6 * WINDOW, 3):
        stream.step({"x": x[:, at : at + 3]})
        memory.add(stream.memory())
    assert memory == {2 * 2 * (WINDOW - 1) * D * 4 + 8}  # two caches of two rows, and the position


def test_rows_of_a_windowed_stream_go_on_by_themselves(session: Session) -> None:
    x = np.random.default_rng(0).standard_normal((3, 6 * WINDOW, D)).astype(np.float32)
    expected = Rotary()(torch.from_numpy(x)).numpy()
    stream = session.stream(3)
    at = [0, 0, 0]
    for i, (rows, steps) in enumerate([([0, 1, 2], 2), ([2], 1), ([0, 2], 2 * WINDOW + 1), ([1], 3), ([1, 2], 4)] * 2):
        if i == 5:
            stream.reset([2])
            at[2] = 0
        given = np.stack([x[row, at[row] : at[row] + steps] for row in rows])
        out = stream.step({"x": given}, rows=rows)["output"]
        wanted = np.stack([expected[row, at[row] : at[row] + steps] for row in rows])
        np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)
        for row in rows:
            at[row] += steps
