"""``seqc::lti_scan`` against its definition in plain Python, and as pieces, mirrored and registered."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqc.ops  # noqa: F401

T, B, D, M, K = 5, 2, 3, 2, 2
Tensors = tuple[torch.Tensor, ...]


def system() -> Tensors:
    torch.manual_seed(0)
    shapes = ((D, M, K, K), (D, M, K), (D, M, K), (D,))
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


def signal(length: int) -> Tensors:
    torch.manual_seed(length)
    return torch.randn(length, B, D, dtype=torch.float64), torch.randn(B, D, M, K, dtype=torch.float64)


def scan(u: torch.Tensor, state: torch.Tensor, reverse: bool = False) -> Tensors:
    return tuple(torch.ops.seqc.lti_scan(*system(), u, state, reverse))


def test_it_is_its_definition() -> None:
    a, b, c, d = (x.tolist() for x in system())
    u, state = signal(T)
    y, final = scan(u, state)
    for row in range(B):
        for channel in range(D):
            h = state[row, channel].tolist()
            for t in range(T):
                now = u[t, row, channel].item()
                read = sum(c[channel][m][k] * h[m][k] for m in range(M) for k in range(K)) + d[channel] * now
                assert math.isclose(y[t, row, channel].item(), read, rel_tol=1e-9, abs_tol=1e-12)
                h = [
                    [sum(a[channel][m][i][j] * h[m][j] for j in range(K)) + b[channel][m][i] * now for i in range(K)]
                    for m in range(M)
                ]
            torch.testing.assert_close(final[row, channel], torch.tensor(h, dtype=torch.float64))


@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, 6), second=st.integers(0, 6), reverse=st.booleans())
def test_two_pieces_with_the_state_handed_on_are_the_whole(first: int, second: int, reverse: bool) -> None:
    u, state = signal(first + second)
    whole, final = scan(u, state, reverse)
    pieces = [u[first:], u[:first]] if reverse else [u[:first], u[first:]]
    start, middle = scan(pieces[0], state, reverse)
    rest, end = scan(pieces[1], middle, reverse)
    torch.testing.assert_close(torch.cat([rest, start] if reverse else [start, rest]), whole)
    torch.testing.assert_close(end, final)


def test_reverse_is_the_scan_of_the_reversed_steps() -> None:
    u, state = signal(T)
    y, final = scan(u, state, True)
    mirrored, end = scan(u.flip(0), state)
    assert torch.equal(y, mirrored.flip(0)) and torch.equal(final, end)


@pytest.mark.parametrize("reverse", [False, True])
def test_torch_finds_schema_and_shapes_right(reverse: bool) -> None:
    arguments = (*system(), *signal(T), reverse)
    torch.library.opcheck(torch.ops.seqc.lti_scan.default, arguments, test_utils=("test_schema", "test_faketensor"))
