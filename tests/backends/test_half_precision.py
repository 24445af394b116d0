"""Scan ops in float16 where ONNX Runtime's CPU provider has kernels; refused, by name, where it has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import seqc
from seqc.backends.onnx import export
from seqc.errors import UnsupportedOpError
from seqc.lowerings.lower import Lower
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.target import TARGETS
from tests.backends.test_lowerings import CASES, Calls
from tests.helpers.onnx import assert_same, run, session

ops = torch.ops.seqc
Tensors = tuple[torch.Tensor, ...]
EPS = torch.finfo(torch.float16).eps


def softmax(length: int) -> Tensors:
    return 3 * torch.randn(length, 2, 2, 1), torch.randn(length, 2, 2, 3)


def weighted_mean(score: torch.Tensor, value: torch.Tensor) -> Tensors:
    top = score.new_full((2, 2, 1), float("-inf"))
    found = ops.softmax_scan(score, value, None, top, value.new_zeros(2, 2, 3), value.new_zeros(2, 2, 1))
    return (found[1] / found[2],)


def convolution(length: int) -> Tensors:
    return torch.randn(2, 4, length), torch.randn(4, 1, 3), torch.randn(4)


def cells(length: int) -> Tensors:
    return torch.randn(length, 2, 8), torch.randn(8, 2) / 2, torch.zeros(8), torch.zeros(2, 2), torch.zeros(2, 2)


Case = tuple[str, Callable[..., Tensors], Callable[[int], Tensors], tuple[int | None, ...]]
"""Op, function, inputs, and the axis of time of each input."""

HALF: dict[str, Case] = {
    "linear_scan": (*CASES["linear_scan plain"][:3], (0, 0, None)),
    "selective_scan": (*CASES["selective_scan plain"][:3], (0, 0, None, 0, 0, None)),
    "linear_attention gated": (*CASES["linear_attention gated plain"][:3], (0, 0, 0, None, 0, 0)),
    "linear_attention gated_delta": (*CASES["linear_attention gated_delta plain"][:3], (0, 0, 0, None, 0, 0)),
    "softmax_scan": ("softmax_scan", weighted_mean, softmax, (0, 0)),
    "causal_conv": ("causal_conv", lambda x, w, b: ops.causal_conv(x, w, b, None)[:1], convolution, (2, None, None)),
    "gated_rnn": ("gated_rnn", lambda *x: ops.gated_rnn(*x, "lstm")[:1], cells, (0, None, None, None, None)),
}
FORMS = [
    ("linear_scan", "sequential"),
    ("selective_scan", "channels_last"),
    ("linear_attention gated", "sequential"),
    ("linear_attention gated_delta", "sequential"),
    ("softmax_scan", "sequential"),
    ("causal_conv", "conv"),
    ("gated_rnn", "sequential"),
]


def lowered(name: str, form: str | None, dtype: torch.dtype) -> Program:
    op, function, make, axes = HALF[name]
    given = [x.to(dtype) for x in make(5)]
    program = seqc.trace(Calls(function), tuple(given), [{} if a is None else {a: "sequence"} for a in axes])
    run_passes(program, [Lower(TARGETS["ort-cpu"], {} if form is None else {op: form})])
    return program


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_a_form_in_float16_is_as_exact_as_the_type(name: str, form: str) -> None:
    """Against the op in float64 on the same (rounded) inputs: within a few units in the last place of the scale."""
    _, function, make, _ = HALF[name]
    compiled = session(export(lowered(name, form, torch.float16)))
    for length in (1, 17, 257):
        torch.manual_seed(length)
        given = [x.half() for x in make(length)]
        expected = [x.half() for x in function(*(x.double() for x in given))]
        assert_same(run(compiled, given), expected, 4 * EPS)


@pytest.mark.parametrize(
    ("name", "form", "why"),
    [
        ("linear_attention gated", "chunked", "sums over a chunk lose too much in torch.float16"),
        ("linear_attention gated_delta", "chunked_delta", "sums over a chunk lose too much in torch.float16"),
        ("linear_attention gated", "contrib", "LinearAttention has no torch.float16 kernel on the CPU"),
        ("causal_conv", "contrib", "CausalConvWithState has no torch.float16 kernel on the CPU"),
    ],
)
def test_a_form_without_a_kernel_says_so(name: str, form: str, why: str) -> None:
    with pytest.raises(UnsupportedOpError, match=why):
        lowered(name, form, torch.float16)


@pytest.mark.parametrize("name", HALF)
def test_bfloat16_is_refused_by_the_name_of_the_op(name: str) -> None:
    with pytest.raises(
        UnsupportedOpError, match=rf"{HALF[name][0]} at .* computes in bfloat16.*no kernels.*\.float\(\)"
    ):
        lowered(name, None, torch.bfloat16)
