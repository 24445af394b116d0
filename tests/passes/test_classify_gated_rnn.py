"""ClassifyRecurrence: LSTM, GRU and RNN cells in every spelling, and cells that only look like them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import seqc
from seqc.passes import DEFAULT
from seqc.pipeline import run_passes
from seqc.program import Program
from tests.helpers.programs import dialect_of

D, H = 5, 6
State = tuple[torch.Tensor, ...]


class Cell(nn.Module):
    """A loop over ``step(x, *state)``, which returns the next states, h first; ``parts`` are linear layers by name."""

    def __init__(self, step: Callable[..., State], states: int = 1, reverse: bool = False, **parts: nn.Module) -> None:
        super().__init__()
        self.step, self.states, self.reverse = step, states, reverse
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = tuple(torch.zeros(x.shape[0], H) for _ in range(self.states))
        out = []
        for t in reversed(range(x.shape[1])) if self.reverse else range(x.shape[1]):
            state = self.step(self, x[:, t], *state)
            out.append(state[0])
        return torch.stack(out[::-1] if self.reverse else out, 1), *state


def classified(model: nn.Module) -> tuple[Program, list[str]]:
    torch.manual_seed(0)
    program = seqc.trace(model, (torch.randn(2, 9, D),))
    record = next(r for r in run_passes(program, DEFAULT) if r.name == "classify_recurrence")
    for batch, length in ((1, 1), (3, 14)):
        x = torch.randn(batch, length, D)
        for a, b in zip(program(x), model(x), strict=True):
            torch.testing.assert_close(a, b)
    return program, list(record.reasons)


def kind_of(program: Program) -> str:
    (node,) = [n for n in program.graph.nodes if "seqc.gated_rnn" in str(n.target)]
    return str(node.args[5])


def projection(inputs: int, gates: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, gates * H, bias=bias)


def lstm_of(i: torch.Tensor, f: torch.Tensor, g: torch.Tensor, o: torch.Tensor, c: torch.Tensor) -> State:
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def concatenated(m, x, h, c):
    f, i, o, g = m.both(torch.cat([h, x], -1)).chunk(4, -1)
    return lstm_of(i, f, g, o, c)


def forget_bias(m, x, h, c):
    i, f, g, o = (m.x(x) + m.h(h)).chunk(4, -1)
    return lstm_of(i, f + 1.0, g, o, c)


def layer_per_gate(m, x, h, c):
    i, f, g, o = (getattr(m, f"x{k}")(x) + getattr(m, f"h{k}")(h) for k in range(4))
    c = i.sigmoid() * g.tanh() + c * f.sigmoid()
    return c.tanh() * o.sigmoid(), c


def plain_products(m, x, h, c):
    gates = x @ m.x.weight.t() + torch.mm(h, m.h.weight.t()) + m.x.bias
    return lstm_of(gates[:, :H], gates[:, H : 2 * H], gates[:, 2 * H : 3 * H], gates[:, 3 * H :], c)


def negated(m, x, h, c):
    i, f, g, o = m.h(h).add(m.x(x)).neg().split(H, -1)
    return lstm_of(-i, f, g, o, c)


LSTM: dict[str, nn.Module] = {
    "one projection of both": Cell(concatenated, 2, both=projection(D + H, 4)),
    "a forget bias of 1": Cell(forget_bias, 2, x=projection(D, 4), h=projection(H, 4, bias=False)),
    "a layer per gate": Cell(
        layer_per_gate, 2,
        **{f"x{k}": projection(D, 1) for k in range(4)}, **{f"h{k}": projection(H, 1, k > 1) for k in range(4)},
    ),
    "plain products": Cell(plain_products, 2, x=projection(D, 4), h=projection(H, 4)),
    "negated": Cell(negated, 2, x=projection(D, 4), h=projection(H, 4)),
    "torch's cell": Cell(lambda m, x, h, c: m.cell(x, (h, c)), 2, cell=nn.LSTMCell(D, H)),
    "from the end": Cell(lambda m, x, h, c: m.cell(x, (h, c)), 2, reverse=True, cell=nn.LSTMCell(D, H)),
}  # fmt: skip


@pytest.mark.parametrize("name", LSTM)
def test_lstm_cells(name: str) -> None:
    program, (reason,) = classified(LSTM[name])
    assert dialect_of(program) == ["gated_rnn"] and kind_of(program) == "lstm"
    assert "a cell of 4 gates" in reason and "confirmed in float64" in reason


def gru_of(z_keeps: bool, before: bool) -> Callable[..., State]:
    def step(m, x, h):
        r, z = (m.x(x) + m.h(h)).sigmoid().chunk(2, -1)
        n = torch.tanh(m.xn(x) + (m.hn(r * h) if before else r * m.hn(h)))
        return ((z * h + (1 - z) * n) if z_keeps else ((1 - z) * h + z * n),)

    return step


def gru(z_keeps: bool, before: bool, bias: bool = True) -> nn.Module:
    return Cell(
        gru_of(z_keeps, before), x=projection(D, 2), h=projection(H, 2), xn=projection(D, 1), hn=projection(H, 1, bias),
    )  # fmt: skip


def one_projection(m, x, h):
    both = torch.cat([x, h], 1)
    z = m.z(both).sigmoid()
    n = m.n(torch.cat([x, m.r(both).sigmoid() * h], 1)).tanh()
    return (h + z * (n - h),)


GRU: dict[str, tuple[nn.Module, str]] = {
    "torch's cell": (Cell(lambda m, x, h: (m.cell(x, h),), cell=nn.GRUCell(D, H)), "gru"),
    "the gate weighs the candidate": (gru(False, False), "gru"),
    "no bias of the candidate": (gru(True, False, False), "gru"),
    "reset before": (gru(True, True), "gru_reset_before"),
    "reset before, the gate weighs the candidate": (gru(False, True), "gru_reset_before"),
    "one projection of both": (
        Cell(one_projection, **{k: projection(D + H, 1) for k in ("z", "r", "n")}),
        "gru_reset_before",
    ),
}


@pytest.mark.parametrize("name", GRU)
def test_gru_cells(name: str) -> None:
    model, kind = GRU[name]
    program, (reason,) = classified(model)
    assert dialect_of(program) == ["gated_rnn"] and kind_of(program) == kind
    assert "a cell of 3 gates" in reason


RNN: dict[str, tuple[nn.Module, str]] = {
    "torch's cell": (Cell(lambda m, x, h: (m.cell(x, h),), cell=nn.RNNCell(D, H)), "rnn_tanh"),
    "relu": (Cell(lambda m, x, h: (m.cell(x, h),), cell=nn.RNNCell(D, H, nonlinearity="relu")), "rnn_relu"),
    "one projection of both": (
        Cell(lambda m, x, h: (m.both(torch.cat([x, h], -1)).tanh(),), both=projection(D + H, 1)),
        "rnn_tanh",
    ),
}


@pytest.mark.parametrize("name", RNN)
def test_rnn_cells(name: str) -> None:
    model, kind = RNN[name]
    program, _ = classified(model)
    assert dialect_of(program) == ["gated_rnn"] and kind_of(program) == kind


def test_layers_inside_one_loop_become_a_cell_each() -> None:
    model = Cell(
        lambda m, x, a, c, b: ((h := m.low(x, (a, c)))[0], h[1], m.high(h[0], b)),
        3, low=nn.LSTMCell(D, H), high=nn.GRUCell(H, H),
    )  # fmt: skip
    program, _ = classified(model)
    assert dialect_of(program) == ["gated_rnn", "gated_rnn"]


# -- must not match ----------------------------------------------------------------------------------------------------


def peephole(m, x, h, c):
    i, f, g, o = (m.x(x) + m.h(h)).chunk(4, -1)
    return lstm_of(i + 0.1 * c, f, g, o, c)


def no_tanh_of_the_cell(m, x, h, c):
    i, f, g, o = (m.x(x) + m.h(h)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c, c


def coupled(m, x, h, c):
    f, g, o = (m.x(x) + m.h(h)).chunk(4, -1)[1:]
    c = f.sigmoid() * c + (1 - f.sigmoid()) * g.tanh()
    return o.sigmoid() * c.tanh(), c


def hard_gate(m, x, h, c):
    i, f, g, o = (m.x(x) + m.h(h)).chunk(4, -1)
    c = torch.nn.functional.hardsigmoid(f) * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def held(m, x, h, c):
    new, cell = m.cell(x, (h, c))
    keep = x[:, :1] > 0
    return torch.where(keep, new, h), torch.where(keep, cell, c)


def no_reset(m, x, h):
    z, n = (m.x(x) + m.h(h)).chunk(2, -1)
    z = z.sigmoid()
    return (z * h + (1 - z) * n.tanh(),)


def reset_by_update(m, x, h):
    z, n = (m.x(x) + m.h(h)).chunk(2, -1)
    return (n.sigmoid() * h + (1 - z.sigmoid()) * n.tanh(),)


def residual(m, x, h):
    return (h + (m.x(x) + m.h(h)).tanh(),)


REFUSED: dict[str, tuple[Callable[..., State], int, int, str]] = {
    "peephole": (peephole, 2, 4, "a gate that reads another state than its own"),
    "no tanh of the cell": (no_tanh_of_the_cell, 2, 4, "no mean, by a gate"),
    "coupled gates": (coupled, 2, 4, "the next cell is not forget * cell + input * candidate"),
    "a hard gate": (hard_gate, 2, 4, "aten.hardsigmoid.default of the state"),
    "no reset gate": (no_reset, 1, 2, "a candidate with no reset gate of its own"),
    "two update gates": (reset_by_update, 1, 2, "no mean, by a gate"),
    "residual": (residual, 1, 1, "no mean, by a gate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_cells_of_other_kinds_stay_loops_with_their_reason(name: str) -> None:
    step, states, gates, why = REFUSED[name]
    program, reasons = classified(Cell(step, states, x=projection(D, gates), h=projection(H, gates)))
    assert dialect_of(program) == ["recurrence"]
    assert any("stays a recurrence" in reason and why in reason for reason in reasons), reasons


def test_a_cell_that_is_held_where_the_input_says_so_stays_a_loop() -> None:
    program, _ = classified(Cell(held, 2, cell=nn.LSTMCell(D, H)))
    assert dialect_of(program) == ["recurrence"]


def test_a_cell_whose_memory_is_read_in_each_step_stays_a_loop() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(D, H)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            h = c = torch.zeros(x.shape[0], H)
            out = []
            for t in range(x.shape[1]):
                h, c = self.cell(x[:, t], (h, c))
                out.append(c)
            return (torch.stack(out, 1),)

    program, (first, second) = classified(Reads())
    assert dialect_of(program) == ["recurrence"]
    assert "more than its next state is read" in first + second
