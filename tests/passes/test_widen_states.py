"""WidenStates: recurrences of models in float16 carry float32; nothing else changes type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import seqc
from seqc.passes import MakeStateful, WidenStates
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.verify import verify
from tests.helpers.modules import Applied
from tests.helpers.programs import loop_program

HALF = torch.float16


def decayed(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = 0.5 * h + x.to(HALF)
    return h, h * 2


def widened(program: Program) -> tuple[Program, int]:
    (record,) = run_passes(program, [WidenStates()])
    verify(program)
    return program, record.changes


def loop_in(dtype: torch.dtype) -> Program:
    return loop_program(decayed, [torch.randn(2, 7, 3, dtype=dtype)], [torch.zeros(3, dtype=dtype)])


def test_a_loop_computes_and_carries_float32() -> None:
    program, changes = widened(loop_in(HALF))
    assert changes == 1
    x = torch.randn(1, 5, 3, dtype=HALF)
    exact = torch.zeros(1, 3)
    for t in range(5):
        exact = 0.5 * exact + x[:, t].float()
    final, ys = program(x)
    assert (final.dtype, ys.dtype) == (HALF, HALF)
    assert torch.equal(final, exact.half()) and torch.equal(ys[-1], (2 * exact).half())


def test_a_loop_in_float32_stays() -> None:
    program = loop_in(torch.float32)
    before = str(program)
    program, changes = widened(program)
    assert changes == 0 and str(program) == before


def test_what_carries_nothing_stays_in_float16() -> None:
    def mixed(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ x.transpose(1, 2), -1) @ x

    model = Applied(mixed)
    program = seqc.trace(model, (torch.randn(2, 7, 4, dtype=HALF),))
    assert WidenStates()(program) == 0


CARRYING: dict[str, Callable[[], nn.Module]] = {
    "sum": lambda: Applied(lambda x: x.cumsum(1)),
    "gru": lambda: Taken(nn.GRU(4, 4, batch_first=True)),
    "lstm": lambda: Taken(nn.LSTM(4, 4, batch_first=True)),
}


class Taken(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


@pytest.mark.parametrize("name", CARRYING)
def test_states_of_a_stream_are_float32(name: str) -> None:
    torch.manual_seed(0)
    program = seqc.trace(CARRYING[name]().half().eval(), (torch.randn(2, 7, 4, dtype=HALF),))
    run_passes(program, [WidenStates(), MakeStateful()])
    verify(program)
    assert {s.initial.dtype for s in program.states} == {torch.float32}
    assert {p.dtype for p in (*program.given_inputs, *program.own_outputs)} == {HALF}


def test_a_compiled_sum_in_float16_goes_on_where_float16_alone_stops() -> None:
    compiled = seqc.compile(Applied(lambda x: x.cumsum(1) / 1024), (torch.ones(1, 7, 1, dtype=HALF),), stateful=True)
    assert compiled.manifest["tolerances"] == {"output": 2.0**-8}
    stream = compiled.session.stream()
    ones = torch.ones(1, 1024, 1, dtype=HALF).numpy()
    for total in range(1, 9):
        assert stream.step({"x": ones})["output"][0, -1, 0] == total  # 2048 + 1 is 2048 in float16
