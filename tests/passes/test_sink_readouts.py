"""SinkReadouts: which readouts of stacked states move into the loop, in every spelling, and which stay behind it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import seqc
from seqc.passes import DEFAULT
from seqc.passes.sink_readouts import SinkReadouts
from seqc.pipeline import run_passes
from seqc.program import Program
from tests.helpers.programs import dialect_of

D, N = 6, 8
Readout = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


class Stacked(nn.Module):
    """A state space model whose states of all steps are stacked, [B, T, D, N], and read out after the loop."""

    def __init__(self, readout: Readout) -> None:
        super().__init__()
        self.readout = readout
        self.rates = nn.Parameter(-torch.rand(D, N) - 0.1)
        self.weight = nn.Parameter(torch.randn(2, N))

    def forward(self, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(dt.shape[0], D, N)
        states = []
        for t in range(dt.shape[1]):
            h = torch.exp(dt[:, t, :, None] * self.rates) * h + dt[:, t, :, None] * b[:, t, None]
            states.append(h)
        return self.readout(self, torch.stack(states, 1), c)


def inputs(batch: int, length: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(length)
    return torch.rand(batch, length, D), torch.randn(batch, length, N), torch.randn(batch, length, N)


def sunk(readout: Readout, step: SinkReadouts | None = None) -> tuple[Program, int]:
    model = Stacked(readout)
    program = seqc.trace(model, inputs(2, 9))
    (record,) = run_passes(program, [step or SinkReadouts()])
    for batch, length in ((1, 1), (3, 13)):
        values = inputs(batch, length)
        torch.testing.assert_close(program(*values)[0], model(*values))
    return program, record.changes


def result_shapes(program: Program) -> list[tuple[int | str, ...]]:
    """Of the values that the loop gives back for all steps."""
    (loop,) = [n for n in program.graph.nodes if "recurrence" in str(n.target)]
    return [program.shape_of(value) for value in loop.meta["val"][1:]]


READOUTS: dict[str, Readout] = {
    "a product and a sum": lambda m, hs, c: (hs * c.unsqueeze(2)).sum(-1),
    "a matrix product": lambda m, hs, c: (hs @ c.unsqueeze(-1)).squeeze(-1),
    "einsum": lambda m, hs, c: torch.einsum("btdn,btn->btd", hs, c),
    "einsum in another order": lambda m, hs, c: torch.einsum("btn,btdn->bdt", c, hs).transpose(1, 2),
    "of the transposed states": lambda m, hs, c: torch.matmul(c.unsqueeze(2), hs.transpose(2, 3)).squeeze(2),
    "with gates in between": lambda m, hs, c: (torch.tanh(hs) * torch.sigmoid(c).unsqueeze(2)).sum(3) + 1.0,
    "a projection": lambda m, hs, c: torch.nn.functional.linear(hs, m.weight).sum(-1),
    "of the permuted states": lambda m, hs, c: (hs.permute(2, 0, 1, 3) * c).sum(-1).permute(1, 2, 0),
}


@pytest.mark.parametrize("name", READOUTS)
def test_what_is_read_out_step_by_step_moves_into_the_loop(name: str) -> None:
    program, changes = sunk(READOUTS[name])
    assert changes == 1
    ((_, *shape),) = result_shapes(program)
    assert set(shape) - {1, 2} == {"batch", D}


def test_a_readout_that_has_moved_is_recognised() -> None:
    program = seqc.trace(Stacked(READOUTS["a matrix product"]), inputs(2, 9))
    run_passes(program, DEFAULT)
    assert dialect_of(program) == ["selective_scan"]


def test_two_readouts_of_the_same_states_move_both() -> None:
    program, changes = sunk(lambda m, hs, c: (hs * c.unsqueeze(2)).sum(-1) * torch.einsum("btdn->btd", hs))
    assert changes == 1
    assert [len(shape) for shape in result_shapes(program)] == [3, 3]


# -- must not match ----------------------------------------------------------------------------------------------------

STAY: dict[str, Readout] = {
    "states that are given back": lambda m, hs, c: hs,
    "states read twice, once whole": lambda m, hs, c: (hs * c.unsqueeze(2)).sum(-1, keepdim=True) + hs,
    "a sum over time": lambda m, hs, c: hs.sum(1),
    "sums up to each step": lambda m, hs, c: hs.cumsum(1).sum(-1),
    "a readout of the step before": lambda m, hs, c: (hs[:, :-1] * c[:, 1:].unsqueeze(2)).sum(-1),
    "a product over time": lambda m, hs, c: torch.einsum("btdn,bsn->bsd", hs, c),
    "weights that depend on the states": lambda m, hs, c: (hs * hs.sum(1, keepdim=True)).sum(-1),
    "no reduction": lambda m, hs, c: torch.tanh(hs) * c.unsqueeze(2),
}


@pytest.mark.parametrize("name", STAY)
def test_what_mixes_steps_or_saves_nothing_stays_behind_the_loop(name: str) -> None:
    program, changes = sunk(STAY[name])
    assert changes == 0
    assert [len(shape) for shape in result_shapes(program)] == [4]


def test_less_than_the_wanted_saving_is_left() -> None:
    _, changes = sunk(READOUTS["a product and a sum"], SinkReadouts(min_saving=N + 1.0))
    assert changes == 0
