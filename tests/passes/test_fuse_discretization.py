"""FuseDiscretization: every spelling of exp(z) - 1, what is left alone, and the digits that are won."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import seqc
from seqc.passes.fuse_discretization import FuseDiscretization
from seqc.passes.split_complex import SplitComplex
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.text import text
from tests.helpers.programs import body_of, capture_program

Function = Callable[[torch.Tensor], torch.Tensor]


class Model(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def program_of(function: Function) -> Program:
    return capture_program(Model(function), torch.randn(2, 5, 4))


def ops(program: Program) -> list[str]:
    return [str(n.target) for gm in program.graph_modules() for n in gm.graph.nodes if n.op == "call_function"]


ONES = torch.ones(4)

SPELLINGS: dict[str, tuple[Function, int]] = {
    "exp - 1": (lambda x: torch.exp(x) - 1, 1),
    "exp + -1": (lambda x: torch.exp(x) + -1.0, 1),
    "-1 + exp": (lambda x: -1 + torch.exp(x), 1),
    "sub": (lambda x: torch.exp(x).sub(1), 1),
    "1 - exp": (lambda x: 1 - torch.exp(x), -1),
    "rsub": (lambda x: torch.rsub(torch.exp(x), 1), -1),
    "-exp + 1": (lambda x: -torch.exp(x) + 1, -1),
    "ones made here": (lambda x: torch.exp(x) - torch.ones(4), 1),
    "ones like it": (lambda x: torch.exp(x) - torch.ones_like(x), 1),
    "full": (lambda x: torch.exp(x) - torch.full((4,), 1.0), 1),
    "ones kept": (lambda x: torch.exp(x) - ONES, 1),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_expm1(name: str) -> None:
    function, sign = SPELLINGS[name]
    program = program_of(function)
    (record,) = run_passes(program, [FuseDiscretization()])
    assert record.changes == 1 and "as expm1" in record.reasons[0]
    assert ops(program) == ["aten.expm1.default"] + (["aten.neg.default"] if sign < 0 else [])
    x = torch.tensor([[[1e-9, -1e-5, 0.0, -3.0]]])
    torch.testing.assert_close(program(x)[0], sign * torch.expm1(x), rtol=0, atol=0)


def test_before_and_after_as_text() -> None:
    program = program_of(lambda x: (torch.exp(-2.0 * x) - 1) / -2.0)
    assert [line.split(" = ")[1].split("  #")[0] for line in text(program).splitlines() if " = aten" in line] == [
        "aten.mul.Tensor(%x, -2.0)",
        "aten.exp(%0)",
        "aten.sub.Tensor(%1, 1)",
        "aten.div.Tensor(%2, -2.0)",
    ]
    run_passes(program, [FuseDiscretization()])
    assert [line.split(" = ")[1].split("  #")[0] for line in text(program).splitlines() if " = aten" in line] == [
        "aten.mul.Tensor(%x, -2.0)",
        "aten.expm1(%0)",
        "aten.div.Tensor(%1, -2.0)",
    ]


UNTOUCHED: dict[str, Function] = {
    "minus another value": lambda x: torch.exp(x) - x,
    "minus 2": lambda x: torch.exp(x) - 2,
    "plus 1": lambda x: torch.exp(x) + 1,
    "twice 1": lambda x: torch.sub(torch.exp(x), 1, alpha=2),
    "sine": lambda x: torch.exp(x) * torch.sin(x) - 1,
    "a scaled exponential": lambda x: 2 * torch.exp(x) - 1,
    "broadcast by the ones": lambda x: torch.exp(x) - torch.ones(2, 1, 1, 1),
    "another type": lambda x: torch.exp(x) - torch.ones(4, dtype=torch.float64),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_is_no_exponential_less_one_stays(name: str) -> None:
    program = program_of(UNTOUCHED[name])
    before = text(program)
    assert FuseDiscretization()(program) == 0
    assert text(program) == before


def test_the_exponential_stays_where_something_else_reads_it() -> None:
    program = program_of(lambda x: torch.exp(x) * x + (torch.exp(x) - 1) / x)
    assert FuseDiscretization()(program) == 1
    assert {"aten.exp.default", "aten.expm1.default"} <= set(ops(program))


def test_zero_over_zero_stays_nan() -> None:
    program = program_of(lambda x: (torch.exp(x) - 1) / x)
    before = program(torch.zeros(1, 1, 4))[0]
    run_passes(program, [FuseDiscretization()])
    assert before.isnan().all() and program(torch.zeros(1, 1, 4))[0].isnan().all()


def pair(x: torch.Tensor) -> torch.Tensor:
    a, b = x[..., :2], x[..., 2:]
    return torch.cat([torch.exp(a) * torch.cos(b) - 1, torch.exp(a) * torch.sin(b)], -1)


def test_a_complex_exponential_kept_as_two_real_numbers_is_exact_near_zero() -> None:
    program = program_of(pair)
    assert FuseDiscretization()(program) == 1
    scales = torch.logspace(-9, 0.5, 50).reshape(1, 50, 1)
    x = scales * torch.tensor([-1.0, -0.5, 1.0, 2.0])
    exact = torch.expm1(torch.complex(x[..., :2].double(), x[..., 2:].double()))
    found = program(x)[0].double()
    error = (torch.complex(found[..., :2], found[..., 2:]) - exact).abs() / exact.abs()
    assert float(error.max()) < 4e-7
    assert float(((pair(x)[..., :2].double() - exact.real).abs() / exact.abs()).max()) > 0.1  # as it was written


def test_a_purely_imaginary_exponent() -> None:
    program = program_of(lambda x: torch.cos(x) - 1)
    assert FuseDiscretization()(program) == 1
    x = torch.logspace(-9, 0, 40).reshape(1, 10, 4)
    exact = -2 * torch.sin(x.double() / 2) ** 2
    assert float(((program(x)[0].double() - exact).abs() / exact.abs()).max()) < 4e-7


def test_complex_exponentials_are_exact_when_split() -> None:
    program = program_of(lambda x: torch.view_as_real(torch.exp(torch.complex(x[..., :2], x[..., 2:])) - 1))
    run_passes(program, [FuseDiscretization(), SplitComplex()])
    x = torch.logspace(-9, 0.5, 50).reshape(1, 50, 1) * torch.tensor([-1.0, -0.5, 1.0, 2.0])
    exact = torch.expm1(torch.complex(x[..., :2].double(), x[..., 2:].double()))
    error = (torch.view_as_complex(program(x)[0].double()) - exact).abs() / exact.abs()
    assert float(error.max()) < 4e-7


class SlowRates(nn.Module):
    """Zero-order hold in the loop, with rates so small that float32 loses every digit of exp(z) - 1."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(-torch.tensor([1e-6, 3e-6, 1e-5, 0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = torch.zeros(x.shape[0], 4), []
        for t in range(x.shape[1]):
            step = 1e-3 * torch.sigmoid(x[:, t])
            h = torch.exp(self.rates * step) * h + (torch.exp(self.rates * step) - 1) / self.rates * x[:, t]
            out.append(h)
        return torch.stack(out, 1)


def test_loop_bodies_are_fused() -> None:
    program = seqc.trace(SlowRates(), (torch.randn(2, 9, 4),))
    assert FuseDiscretization()(program) == 1
    assert "aten.expm1.default" in [str(n.target) for n in body_of(program).graph.nodes]


def test_the_compiled_model_keeps_digits_that_the_source_loses_and_says_so() -> None:
    """The source returns 0 for the slowest rate: the check decides by the source in float64, at the same tolerance."""
    model = SlowRates()
    compiled = seqc.compile(model, (torch.randn(2, 9, 4),))
    assert compiled.report["check"]["ok"]
    (note,) = [n for n in compiled.manifest["notes"] if "float64" in n]
    assert "the source model is off from itself" in note
    x = torch.rand(1, 33, 4)
    exact = SlowRates().double()(x.double()).detach()
    assert float((compiled(x).double() - exact).abs().max() / exact.abs().max()) < 1e-6
    assert float((model(x).detach().double() - exact).abs().max() / exact.abs().max()) > 0.1
