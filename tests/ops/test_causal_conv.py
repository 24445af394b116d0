"""``seqc::causal_conv``: against its definition element by element, and pieces of a sequence against the whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqc.ops  # noqa: F401

ops = torch.ops.seqc
B, D = 2, 3


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("taps", "dilation", "length"), itertools.product((1, 2, 4), (1, 2), (1, 2, 5, 9)))
def test_it_is_its_definition(taps: int, dilation: int, length: int) -> None:
    n = (taps - 1) * dilation
    x, weight, bias, state = rand(B, D, length), rand(D, 1, taps), rand(D), rand(B, D, n)
    y, final = ops.causal_conv(x, weight, bias, state, dilation)
    assert final.shape == (B, D, n)
    for b, d in itertools.product(range(B), range(D)):
        line = [*state[b, d].tolist(), *x[b, d].tolist()]
        for t in range(length):
            total = bias[d].item() + sum(weight[d, 0, j].item() * line[t + j * dilation] for j in range(taps))
            assert math.isclose(y[b, d, t].item(), total, rel_tol=1e-11, abs_tol=1e-12)
        assert final[b, d].tolist() == line[length:]


@pytest.mark.parametrize("taps", [1, 3])
def test_no_state_stands_for_zeros_and_no_bias_for_none(taps: int) -> None:
    x, weight, zeros = rand(B, D, 5), rand(D, 1, taps), torch.zeros(B, D, taps - 1, dtype=torch.float64)
    for bare, full in zip(
        ops.causal_conv(x, weight, None, None),
        ops.causal_conv(x, weight, torch.zeros(D, dtype=torch.float64), zeros),
        strict=True,
    ):
        assert torch.equal(bare, full)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 6), st.integers(1, 4), st.integers(1, 2))
def test_two_pieces_with_the_state_handed_on_are_the_whole(first: int, second: int, taps: int, dilation: int) -> None:
    torch.manual_seed(first * 7 + second)
    x, weight, bias = rand(B, D, first + second), rand(D, 1, taps), rand(D)
    state = rand(B, D, (taps - 1) * dilation)
    whole, final = ops.causal_conv(x, weight, bias, state, dilation)
    pieces = []
    for piece in (x[:, :, :first], x[:, :, first:]):
        if piece.shape[2]:
            y, state = ops.causal_conv(piece, weight, bias, state, dilation)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 2), whole)
    assert torch.equal(state, final)


@pytest.mark.parametrize("stateful", [False, True])
def test_torch_finds_schema_and_shapes_right(stateful: bool) -> None:
    x, weight, bias = rand(B, D, 5), rand(D, 1, 3), rand(D)
    state = rand(B, D, 4) if stateful else None
    for op in (ops.causal_conv.default, ops.ort_causal_conv.default):
        torch.library.opcheck(op, (x, weight, bias, state, 2), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        ops.left_padded_conv.default, (x, weight, bias, 3, 2), test_utils=("test_schema", "test_faketensor")
    )


def test_left_padded_conv_with_all_zeros_in_front_is_the_causal_one() -> None:
    x, weight, bias = rand(B, D, 5), rand(D, 1, 3), rand(D)
    assert torch.equal(ops.left_padded_conv(x, weight, bias, 4, 2), ops.causal_conv(x, weight, bias, None, 2)[0])


@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_fft_conv_is_the_causal_convolution_with_the_kernel_mirrored(length: int) -> None:
    x, kernel = torch.randn(2, 3, length, dtype=torch.float64), torch.randn(3, 64, dtype=torch.float64)
    found = ops.fft_conv(x, kernel)
    expected = ops.causal_conv(x, kernel[:, :length].flip(1).unsqueeze(1), None, None, 1)[0]
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    torch.library.opcheck(ops.fft_conv.default, (x, kernel), test_utils=("test_schema", "test_faketensor"))
