"""SplitComplex: the same numbers without complex tensors, at lengths that were not traced; refusals name the place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import seqc
from seqc.errors import UnsupportedOpError
from seqc.passes.hoist import Hoist
from seqc.passes.split_complex import SplitComplex
from seqc.program import Program
from seqc.text import text
from seqc.verify import verify
from tests.helpers.programs import capture_program, count_ops, loop_program
from tests.helpers.streams import in_pieces, stream_form

aten = torch.ops.aten
SIZES = [(3, 7), (1, 1), (2, 2), (2, 13), (1, 64)]


def real_outputs(outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [torch.view_as_real(o.resolve_conj()) if o.is_complex() else o for o in outputs]


def split(program: Program, tolerance: float = 2e-6, width: int = 4, sizes: list[tuple[int, int]] = SIZES) -> Program:
    """The Program after the pass: valid, free of complex values, and equal to the one before."""
    result = program.copy()
    assert SplitComplex()(result) > 0
    verify(result)
    assert "c64" not in text(result)
    for seed, (batch, length) in enumerate(sizes):
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(batch, length, width, generator=generator) for _ in program.inputs]
        for a, b in zip(real_outputs(program(*inputs)), result(*inputs), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            if a.numel():
                error = float((a - b).abs().max() / a.abs().max().clamp_min(1e-6))
                assert error <= tolerance, f"{error} at batch {batch}, length {length}"
    return result


class Function(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor], inputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.inputs = inputs
        self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.function(torch.complex(x, y), x, self.w)


# z: [batch, sequence, 4] complex, x: its real part, w: a complex weight [4, 4]
CASES: dict[str, Callable[..., torch.Tensor]] = {
    "arithmetic": lambda z, x, w: (z + w[0]) * (z - 2j) - z * 3.0 + (1 + 2j) * x,
    "add with alpha": lambda z, x, w: torch.add(z, w[0], alpha=2) - torch.sub(x, z, alpha=3),
    "literal minus complex": lambda z, x, w: (1 - 1j) - z,
    "divisions": lambda z, x, w: z / (w[0] + 3) + x / (z + 5) + z / (x.abs() + 1) + 1 / (z + 4j),
    "whole powers": lambda z, x, w: z**2 + z**3 + (z + 4) ** -2 + z**1,
    "a power of one half": lambda z, x, w: z**0.5 + torch.sqrt(z),
    "powers by arange": lambda z, x, w: w[0, :, None] ** torch.arange(x.shape[1]),
    "a literal to real powers": lambda z, x, w: (0.3 + 0.8j) ** x,
    "complex powers": lambda z, x, w: (z + 3) ** (0.1 * z),
    "exp, log": lambda z, x, w: torch.exp(z) + torch.log(z + 5),
    "expm1": lambda z, x, w: torch.special.expm1(z * 1e-3),
    "reciprocal": lambda z, x, w: torch.reciprocal(z + 3) + (z + 3).square(),
    "conj": lambda z, x, w: z.conj() * w[0].conj() + z @ (z.mH @ z),
    "abs and angle": lambda z, x, w: z.abs() + z.angle(),
    "polar": lambda z, x, w: torch.polar(x.abs(), x) * 1j,
    "parts": lambda z, x, w: z.real * 2 + (z * w[0]).imag,
    "view_as_real": lambda z, x, w: torch.view_as_real(z * z).flatten(2).softmax(-1),
    "view_as_complex": lambda z, x, w: torch.view_as_complex(x.reshape(x.shape[0], -1, 2, 2)) * 2,
    "matmul": lambda z, x, w: z @ w + z @ (z.transpose(1, 2) @ z),
    "einsum of three": lambda z, x, w: torch.einsum("bld,de,ble->bl", z, w, z),
    "linear with bias": lambda z, x, w: torch.nn.functional.linear(z, w, w[0]),
    "sums": lambda z, x, w: z.sum(-1) + z.mean(1, keepdim=True).sum(-1) + z.cumsum(1)[..., 0],
    "joining": lambda z, x, w: torch.cat([z, x.to(z.dtype)], 1) + torch.stack([z, z * 1j], 2).sum(2).repeat(1, 2, 1),
    "moving": lambda z, x, w: z.transpose(1, 2).flip(1)[None].permute(0, 2, 1, 3).squeeze(0).expand(4, -1, -1),
    "select, slice, chunk": lambda z, x, w: z[..., 1] + z[:, :1, 0] + z.chunk(2, -1)[1].sum(-1) + z.unbind(-1)[3],
    "reshape": lambda z, x, w: z.reshape(z.shape[0], -1, 2, 2).flatten(2),
    "where": lambda z, x, w: torch.where(x > 0, z, 1j * x) + z.masked_fill(x > 1, 2.0),
    "where with a literal": lambda z, x, w: torch.where(x > 0, z, 0.5) + torch.where(x > 1, 2.0 - 1j, z * w[0]),
    "pad": lambda z, x, w: aten.constant_pad_nd(z, [1, 2]),
    "creation": lambda z, x, w: torch.full_like(z, 1 + 2j) + torch.zeros_like(z) + z.new_zeros(4) + z,
    "sizes of complex values": lambda z, x, w: torch.arange(z.shape[1]) * z.abs().sum(-1),
    "broadcast of a real part": lambda z, x, w: torch.complex(x[:1, :1], x[:1, :1]) + 1j * x,
    "fft": lambda z, x, w: torch.fft.fft(z, dim=1) + torch.fft.ifft(z, dim=1),
    "fft over two axes": lambda z, x, w: torch.fft.fft2(z, norm="ortho"),
    "rfft of odd and even lengths": lambda z, x, w: torch.fft.rfft(x, dim=1).abs(),
    "irfft to 2 n - 1 and back": lambda z, x, w: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=x.shape[1], dim=1),
    "rfft with norm": lambda z, x, w: torch.fft.rfft(x, dim=-1, norm="forward"),
    "rfft2 and back": lambda z, x, w: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=(x.shape[1], 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_an_operator_on_pairs(case: str) -> None:
    program = capture_program(Function(CASES[case], 2), torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    split(program, tolerance=1e-5)


class LongConvolution(nn.Module):
    """A diagonal state-space model by FFT: the kernel is a Vandermonde sum of complex exponentials."""

    def __init__(self, width: int = 4, states: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.log_dt = nn.Parameter(torch.rand(width) * 2 - 3)
        self.log_a = nn.Parameter(torch.randn(width, states))
        self.a_imag = nn.Parameter(torch.pi * torch.arange(states).float().repeat(width, 1))
        self.c = nn.Parameter(torch.randn(width, states, dtype=torch.cfloat))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        u, length = u.transpose(1, 2), u.shape[1]
        a = -torch.exp(self.log_a) + 1j * self.a_imag
        dta = a * torch.exp(self.log_dt)[:, None]
        powers = torch.exp(dta[..., None] * torch.arange(length))
        kernel = 2 * torch.einsum("hn,hnl->hl", self.c * (torch.exp(dta) - 1.0) / a, powers).real
        spectrum = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        return torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2)


def test_a_long_convolution_by_fft_stays_accurate() -> None:
    program = capture_program(LongConvolution(), torch.randn(2, 3, 4))
    result = split(program, sizes=[(1, 1), (2, 2), (3, 64), (1, 257), (1, 1023)])
    assert count_ops(result.graph_module, aten.cos.default) <= 4, "both forward transforms share their matrices"


def diagonal(h, x, a, b, c):
    h = a * h + x[:, :, None] * b
    return h, 2 * (h * c).sum(-1).real


@pytest.mark.parametrize("reverse", [False, True])
def test_a_complex_carry_becomes_two(reverse: bool) -> None:
    weights = [torch.exp(torch.randn(4, 8, dtype=torch.cfloat)) * 0.2, *torch.randn(2, 4, 8, dtype=torch.cfloat)]
    program = loop_program(diagonal, [torch.randn(2, 3, 4)], [torch.randn(4, 8, dtype=torch.cfloat)], weights, reverse)
    result = split(program, sizes=[*SIZES, (2, 0)])
    (loop,) = [n for n in result.graph.nodes if n.name == "recurrence"]
    assert [len(part) for part in loop.args[2:5]] == [2, 1, 6]
    assert Hoist()(result) > 0
    verify(result)
    x = torch.randn(2, 9, 4)
    torch.testing.assert_close(result(x)[1], program(x)[1], rtol=1e-5, atol=1e-5)


def test_complex_per_step_inputs_and_results_become_two() -> None:
    def step(h, x, y, w):
        z = torch.complex(x, y)
        h = h * 0.5 + z.abs()
        return h, z * w * h

    program = loop_program(step, [torch.randn(2, 3, 4)] * 2, [torch.zeros(4)], [torch.randn(4, dtype=torch.cfloat)])
    result = split(program)
    assert [port.shape for port in result.outputs] == [("batch", 4), ("sequence", "batch", 4, 2)]
    assert Hoist()(program) > 0, "z and z * w are computed for all steps before the loop"
    (loop,) = [n for n in program.graph.nodes if n.name == "recurrence"]
    assert [x.meta["val"].dtype for x in loop.args[3]].count(torch.complex64) == 0
    split(program)


def test_a_complex_per_step_input_becomes_two() -> None:
    def step(h, x, y):
        return (h * 0.5 + torch.complex(x, y) * h.conj(),)

    program = loop_program(step, [torch.randn(2, 3, 4)] * 2, [torch.randn(4, dtype=torch.cfloat)])
    Hoist()(program)
    (loop,) = [n for n in program.graph.nodes if n.name == "recurrence"]
    assert [x.meta["val"].dtype for x in loop.args[3]] == [torch.complex64]
    split(program, sizes=[(2, 5), (1, 1)])


def test_complex_inputs_and_outputs_get_a_last_axis_of_two() -> None:
    class Model(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return z * z.conj() + 1j

    program = capture_program(Model(), torch.randn(2, 3, 4, dtype=torch.cfloat))
    result = program.copy()
    SplitComplex()(result)
    verify(result)
    assert result.inputs[0].shape == ("batch", "sequence", 4, 2) and result.inputs[0].dtype is torch.float32
    assert result.inputs[0].name == program.inputs[0].name
    assert len(result.notes) == len(program.notes) + 2
    z = torch.randn(3, 5, 4, dtype=torch.cfloat)
    torch.testing.assert_close(result(torch.view_as_real(z))[0], torch.view_as_real(program(z)[0]))


def test_a_weight_with_a_lazy_conjugation_is_resolved() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.tensor([1 + 2j, 3 - 1j]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = x[..., :2] * self.w
            return z.imag - z.real

    program = capture_program(Model(), torch.randn(2, 3, 4))
    name = next(iter(program.weights))
    program.weights[name] = program.weights[name].conj()
    result = split(program)
    assert list(result.weight_names.values()) == ["w.real", "w.imag"]


def test_a_real_program_is_not_touched() -> None:
    program = capture_program(nn.Linear(4, 4), torch.randn(2, 3, 4))
    before = text(program)
    assert SplitComplex()(program) == 0
    assert text(program) == before


def test_an_operator_without_a_real_form_is_refused_with_its_source_line() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(torch.complex(x, x)).real

    program = capture_program(Model(), torch.randn(2, 3, 4))
    with pytest.raises(UnsupportedOpError, match=r"aten\.tanh.*test_split_complex\.py:\d+: .*torch\.tanh"):
        SplitComplex()(program)


def test_a_complex_state_of_a_stream_is_two_numbers() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h, out = torch.zeros(x.shape[0], 3, dtype=torch.cfloat) + 0.5j, []
            for t in range(x.shape[1]):
                h = (0.9 + 0.3j) * h + x[:, t]
                out.append(h.real - h.imag)
            return torch.stack(out, 1)

    model = Model()
    program = stream_form(seqc.trace(model, (torch.randn(2, 7, 3),), {"x": {0: "batch", 1: "sequence"}}))
    assert SplitComplex()(program) > 0
    verify(program)
    (state,) = program.states
    assert torch.equal(state.initial, torch.tensor([0.0, 0.5]).expand(1, 3, 2))
    x = torch.randn(2, 9, 3)
    (pieces,) = in_pieces(program, {"x": x}, [4, 1, 1, 3])
    torch.testing.assert_close(pieces, model(x))
