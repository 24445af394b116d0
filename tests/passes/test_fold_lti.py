"""FoldLti: which loops are time-invariant state spaces, in every spelling, and which must not be taken for some."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import seqc
from seqc.passes import DEFAULT
from seqc.passes.fold_lti import FoldLti
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.text import text
from tests.helpers.programs import dialect_of

B, D, N = 2, 4, 3
Step = Callable[["Model", torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Model(nn.Module):
    """A loop over ``step(self, state, x_t)``, which returns the next state and the result."""

    def __init__(self, step: Step, complex_state: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        rand = lambda *shape: nn.Parameter(torch.rand(shape, generator=generator))  # noqa: E731
        self.a, self.b, self.c, self.p, self.q = (rand(D, N) for _ in range(5))
        self.matrix, self.d, self.angle = rand(D, N, N), rand(D), rand(D, N)
        self.across = rand(D, D)
        self.step, self.dtype = step, torch.complex64 if complex_state else torch.float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(x.shape[0], D, N, dtype=self.dtype)
        out = []
        for t in range(x.shape[1]):
            state, y = self.step(self, state, x[:, t])
            out.append(y)
        return torch.stack(out, 1)


def folded(step: Step, complex_state: bool = False) -> tuple[Program, list[str]]:
    """The Program behind the pass, equal to the model at lengths that were not traced; and the pass's reasons."""
    model = Model(step, complex_state)
    program = seqc.trace(model, (torch.randn(B, 9, D),))
    records = {record.name: record for record in run_passes(program, DEFAULT)}
    for batch, length in ((1, 1), (3, 14)):
        x = torch.randn(batch, length, D)
        torch.testing.assert_close(program(x)[0], model(x), rtol=1e-4, atol=1e-4)
    return program, list(records["fold_lti"].reasons)


def diagonal(m, h, u):
    h = torch.exp(-m.a) * h + m.b * u.unsqueeze(-1)
    return h, (h * m.c).sum(-1)


def read_before_the_update(m, h, u):
    y = torch.einsum("bdn,dn->bd", h, m.c) + m.d * u
    return m.a * h + u[..., None] * m.b, y


def dense(m, h, u):
    h = torch.einsum("dij,bdj->bdi", 0.3 * m.matrix, h) + m.b * u.unsqueeze(-1)
    return h, (m.c * h).sum(-1)


def diagonal_plus_low_rank(m, h, u):
    h = torch.exp(-m.a) * h - 0.1 * m.p * (m.q * h).sum(-1, keepdim=True) + m.b * u.unsqueeze(-1)
    return h, (h * m.c).sum(-1)


def complex_diagonal(m, h, u):
    h = torch.polar(torch.exp(-m.a), m.angle) * h + torch.complex(m.b, m.p) * u.unsqueeze(-1)
    return h, 2 * (torch.complex(m.c, m.q) * h).sum(-1).real


def gated_input(m, h, u):
    h = m.a * h + m.b * (u * torch.sigmoid(u)).unsqueeze(-1)
    return h, (h * m.c).sum(-1)


@pytest.mark.parametrize(
    ("step", "size"),
    [
        (diagonal, 1),
        (read_before_the_update, 1),
        (dense, N),
        (diagonal_plus_low_rank, N),
        (complex_diagonal, 2),
        (gated_input, 1),
    ],
)
def test_every_spelling_is_recognised(step: Step, size: int) -> None:
    program, (reason,) = folded(step, step is complex_diagonal)
    assert dialect_of(program) == ["lti_scan"]
    blocks = "each by itself" if size == 1 else f"coupled in blocks of {size}"
    assert f"{blocks}, with coefficients from weights alone" in reason and "test_fold_lti.py" in reason


def test_before_and_after() -> None:
    program = seqc.trace(Model(diagonal), (torch.randn(B, 9, D),))
    *before, _, _, _ = DEFAULT
    run_passes(program, before)
    assert "recurrence(trip" in text(program) and "lti_scan" not in text(program)
    (record,) = run_passes(program, [FoldLti()])
    assert record.changes == 1
    assert "recurrence(" not in text(program) and text(program).count("seqc.lti_scan(") == 1
    (again,) = run_passes(program, [FoldLti()])
    assert again.changes == 0


def varying(m, h, u):
    h = torch.exp(-m.a * torch.sigmoid(u).unsqueeze(-1)) * h + m.b * u.unsqueeze(-1)
    return h, (h * m.c).sum(-1)


def masked(m, h, u):
    h = m.a * h * (u > 0).float().unsqueeze(-1) + m.b * u.unsqueeze(-1)
    return h, (h * m.c).sum(-1)


def read_by_the_input(m, h, u):
    h = m.a * h + m.b * u.unsqueeze(-1)
    return h, (h * m.c * u.unsqueeze(-1)).sum(-1)


def nonlinear_readout(m, h, u):
    h = m.a * h + m.b * u.unsqueeze(-1)
    return h, (torch.tanh(h) * m.c).sum(-1)


def nonlinear_state(m, h, u):
    h = torch.tanh(m.a * h + m.b * u.unsqueeze(-1))
    return h, (h * m.c).sum(-1)


def biased(m, h, u):
    h = m.a * h + m.b * u.unsqueeze(-1) + m.p
    return h, (h * m.c).sum(-1)


def two_inputs(m, h, u):
    h = m.a * h + m.b * u.unsqueeze(-1) + m.p * torch.sin(u).unsqueeze(-1)
    return h, (h * m.c).sum(-1)


def channels_mixed(m, h, u):
    h = 0.3 * torch.einsum("de,ben->bdn", m.across, h) + m.b * u.unsqueeze(-1)
    return h, (h * m.c).sum(-1)


def kept_apart(m, h, u):
    h = m.a * h + m.b * u.unsqueeze(-1)
    return h, h * m.c


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (varying, None),
        (masked, None),
        (read_by_the_input, None),
        (kept_apart, None),
        (nonlinear_readout, "tanh"),
        (nonlinear_state, "tanh"),
        (biased, "a constant is added to the state"),
        (two_inputs, "several inputs are added to the state"),
        (channels_mixed, "the result has axes that the state has not"),
    ],
)
def test_what_is_no_such_system_stays(step: Step, said: str | None) -> None:
    """Nothing is said of loops that are not time-invariant, or have one state per channel."""
    program, reasons = folded(step)
    assert "lti_scan" not in text(program)
    assert reasons == [] if said is None else said in reasons[0], reasons
