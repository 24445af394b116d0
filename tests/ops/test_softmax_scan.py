"""seqc::softmax_scan: against its definition in exact sums, and the monoid that makes it a scan."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqc.ops  # noqa: F401

softmax_scan = torch.ops.seqc.softmax_scan
T, B, H, D = 6, 2, 3, 4
INF = float("inf")
Element = tuple[float, float, float, float]


def inputs(length: int, vector: bool = True, decayed: bool = True) -> dict[str, torch.Tensor | None]:
    """Of one score per head that weighs a vector, or of a score per channel."""
    scores = (B, H, 1) if vector else (B, H, D)
    return {
        "score": 3 * torch.randn(length, *scores, dtype=torch.float64),
        "value": torch.randn(length, B, H, D, dtype=torch.float64),
        "decay": -torch.rand(length, *scores, dtype=torch.float64) if decayed else None,
        "top": torch.randn(scores, dtype=torch.float64),
        "numerator": torch.randn(B, H, D, dtype=torch.float64),
        "denominator": torch.rand(scores, dtype=torch.float64),
    }


@pytest.mark.parametrize("vector", [True, False])
@pytest.mark.parametrize("decayed", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_it_is_a_weighted_sum_of_all_steps_so_far(vector: bool, decayed: bool, reverse: bool) -> None:
    torch.manual_seed(0)
    given = inputs(T, vector, decayed)
    tops, numerators, denominators, *finals = softmax_scan(**given, reverse=reverse)
    order = list(reversed(range(T))) if reverse else list(range(T))
    for count, t in enumerate(order, 1):
        past = order[:count]
        drops = [0.0 if not decayed else given["decay"][past[i + 1 :]].sum(0) for i in range(count)]
        logs = [given["score"][s] + drop for s, drop in zip(past, drops, strict=True)]
        start = given["top"] + (given["decay"][past].sum(0) if decayed else 0.0)
        top = torch.stack([start, *logs]).amax(0)
        torch.testing.assert_close(tops[t], top)
        value = given["numerator"] * (start - top).exp()
        total = given["denominator"] * (start - top).exp()
        for s, log in zip(past, logs, strict=True):
            value = value + (log - top).exp() * given["value"][s]
            total = total + (log - top).exp()
        torch.testing.assert_close(numerators[t], value)
        torch.testing.assert_close(denominators[t], total)
    for column, final in zip((tops, numerators, denominators), finals, strict=True):
        assert torch.equal(final, column[order[-1]])


@pytest.mark.parametrize("start", [-INF, -1e38])
def test_the_ratio_is_attention_over_the_past_at_scores_of_any_size(start: float) -> None:
    torch.manual_seed(0)
    score, value = 40 * torch.randn(50, 1), torch.randn(50, 5)
    state = torch.full((1,), start), torch.zeros(5), torch.zeros(1)
    tops, numerators, denominators, *_ = softmax_scan(score, value, None, *state)
    for t in range(50):
        expected = torch.softmax(score[: t + 1, 0].double(), 0) @ value[: t + 1].double()
        torch.testing.assert_close((numerators[t] / denominators[t]).double(), expected, rtol=1e-5, atol=1e-6)
        log = torch.logsumexp(score[: t + 1, 0].double(), 0)
        assert math.isclose((tops[t] + denominators[t].log()).item(), log.item(), rel_tol=1e-5)


def test_scores_of_minus_infinity_have_no_weight_even_before_any_other() -> None:
    score = torch.tensor([[-INF], [-INF], [1.0], [-INF]])
    value = torch.tensor([[5.0], [6.0], [7.0], [8.0]])
    state = torch.full((1,), -INF), torch.zeros(1), torch.zeros(1)
    tops, numerators, denominators, *_ = softmax_scan(score, value, None, *state)
    assert tops.flatten().tolist() == [-INF, -INF, 1.0, 1.0]
    assert numerators.flatten().tolist() == [0.0, 0.0, 7.0, 7.0]
    assert denominators.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]


def test_a_decay_that_is_the_same_in_each_step_needs_one_step_only() -> None:
    torch.manual_seed(0)
    given = inputs(T)
    given["decay"] = given["decay"][:1]
    repeated = given | {"decay": given["decay"].expand(T, -1, -1, -1)}
    for short, long in zip(softmax_scan(**given), softmax_scan(**repeated), strict=True):
        assert torch.equal(short, long)


def after(left: Element, right: Element) -> Element:
    """The monoid of the op's docstring, in plain floats."""
    (d1, m1, u1, w1), (d2, m2, u2, w2) = left, right
    m = max(m1 + d2, m2)
    a, b = (math.exp(x - m) if x > -INF else 0.0 for x in (m1 + d2, m2))
    return d1 + d2, m, a * u1 + b * u2, a * w1 + b * w2


finite = st.floats(-60, 60)
elements = st.tuples(st.floats(-60, 0), st.one_of(finite, st.just(-INF)), finite, st.floats(0, 60))


@settings(max_examples=200, deadline=None)
@given(st.lists(elements, min_size=3, max_size=3))
def test_stretches_of_steps_combine_associatively(parts: list[Element]) -> None:
    one, two = after(after(parts[0], parts[1]), parts[2]), after(parts[0], after(parts[1], parts[2]))
    assert one == pytest.approx(two, rel=1e-9, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-60, 0), finite, finite), min_size=1, max_size=8), st.integers(0, 8))
def test_the_op_is_the_product_of_its_steps_however_they_are_grouped(
    steps: list[tuple[float, float, float]], cut: int
) -> None:
    whole = (0.0, -INF, 0.0, 0.0)
    halves = [whole, whole]
    for i, (d, s, v) in enumerate(steps):
        halves[i >= cut] = after(halves[i >= cut], (d, s, v, 1.0))
    _, m, u, w = after(*halves)
    d, s, v = (torch.tensor(column, dtype=torch.float64).unsqueeze(1) for column in zip(*steps, strict=True))
    state = torch.full((1,), -INF, dtype=torch.float64), torch.zeros(1).double(), torch.zeros(1).double()
    found = [x.item() for x in softmax_scan(s, v, d, *state)[3:]]
    assert found == pytest.approx([m, u, w], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 4, T])
def test_two_pieces_with_the_states_handed_on_are_the_whole(reverse: bool, cut: int) -> None:
    torch.manual_seed(cut)
    given = inputs(T)
    whole = softmax_scan(**given, reverse=reverse)
    timed = ("score", "value", "decay")
    pieces = [given | {k: given[k][s] for k in timed} for s in (slice(0, cut), slice(cut, T))]
    first, second = reversed(pieces) if reverse else pieces
    head = softmax_scan(**first, reverse=reverse)
    handed = dict(zip(("top", "numerator", "denominator"), head[3:], strict=True))
    tail = softmax_scan(**(second | handed), reverse=reverse)
    for i in range(3):
        torch.testing.assert_close(torch.cat([tail[i], head[i]] if reverse else [head[i], tail[i]]), whole[i])
        torch.testing.assert_close(tail[i + 3], whole[i + 3])


@pytest.mark.parametrize("decayed", [True, False])
def test_torch_finds_schema_and_shapes_right(decayed: bool) -> None:
    arguments = tuple(inputs(T, decayed=decayed).values())
    torch.library.opcheck(softmax_scan.default, arguments, test_utils=("test_schema", "test_faketensor"))
