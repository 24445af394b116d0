"""ClassifyRecurrence on log-sum-exp recurrences: running maxima with the sums relative to them, and what only looks so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqc
from seqc.ops.recurrence import is_recurrence
from seqc.passes import DEFAULT
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.text import text
from tests.helpers.programs import loop_program

B, H, D = 2, 3, 4
INF = float("inf")
States = tuple[torch.Tensor, ...]
Step = Callable[[States, torch.Tensor, torch.Tensor, torch.Tensor], tuple[States, torch.Tensor]]


def values(batch: int, length: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(length)
    return {
        "s": 3 * torch.randn(batch, length, H),
        "v": torch.randn(batch, length, H, D),
        "f": torch.randn(batch, length, H),
    }


def run(step: Step, states: States, xs: dict[str, torch.Tensor], reverse: bool) -> list[torch.Tensor]:
    """The states at the end and the outputs [sequence, batch, ...] of a loop over a score, values and a gate per head."""
    length, out = xs["s"].shape[1], []
    for t in reversed(range(length)) if reverse else range(length):
        states, y = step(states, xs["s"][:, t], xs["v"][:, t], xs["f"][:, t])
        out.append(y)
    return [*states, torch.stack(out[::-1] if reverse else out)]


class Attention(nn.Module):
    def forward(self, s: torch.Tensor, v: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return run(STEPS["maximum"], nothing(s.shape[0]), {"s": s, "v": v, "f": f}, False)[-1]


def nothing(batch: int) -> States:
    """(m, u, w) with no step yet."""
    return torch.full((batch, H), -INF), torch.zeros(batch, H, D), torch.zeros(batch, H)


def classified(
    step: Step, start: Callable[[int], States] = nothing, reverse: bool = False
) -> tuple[Program, list[str]]:
    """The Program of the loop after the default passes, equal to the loop at other lengths; and the reasons."""
    rows = [state[0] for state in start(1)]

    def body(*args: torch.Tensor) -> States:
        states, y = step(args[: len(rows)], *args[len(rows) :])
        return (*states, y)

    program = loop_program(body, list(values(B, 5).values()), rows, reverse=reverse)
    record = next(r for r in run_passes(program, DEFAULT) if r.name == "classify_recurrence")
    assert record.name == "classify_recurrence"
    for batch, length in ((1, 1), (3, 14)):
        xs = values(batch, length)
        for found, expected in zip(program(*xs.values()), run(step, start(batch), xs, reverse), strict=True):
            torch.testing.assert_close(found, expected)
    return program, list(record.reasons)


def dialect(program: Program) -> list[str]:
    """The dialect ops and loops, in order."""
    names = []
    for node in program.graph.nodes:
        if is_recurrence(node):
            names.append("recurrence")
        elif str(node.target).startswith("seqc."):
            names.append(str(node.target).split(".")[1])
    return names


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze(-1)


def attention(largest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Step:
    def step(states, s, v, f):
        m, u, w = states
        top = largest(m, s)
        old, new = torch.exp(m - top), torch.exp(s - top)
        u, w = u * wide(old) + wide(new) * v, w * old + new
        return (top, u, w), u / wide(w)

    return step


def decayed(states, s, v, f):
    m, u, w = states
    kept = m + F.logsigmoid(f)
    top = torch.maximum(s, kept)
    u = torch.exp(kept - top)[..., None] * u + torch.einsum("bh,bhd->bhd", torch.exp(s - top), v)
    w = torch.exp(kept - top) * w + torch.exp(s - top)
    return (top, u, w), u / wide(w)


def exponent_in_pieces(states, s, v, f):
    m, u, w = states
    d = -F.softplus(f)
    top = torch.maximum(d + m, 2 * f + s)
    old, new = torch.exp(m - (top - d)), torch.exp(f - top + (s + f))
    return (top, wide(old) * u + (v * wide(new)), new + old * w), wide(w) * u


def product_of_exponentials(states, s, v, f):
    m, u, w = states
    d = -F.softplus(f)
    top = torch.maximum(m + d, s)
    old, new = torch.exp(m - top) * torch.exp(d), torch.exp(s - top)
    return (top, wide(old) * u + wide(new) * v, old * w + new), u / wide(w + 1)


def values_that_are_exponentials(states, s, v, f):
    m, u, w = states
    top = torch.maximum(m, s)
    u = wide(torch.exp(m - top)) * u + wide(torch.exp(s - top)) * torch.exp(v) * wide(torch.sigmoid(f))
    w = torch.exp(m - top) * w + torch.exp(s - top)
    return (top, u, w), u / wide(w)


def constant_decay(states, s, v, f):
    m, u, w = states
    top = torch.maximum(m - 0.5, s)
    old, new = torch.exp(m - 0.5 - top), torch.exp(s - top)
    return (top, wide(old) * u + wide(new) * v, old * w + new), u / wide(w + 1)


def read_before_the_update(states, s, v, f):
    """The readout of RWKV: the state before the step, and the step itself with a bonus."""
    m, u, w = states
    seen = torch.maximum(m, f + s)
    a, b = torch.exp(m - seen), torch.exp(f + s - seen)
    y = (wide(a) * u + wide(b) * v) / wide(a * w + b)
    top = torch.maximum(m - 0.3, s)
    old, new = torch.exp(m - 0.3 - top), torch.exp(s - top)
    return (top, wide(old) * u + wide(new) * v, old * w + new), y


def constants(states, s, v, f):
    m, u, w = states
    score = torch.full((), 0.25)
    top = torch.maximum(m - 0.1, score)
    old, new = torch.exp(m - 0.1 - top), torch.exp(score - top)
    return (top, wide(old) * u + wide(new) * 2.0, old * w + new), u / wide(w + 1) + v


STEPS: dict[str, Step] = {
    "maximum": attention(torch.maximum),
    "max": attention(torch.max),
    "clamp": attention(lambda m, s: torch.clamp(s, min=m)),
    "where": attention(lambda m, s: torch.where(m > s, m, s)),
    "where the other way": attention(lambda m, s: torch.where(m <= s, s, m)),
    "amax of a stack": attention(lambda m, s: torch.stack([s, m], -1).amax(-1)),
    "max of a stack": attention(lambda m, s: torch.stack([m, s]).max(0).values),
    "decayed": decayed,
    "exponent in pieces": exponent_in_pieces,
    "product of exponentials": product_of_exponentials,
    "values that are exponentials": values_that_are_exponentials,
    "constant decay": constant_decay,
    "constants": constants,
    "read before the update": read_before_the_update,
}


@pytest.mark.parametrize("name", STEPS)
def test_running_maxima_with_their_sums_become_a_softmax_scan_in_any_spelling(name: str) -> None:
    program, reasons = classified(STEPS[name])
    assert dialect(program) == ["softmax_scan"]
    (reason,) = reasons
    assert "is a softmax_scan (sums relative to a running maximum, one score for several values" in reason
    assert "confirmed in float64" in reason


def test_the_source_line_of_the_loop_is_said() -> None:
    program = seqc.trace(Attention(), values(B, 5))
    record = next(r for r in run_passes(program, DEFAULT) if r.name == "classify_recurrence")
    assert dialect(program) == ["softmax_scan"]
    assert "test_classify_softmax.py:" in record.reasons[0]


@pytest.mark.parametrize("value", [-1e38, 0.0])
def test_it_starts_from_any_state(value: float) -> None:
    start = lambda batch: (torch.full((batch, H), value), torch.ones(batch, H, D), torch.ones(batch, H))  # noqa: E731
    program, _ = classified(decayed, start)
    assert dialect(program) == ["softmax_scan"]


def test_a_loop_from_the_end_becomes_a_reverse_scan() -> None:
    program, _ = classified(read_before_the_update, reverse=True)
    (node,) = [n for n in program.graph.nodes if "seqc.softmax_scan" in str(n.target)]
    assert node.args[6] is True


def test_the_text_of_the_program_before_and_after() -> None:
    program, _ = classified(constant_decay)
    lines = text(program, provenance=False).splitlines()
    assert not any("recurrence(" in line for line in lines)
    (line,) = [line for line in lines if "seqc.softmax_scan" in line]
    tops, sums = f"f32[sequence, batch, {H}, 1]", f"f32[sequence, batch, {H}, {D}]"
    assert line.split(" = ")[0].split(": ")[1].startswith(f"({tops}, {sums}, {tops}, ")
    decay = next(n for n in program.graph.nodes if "seqc.softmax_scan" in str(n.target)).args[2]
    assert program.shape_of(decay.meta["val"])[0] == 1


def test_a_score_for_each_channel() -> None:
    def step(states, s, v, f):
        m, u, w = states
        top = torch.maximum(m, v)
        old, new = torch.exp(m - top), torch.exp(v - top)
        u, w = old * u + new * wide(f), old * w + new
        return (top, u, w), u / w

    program, (reason,) = classified(step, lambda b: (torch.full((b, H, D), -INF), *(torch.zeros(2, b, H, D))))
    assert dialect(program) == ["softmax_scan"] and "one score for each value" in reason


@pytest.mark.parametrize("spelling", [torch.logaddexp, lambda a, b: torch.logsumexp(torch.stack([a, b]), 0)])
def test_states_weighted_by_the_logarithm_of_a_sum_are_recognised_one_after_the_other(spelling) -> None:
    def step(states, s, v, f):
        z, state = states
        top = spelling(z - 0.1, s)
        state = wide(torch.exp(z - 0.1 - top)) * state + wide(torch.exp(s - top)) * v
        return (top, state), state + wide(top)

    program, reasons = classified(step, lambda batch: nothing(batch)[:2])
    assert dialect(program) == ["softmax_scan", "linear_scan"]
    assert "the logarithm of summed exponentials, with decay" in reasons[0]


def test_other_states_may_read_the_sums() -> None:
    """They stay in a loop that reads the sums step by step."""

    def step(states, s, v, f):
        *softmax, h = states
        softmax, y = STEPS["maximum"](tuple(softmax), s, v, f)
        return (*softmax, torch.tanh(h + y - states[1])), h

    program, reasons = classified(step, lambda batch: (*nothing(batch), torch.zeros(batch, H, D)))
    assert dialect(program) == ["softmax_scan", "recurrence"]
    assert "is a softmax_scan" in reasons[0] and "aten.tanh.default of the state" in reasons[1]


# -- must not match ----------------------------------------------------------------------------------------------------


def refused(
    top: Callable[..., torch.Tensor], old: Callable[..., torch.Tensor], new: Callable[..., torch.Tensor]
) -> Step:
    """A step whose maximum, and both factors, are given."""

    def step(states, s, v, f):
        m, u, w = states
        following = top(m, s, f, w)
        a, b = old(m, following, f), new(s, following, m)
        return (following, wide(a) * u + wide(b) * v, a * w + b), u / wide(w + 1)

    return step


def plain_top(m, s, f, w):
    return torch.maximum(m, s)


def plain_old(m, top, f):
    return torch.exp(m - top)


def plain_new(s, top, m):
    return torch.exp(s - top)


REFUSED: dict[str, tuple[Step, str]] = {
    "a maximum that reads another state": (
        refused(lambda m, s, f, w: torch.maximum(m - w, s), plain_old, plain_new),
        "the largest value so far is computed from another state",
    ),
    "a score that depends on the state": (
        refused(lambda m, s, f, w: torch.maximum(m, s * w), plain_old, plain_new),
        "the largest value so far is computed from another state",
    ),
    "a maximum that shrinks by a factor": (
        refused(lambda m, s, f, w: torch.maximum(0.9 * m, s), plain_old, plain_new),
        "not kept, or shifted by a sum",
    ),
    "a minimum": (
        refused(lambda m, s, f, w: torch.where(m > s, s, m), plain_old, plain_new),
        "exp.default of the state",
    ),
    "a decay that the maximum has not": (
        refused(plain_top, lambda m, top, f: torch.exp(m - top - f.abs()), plain_new),
        "no state is a sum relative to the largest value so far",
    ),
    "a weight by another score": (
        refused(plain_top, plain_old, lambda s, top, m: torch.exp(0.5 * s - top)),
        "no state is a sum relative to the largest value so far",
    ),
    "a weight relative to the maximum before": (
        refused(plain_top, plain_old, lambda s, top, m: torch.exp(s - torch.maximum(m, torch.zeros(())))),
        "no state is a sum relative to the largest value so far",
    ),
    "a decay that a condition on the maximum cuts": (
        refused(plain_top, lambda m, top, f: torch.where(m > 1000, 0.0, torch.exp(m - top)), plain_new),
        "no state is a sum relative to the largest value so far",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_resembles_a_softmax_scan_stays_a_loop_with_its_reason(name: str) -> None:
    step, why = REFUSED[name]
    program, reasons = classified(step, lambda batch: (torch.zeros(batch, H), *nothing(batch)[1:]))
    assert dialect(program) == ["recurrence"]
    assert all("stays a recurrence" in reason for reason in reasons)
    assert any(why in reason for reason in reasons)


def test_a_sum_with_another_decay_is_not_the_denominator() -> None:
    """Once the maximum is known outside, it is a linear scan of its own."""

    def step(states, s, v, f):
        m, u, w = states
        kept = m - f.abs()
        top = torch.maximum(kept, s)
        u = wide(torch.exp(kept - top)) * u + wide(torch.exp(s - top)) * v
        w = torch.exp(m - top) * w + torch.exp(s - top)
        return (top, u, w), u / wide(w)

    program, reasons = classified(step)
    assert dialect(program) == ["softmax_scan", "linear_scan"]
    assert len(reasons) == 2


def test_a_running_maximum_alone_stays_a_loop() -> None:
    def step(states, s, v, f):
        top = torch.maximum(states[0], s)
        return (top,), top

    program, (reason,) = classified(step, lambda batch: nothing(batch)[:1])
    assert dialect(program) == ["recurrence"]
    assert "no softmax_scan: no state is a sum relative to the largest value so far" in reason
