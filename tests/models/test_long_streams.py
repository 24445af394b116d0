"""Streams of a million steps: memory, and drift from the same recurrence in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

import seqc
from seqc.runtime import Session, Stream
from seqc.runtime.ort import keep

Array = np.ndarray[Any, Any]

STEPS, PIECE = 1_000_000, 10_000
EPS = 2.0**-24
"""Half the distance of 1 to the next number in float32: the relative error of one rounding."""
DECAYS = 1 - np.logspace(-6, -0.3, 8)


class Diagonal(nn.Module):
    """h = decay * h + x, with decays from 0.5 to 1 - 1e-6."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.from_numpy(DECAYS).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = self.decay * h + x[:, t]
            out.append(h)
        return torch.stack(out, 1)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = x.new_zeros(x.shape[0], 8), []
        c = h
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            out.append(h)
        return torch.stack(out, 1)


class Averages(nn.Module):
    """A running sum, a running mean by position, and the position itself."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total = x.cumsum(1)
        position = torch.arange(x.shape[1], dtype=torch.float32)[:, None]
        return total, total / (position + 1), x * 0 + position


def session_of(model: nn.Module) -> Session:
    torch.manual_seed(0)
    return seqc.compile(model.eval(), (torch.randn(2, 9, 8),), stateful=True, check=False).session


def pieces(seed: int = 0) -> Iterator[Array]:
    """Inputs of a million steps, with a mean other than zero: a sum of them grows."""
    random = np.random.default_rng(seed)
    for _ in range(STEPS // PIECE):
        yield (random.standard_normal((1, PIECE, 8)) + 0.5).astype(np.float32)


def streamed(stream: Stream, x: Array, single: int = 0) -> dict[str, Array]:
    """The outputs of a piece, of which the first ``single`` steps are taken one at a time."""
    parts = [stream.step({"x": x[:, t : t + 1]}) for t in range(single)]
    parts.append(stream.step({"x": x[:, single:]}))
    return {name: np.concatenate([p[name] for p in parts], 1) for name in parts[0]}


def follow_along(session: Session, check: Callable[[int, Array, dict[str, Array]], None]) -> None:
    """Stream a million steps, 20,000 of them singly, and call ``check`` with the place, inputs and outputs of each piece.

    Asserts that outputs are finite and that the memory is at the end what it was in the beginning.
    """
    stream = session.stream()
    stream.step({"x": np.zeros((1, 1, 8), np.float32)})
    stream.reset()
    memory = stream.memory()
    for number, x in enumerate(pieces()):
        outputs = streamed(stream, x, single=PIECE - 1 if number in (1, STEPS // PIECE - 1) else 1)
        assert all(np.isfinite(output).all() for output in outputs.values())
        check(number * PIECE, x, outputs)
    assert stream.positions == (STEPS,)
    assert stream.memory() == memory


def test_diagonal_states() -> None:
    """Bound: each step rounds twice, by at most EPS of the largest |h| each, and the recurrence damps every such error by its
    decay: together at most 2 EPS max|h| / (1 - decay). With a decay of 1 - 1e-6 that is 12% of the state, of which 0.2% were
    seen; with 0.998 it is 7e-5, of which 3e-6 were seen.
    """
    session = session_of(Diagonal())
    decay = torch.from_numpy(DECAYS).float().double().numpy()
    state, largest, error = np.zeros(8), np.zeros(8), np.zeros(8)

    def check(at: int, x: Array, outputs: dict[str, Array]) -> None:
        nonlocal state, largest, error
        exact = np.empty((PIECE, 8))
        for t, value in enumerate(x[0].astype(np.float64)):
            state = decay * state + value
            exact[t] = state
        largest = np.maximum(largest, np.abs(exact).max(0))
        error = np.maximum(error, np.abs(outputs["output"][0] - exact).max(0))

    follow_along(session, check)
    assert (error <= 2 * EPS * largest / (1 - decay)).all(), error


def test_an_lstm() -> None:
    """Bound 1e-5, at the end as in the beginning: the cell forgets, so errors of earlier steps die out with their causes.

    That is asserted too: float64 comes to the same numbers from another state 5,000 steps before. It is therefore followed in
    the first and the last 20,000 steps only.
    """
    model = Cell()
    session = session_of(model)
    exact = nn.LSTM(8, 8, batch_first=True).double()
    with torch.no_grad():
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(exact, f"{kind}_l0").copy_(getattr(model.cell, kind))
    compared = []
    state = other = (torch.zeros(1, 1, 8).double(),) * 2

    def check(at: int, x: Array, outputs: dict[str, Array]) -> None:
        nonlocal state, other
        if 2 * PIECE <= at < STEPS - 2 * PIECE:
            state = (torch.zeros(1, 1, 8).double(),) * 2
            other = (torch.ones(1, 1, 8).double(),) * 2
            return
        with torch.no_grad():
            expected, state = exact(torch.from_numpy(x).double(), state)
            again, other = exact(torch.from_numpy(x).double(), other)
        washed = 0 if at < 2 * PIECE else PIECE // 2 if at == STEPS - 2 * PIECE else 0
        assert (expected - again)[:, washed:].abs().max() < 1e-12
        compared.append(np.abs(outputs["output"] - expected.numpy())[:, washed:].max())

    follow_along(session, check)
    assert len(compared) == 4 and max(compared) < 1e-5, compared


def test_running_sums_and_positions() -> None:
    """Bound: a sum to 16 EPS of the largest, a mean to 16 EPS of the largest mean, positions exactly.

    One rounding is of the result. The rest is ONNX Runtime's float32 sum inside each piece of 10,000 steps, which no state can
    mend; from piece to piece the state keeps what rounding takes away.
    """
    session = session_of(Averages())
    total, largest = np.zeros((1, 1, 8)), np.zeros(2)
    errors = np.zeros(3)

    def check(at: int, x: Array, outputs: dict[str, Array]) -> None:
        nonlocal total, largest, errors
        sums = total + x.astype(np.float64).cumsum(1)
        position = np.arange(at, at + PIECE)[None, :, None]
        expected = (sums, sums / (position + 1), position + 0 * sums)
        found = [np.abs(outputs[p.name] - e).max() for p, e in zip(session.outputs, expected, strict=True)]
        largest = np.maximum(largest, [np.abs(e).max() for e in expected[:2]])
        errors = np.maximum(errors, found)
        total = sums[:, -1:]

    follow_along(session, check)
    assert (errors[:2] <= 16 * EPS * largest).all() and errors[2] == 0, (errors, largest)


def test_a_sum_of_ones_does_not_stay_at_two_to_the_24() -> None:
    """There float32 has only every second number: adding 1 to it changes nothing, as often as it is done."""
    session = session_of(Averages())
    name = session.outputs[0].name
    stream = session.stream()
    x = np.full((1, 1, 8), 2**24, np.float32)
    assert (stream.step({"x": x})[name] == 2**24).all()
    for _ in range(20_000):
        last = stream.step({"x": np.ones((1, 1, 8), np.float32)})[name]
    assert (last == 2**24 + 20_000).all()
    assert (stream.step({"x": np.ones((1, 500, 8), np.float32)})[name][:, -1] == 2**24 + 20_500).all()
    low = stream.step({"x": np.full((1, 1, 8), -(2.0**24) - 20_000, np.float32)})[name]
    assert (low == 500).all()


def test_positions_beyond_32_bits() -> None:
    class Positions(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            at = torch.arange(x.shape[1])
            return at[None].expand(x.shape[0], -1), x + at.float()[:, None] % 8

    session = session_of(Positions())
    stream = session.stream(2)
    (group,) = stream._groups
    far = 2**40 + 3
    stream._groups = (replace(group, positions=(far, far), states=(keep(np.array(far)),)),)
    x = np.zeros((2, 3, 8), np.float32)
    outputs = stream.step({"x": x})
    names = [p.name for p in session.outputs]
    assert (outputs[names[0]] == far + np.arange(3)).all()
    assert (outputs[names[1]] == np.float32(far + np.arange(3))[:, None] % 8).all()
    assert (stream.step({"x": x[:, :1]})[names[0]] == far + 3).all()
    assert stream.positions == (far + 4, far + 4) and all(type(n) is int for n in stream.positions)
