"""FoldConstants: what is folded, bit for bit, under which name, and what stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import seqc
from seqc.errors import UnsupportedModelError
from seqc.passes.fold_constants import FoldConstants
from seqc.passes.hoist import Hoist
from seqc.pipeline import run_passes
from seqc.program import Program
from tests.helpers.onnx import run, session
from tests.helpers.programs import body_of

Function = Callable[["Model", torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """``a_log`` [4], ``m`` [4, 4] and ``c`` [4] complex are weights."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a_log = nn.Parameter(torch.randn(4, generator=generator))
        self.m = nn.Parameter(0.3 * torch.randn(4, 4, generator=generator))
        self.c = nn.Parameter(torch.randn(4, dtype=torch.complex64, generator=generator))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def folded(function: Function, step: FoldConstants | None = None) -> tuple[Program, int]:
    program = seqc.trace(Model(function), (torch.randn(2, 5, 4),))
    before = program.copy()
    (record,) = run_passes(program, [step or FoldConstants()])
    assert len(record.reasons) == record.changes
    x = torch.randn(3, 7, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = before(x)[0]
        torch.manual_seed(0)
        assert torch.equal(program(x)[0], expected)
    return program, record.changes


def names(program: Program) -> list[str]:
    return [program.weight_names[n] for n in program.weights]


def ops(program: Program) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def test_before_and_after() -> None:
    program = seqc.trace(Model(lambda s, x: x * -torch.exp(s.a_log)), (torch.randn(2, 5, 4),))
    assert names(program) == ["a_log"] and ops(program) == ["aten.exp.default", "aten.neg.default", "aten.mul.Tensor"]
    program, changes = folded(lambda s, x: x * -torch.exp(s.a_log))
    assert changes == 1
    assert names(program) == ["a_log.neg"] and ops(program) == ["aten.mul.Tensor"]


FOLDED: dict[str, tuple[Function, list[str]]] = {
    "a Cayley transform": (
        lambda s, x: x @ torch.linalg.solve(torch.eye(4) - s.m / 2, torch.eye(4) + s.m / 2),
        ["m.solve"],
    ),
    "an inverse": (lambda s, x: x @ torch.linalg.inv(s.m), ["m.inv"]),
    "a matrix exponential": (lambda s, x: x @ torch.matrix_exp(s.m), ["m.matrix_exp"]),
    "eigenvalues": (lambda s, x: x * torch.linalg.eigvalsh(s.m @ s.m.T), ["m.eigh"]),
    "a kernel's Fourier transform": (lambda s, x: x * torch.fft.rfft(s.a_log, n=6).abs(), ["a_log.abs"]),
    "complex numbers": (lambda s, x: x * (torch.exp(s.c) / s.c).real, ["c.div"]),
    "a mask": (lambda s, x: x @ torch.tril(torch.ones(4, 4)), ["constant.tril"]),
    "of two weights": (lambda s, x: x @ (s.m * s.a_log), ["m.mul"]),
    "what is read twice": (lambda s, x: x * s.a_log.exp() + s.a_log.exp(), ["a_log.exp"]),
    "what another is computed from": (lambda s, x: x * s.a_log.exp() + s.a_log.exp().sin(), ["a_log.exp", "a_log.sin"]),
    "a weight that is also read as it is": (lambda s, x: x * s.a_log + s.a_log.exp(), ["a_log", "a_log.exp"]),
}


@pytest.mark.parametrize("name", FOLDED)
def test_what_weights_and_literals_decide_is_a_weight(name: str) -> None:
    function, expected = FOLDED[name]
    program, _ = folded(function)
    assert names(program) == expected


STAYS: dict[str, Function] = {
    "a value of an input": lambda s, x: torch.exp(x) * s.a_log,
    "a size of an input": lambda s, x: x * torch.arange(x.shape[1]).exp().unsqueeze(-1),
    "random numbers": lambda s, x: x * torch.rand(4).exp(),
    "a transposed weight": lambda s, x: x @ s.m.T,
    "a cast": lambda s, x: x * s.a_log.to(torch.float64),
    "zeros": lambda s, x: x + torch.zeros(4),
    "a broadcast weight": lambda s, x: x.unsqueeze(-1) * s.a_log.unsqueeze(1).expand(4, 4000),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_is_not_known_or_not_computed_stays(name: str) -> None:
    _, changes = folded(STAYS[name])
    assert changes == 0


def test_what_would_be_too_large_is_made_from_what_is_not() -> None:
    def wide(s: Model, x: torch.Tensor) -> torch.Tensor:
        return x.unsqueeze(-1) * (s.a_log.exp().unsqueeze(1) * torch.arange(2000.0)).sin()

    program, changes = folded(wide, FoldConstants(small_bytes=16384))
    assert changes == 1 and names(program) == ["a_log.exp"]
    assert "aten.sin.default" in ops(program)
    program, changes = folded(wide, FoldConstants(small_bytes=4 * 2000 * 4))
    assert changes == 1 and names(program) == ["a_log.sin"]
    program, changes = folded(wide, FoldConstants(max_growth=2000.0))
    assert changes == 1 and names(program) == ["a_log.sin"]


def test_a_singular_matrix_is_refused_with_its_line() -> None:
    program = seqc.trace(Model(lambda s, x: x @ torch.linalg.inv(s.m * 0)), (torch.randn(2, 5, 4),))
    with pytest.raises(UnsupportedModelError, match=r"a matrix has no inverse at .*test_fold_constants\.py"):
        FoldConstants()(program)


def test_weights_of_one_name_are_told_apart() -> None:
    program, _ = folded(lambda s, x: x * s.a_log.exp() + s.a_log.exp().exp())
    assert names(program) == ["a_log.exp", "a_log.exp_1"]


class Loop(nn.Module):
    """The state matrix is discretised in each step, from weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(0.3 * torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, out = torch.zeros(x.shape[0], 4), []
        for t in range(x.shape[1]):
            h = torch.tanh(h @ torch.linalg.solve(torch.eye(4) - self.m / 2, torch.eye(4) + self.m / 2) + x[:, t])
            out.append(h)
        return torch.stack(out, 1)


def test_what_leaves_a_loop_is_folded_behind_hoist() -> None:
    program = seqc.trace(Loop(), (torch.randn(2, 9, 4),))
    run_passes(program, [Hoist(), FoldConstants()])
    assert names(program) == ["m.solve"]
    assert "solve" not in " ".join(str(n.target) for n in body_of(program).graph.nodes)


def test_a_model_with_linear_systems_of_its_weights_compiles() -> None:
    compiled = seqc.compile(Loop(), (torch.randn(2, 9, 4),))
    assert compiled.report["check"]["ok"]
    assert names(compiled.program) == ["m.solve"]


def test_the_onnx_model_holds_folded_weights_once_under_their_names() -> None:
    from seqc.backends.onnx import export

    program, _ = folded(lambda s, x: x @ s.m.tanh() + x @ s.m.tanh() * -torch.exp(s.a_log))
    model = export(program)
    assert sorted(model.graph.initializers) == ["a_log.neg", "m.tanh"]
    x = torch.randn(2, 9, 4)
    torch.testing.assert_close(torch.from_numpy(run(session(model), [x])[0]), program(x)[0])
