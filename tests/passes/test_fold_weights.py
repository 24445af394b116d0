"""FoldWeights: linear algebra and complex values of weights become weights, bit for bit; all else stays."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import ANY

import torch
from torch import nn

from seqc.frontend.normalize import normalize
from seqc.passes.fold_weights import FoldWeights
from seqc.program import Program
from seqc.text import text
from seqc.verify import verify
from tests.helpers.programs import capture_program

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _OfWeight(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.w = nn.Parameter(torch.eye(4) + 0.1 * torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.w)


def traced(function: Function) -> Program:
    program = capture_program(_OfWeight(function), torch.randn(2, 5, 4))
    normalize(program)
    return program


def folded(function: Function, step: FoldWeights = FoldWeights()) -> tuple[int, Program]:  # noqa: B008
    """The number of changes and the Program after the pass: valid, and with the numbers of the one before."""
    program = traced(function)
    before = program.copy()
    changes = step(program)
    verify(program)
    for length in (1, 7):
        x = torch.randn(3, length, 4)
        torch.testing.assert_close(before(x)[0], program(x)[0], rtol=1e-6, atol=1e-6)  # products of another layout
    return changes, program


def test_a_solve_with_weights_becomes_a_weight() -> None:
    changes, program = folded(lambda x, w: x @ torch.linalg.solve(torch.eye(4) - w / 2, torch.eye(4) + w / 2))
    assert changes == 1
    assert "aten._linalg" not in text(program)
    (value,) = program.weights.values()
    w = _OfWeight(lambda x, w: x).w.detach()
    assert torch.equal(value, torch.linalg.solve(torch.eye(4) - w / 2, torch.eye(4) + w / 2))
    assert any("[4, 4] is computed from weights alone" in reason for reason in program.reasons)


def test_what_follows_from_a_solve_is_folded_up_to_the_first_input() -> None:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * torch.linalg.inv(w).tanh().sum(0)

    changes, program = folded(kernel)
    assert (changes, program.node_count()) == (1, 1)


def test_complex_arithmetic_on_weights_becomes_a_weight() -> None:
    def poles(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        pole = torch.exp(torch.complex(-torch.exp(w), w))
        return (x.unsqueeze(-1) * pole).sum(-1).real

    changes, program = folded(poles)
    assert changes == 1
    assert [w.dtype for w in program.weights.values()] == [torch.complex64]
    assert "aten.exp" not in text(program)


def test_real_arithmetic_on_weights_stays_for_the_passes_that_read_it() -> None:
    assert folded(lambda x, w: x * torch.exp(-torch.exp(w[0])))[0] == 0


def test_linear_algebra_on_inputs_stays() -> None:
    changes, program = folded(lambda x, w: torch.linalg.solve(w + x.unsqueeze(-1), w))
    assert changes == 0
    assert "aten._linalg" in text(program)


def test_values_whose_size_depends_on_the_length_stay() -> None:
    def kernel(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        powers = torch.exp(torch.complex(-w, w)[0] * torch.arange(x.shape[1]).unsqueeze(-1))
        return x * powers.real

    changes, program = folded(kernel)
    assert changes == 1  # the poles
    assert "aten.exp" in text(program)


def test_random_values_stay() -> None:
    program = traced(lambda x, w: x + torch.rand_like(w).to(torch.complex64).abs()[0])
    assert FoldWeights()(program) == 0


def test_a_value_much_larger_than_its_weights_stays_where_it_has_a_form() -> None:
    def table(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(64.0).unsqueeze(-1) * w[0]
        return x.mean(1, keepdim=True) * torch.polar(torch.ones_like(angles), angles).real

    assert folded(table) == (1, ANY)
    assert folded(table, FoldWeights(free_bytes=0)) == (0, ANY)

    def inverses(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        scaled = torch.arange(1.0, 65.0)[:, None, None] * w
        return x * torch.linalg.inv(scaled).sum((0, 1))

    changes, program = folded(inverses, FoldWeights(free_bytes=0))
    assert changes == 1
    assert "aten._linalg" not in text(program)
