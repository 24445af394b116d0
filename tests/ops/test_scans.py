"""The scan ops of the dialect: against loops written out element by element, and the laws a scan obeys."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqc.ops  # noqa: F401
from seqc.ops.linear_attention import rule_of

ops = torch.ops.seqc
Tensors = tuple[torch.Tensor, ...]
T, B, H, K, V, D, N = 5, 2, 2, 3, 2, 3, 4


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def scan_inputs(length: int) -> tuple[Tensors, Tensors]:
    """(per step, state) of a linear scan."""
    return (rand(length, B, D), rand(length, B, D)), (rand(B, D),)


def selective_inputs(length: int) -> tuple[Tensors, Tensors]:
    return (rand(length, B, D), rand(length, B, D).abs(), rand(length, B, N), rand(length, B, N)), (rand(B, D, N),)


def attention_inputs(length: int) -> tuple[Tensors, Tensors]:
    key = torch.nn.functional.normalize(rand(length, B, H, K), dim=-1)
    per_step = (
        rand(length, B, H, K),
        key,
        rand(length, B, H, V),
        -rand(length, B, H, K).abs(),
        rand(length, B, H).sigmoid(),
    )
    return per_step, (rand(B, H, K, V),)


RATES = -torch.rand(D, N, dtype=torch.float64)


def run_scan(steps: Tensors, state: torch.Tensor, reverse: bool = False) -> Tensors:
    return ops.linear_scan(*steps, state, reverse)


def run_selective(steps: Tensors, state: torch.Tensor, reverse: bool = False) -> Tensors:
    x, dt, b, c = steps
    return ops.selective_scan(x, dt, RATES, b, c, state, reverse)


def attention(decayed: bool, delta: bool) -> Callable[..., Tensors]:
    def run(steps: Tensors, state: torch.Tensor, reverse: bool = False) -> Tensors:
        q, k, v, g, beta = steps
        return ops.linear_attention(q, k, v, state, g if decayed else None, beta if delta else None, reverse)

    return run


OPS: dict[str, tuple[Callable[..., Tensors], Callable[[int], tuple[Tensors, Tensors]]]] = {
    "linear_scan": (run_scan, scan_inputs),
    "selective_scan": (run_selective, selective_inputs),
    **{
        f"linear_attention {rule_of(g or None, d or None)}": (attention(g, d), attention_inputs)
        for g in (False, True)
        for d in (False, True)
    },
}


def test_linear_scan_is_its_definition() -> None:
    (decay, update), (state,) = scan_inputs(T)
    steps, final = ops.linear_scan(decay, update, state)
    for b in range(B):
        for d in range(D):
            h = state[b, d].item()
            for t in range(T):
                h = decay[t, b, d].item() * h + update[t, b, d].item()
                assert math.isclose(steps[t, b, d].item(), h, rel_tol=1e-12)
            assert final[b, d].item() == steps[-1, b, d].item()


def test_selective_scan_is_its_definition() -> None:
    (x, dt, b, c), (state,) = selective_inputs(T)
    y, final = ops.selective_scan(x, dt, RATES, b, c, state)
    for row in range(B):
        for d in range(D):
            h = state[row, d].tolist()
            for t in range(T):
                for n in range(N):
                    decay = math.exp(dt[t, row, d].item() * RATES[d, n].item())
                    h[n] = decay * h[n] + x[t, row, d].item() * b[t, row, n].item()
                total = sum(h[n] * c[t, row, n].item() for n in range(N))
                assert math.isclose(y[t, row, d].item(), total, rel_tol=1e-10, abs_tol=1e-12)
            assert all(math.isclose(final[row, d, n].item(), h[n], rel_tol=1e-12) for n in range(N))


@pytest.mark.parametrize(("decayed", "delta"), [(False, False), (True, False), (False, True), (True, True)])
def test_linear_attention_is_its_definition(decayed: bool, delta: bool) -> None:
    (q, k, v, g, beta), (state,) = attention_inputs(T)
    out, final = attention(decayed, delta)((q, k, v, g, beta), state)
    for row in range(B):
        for h in range(H):
            s = state[row, h].clone()
            for t in range(T):
                key, value = k[t, row, h], v[t, row, h]
                if decayed:
                    s = torch.diag(g[t, row, h].exp()) @ s
                if delta:  # the matrix form: (I - beta k k^T) S + beta k v^T
                    rate = beta[t, row, h]
                    s = (torch.eye(K, dtype=s.dtype) - rate * torch.outer(key, key)) @ s + rate * torch.outer(
                        key, value
                    )
                else:
                    s = s + torch.outer(key, value)
                torch.testing.assert_close(out[t, row, h], s.T @ q[t, row, h])
            torch.testing.assert_close(final[row, h], s)


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=15, deadline=None)
@given(first=st.integers(0, 6), second=st.integers(0, 6), reverse=st.booleans())
def test_two_pieces_with_the_state_handed_on_are_the_whole(name: str, first: int, second: int, reverse: bool) -> None:
    run, make = OPS[name]
    torch.manual_seed(first * 7 + second)
    steps, (state,) = make(first + second)
    whole, final = run(steps, state, reverse)
    head, tail = (tuple(s[:first] for s in steps), tuple(s[first:] for s in steps))
    if reverse:
        last, middle = run(tail, state, True)
        start, end = run(head, middle, True)
    else:
        start, middle = run(head, state)
        last, end = run(tail, middle)
    torch.testing.assert_close(torch.cat([start, last]), whole)
    torch.testing.assert_close(end, final)


@pytest.mark.parametrize("name", OPS)
def test_reverse_is_the_scan_of_the_reversed_steps(name: str) -> None:
    run, make = OPS[name]
    steps, (state,) = make(T)
    y, final = run(steps, state, True)
    mirrored, end = run(tuple(s.flip(0) for s in steps), state)
    assert torch.equal(y, mirrored.flip(0)) and torch.equal(final, end)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=6, max_size=6))
def test_pairs_of_decay_and_update_combine_associatively(numbers: list[float]) -> None:
    pairs = [(numbers[i], numbers[i + 1]) for i in (0, 2, 4)]

    def after(left: tuple[float, float], right: tuple[float, float]) -> tuple[float, float]:
        return right[0] * left[0], right[0] * left[1] + right[1]

    one, two = after(after(pairs[0], pairs[1]), pairs[2]), after(pairs[0], after(pairs[1], pairs[2]))
    assert one == pytest.approx(two, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", OPS)
def test_torch_finds_schema_and_shapes_right(name: str) -> None:
    """torch.library.opcheck: the schema, the fake implementation, and its shapes with symbolic sizes."""
    op = getattr(ops, name.split()[0]).default
    (steps, (state,)) = OPS[name][1](T)
    q = {"linear_scan": lambda: (*steps, state), "selective_scan": lambda: (*steps[:2], RATES, *steps[2:], state)}
    arguments = q.get(
        name, lambda: (*steps[:3], state, steps[3] if "gated" in name else None, steps[4] if "delta" in name else None)
    )()
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
