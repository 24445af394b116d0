"""CausalConv: every spelling of a causal depthwise convolution, and what only looks like one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqc
from seqc.passes import causal_conv
from seqc.passes.causal_conv import CausalConv
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.text import text
from tests.helpers.programs import count_ops

D, K = 6, 4
CONV = torch.ops.seqc.causal_conv.default
Tensor = torch.Tensor
Spelling = Callable[[Tensor, Tensor, Tensor], Any]


class Model(nn.Module):
    """``spelling(x, weight, bias)``: x [batch, sequence, D], weight [D, 1, K], bias [D]."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(D, 1, K)), nn.Parameter(torch.randn(D))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Any:
        return self.spelling(x, self.weight, self.bias)


def rewritten(spelling: Spelling, lengths: tuple[int, ...] = (1, 2, 3, 4, 17)) -> tuple[Program, int, str]:
    """The Program after the pass, its changes and its reasons; outputs are compared with the model's at ``lengths``."""
    torch.manual_seed(0)
    model = Model(spelling)
    program = seqc.trace(model, (torch.randn(2, 9, D),))
    (record,) = run_passes(program, [CausalConv()])
    for length in lengths:
        x = torch.randn(3, length, D)
        expected = model(x)
        for a, b in zip(expected if isinstance(expected, tuple) else (expected,), program(x), strict=True):
            torch.testing.assert_close(b, a)
    return program, record.changes, "; ".join(record.reasons)


def calls(program: Program) -> list[Any]:
    return [n for n in program.graph.nodes if n.target is CONV]


def first(x: Tensor) -> Tensor:
    """[batch, D, sequence]."""
    return x.transpose(1, 2)


def zeros(x: Tensor, steps: int) -> Tensor:
    return x.new_zeros(x.shape[0], D, steps)


def history(x: Tensor, b: Tensor, steps: int = K - 1) -> Tensor:
    """A state that is not zero, [batch, D, steps]."""
    return b[None, :, None].expand(x.shape[0], D, steps) * 1.5


SPELLINGS: dict[str, Spelling] = {
    "both sides padded, the end cut at the length": lambda x, w, b: F.conv1d(first(x), w, b, padding=K - 1, groups=D)[
        ..., : x.shape[1]
    ],
    "both sides padded, the end cut by a negative": lambda x, w, b: F.conv1d(first(x), w, b, padding=K - 1, groups=D)[
        :, :, : 1 - K
    ],
    "cut behind a transpose and an activation": lambda x, w, b: F.silu(
        F.conv1d(first(x), w, b, padding=K - 1, groups=D).transpose(1, 2)
    )[:, : 1 - K],
    "padded in front": lambda x, w, b: F.conv1d(F.pad(first(x), (K - 1, 0)), w, b, groups=D),
    "padded in front by a module": lambda x, w, b: F.conv1d(
        nn.ConstantPad1d((K - 1, 0), 0.0)(first(x)), w, b, groups=D
    ),
    "padded before the transpose": lambda x, w, b: F.conv1d(first(F.pad(x, (0, 0, K - 1, 0))), w, b, groups=D),
    "a cat with zeros": lambda x, w, b: F.conv1d(torch.cat([zeros(x, K - 1), first(x)], -1), w, b, groups=D),
    "too much padding": lambda x, w, b: F.conv1d(F.pad(first(x), (7, 2)), w, b, groups=D)[..., 4:-2],
    "padded by both": lambda x, w, b: F.conv1d(F.pad(first(x), (2, 0)), w, b, padding=1, groups=D)[..., :-1],
    "two axes": lambda x, w, b: F.conv2d(F.pad(first(x), (K - 1, 0)).unsqueeze(2), w.unsqueeze(2), b, groups=D).squeeze(
        2
    ),
    "two axes, padded by itself": lambda x, w, b: F.conv2d(
        first(x).unsqueeze(2), w.unsqueeze(2), b, padding=(0, K - 1), groups=D
    ).squeeze(2)[..., : 1 - K],
    "no bias": lambda x, w, b: F.conv1d(first(x), w, padding=K - 1, groups=D)[..., : x.shape[1]],
    "windows by unfold": lambda x, w, b: (F.pad(first(x), (K - 1, 0)).unfold(-1, K, 1) * w).sum(-1),
    "a sum of slices": lambda x, w, b: (
        sum(F.pad(x, (0, 0, K - 1, 0))[:, i : i + x.shape[1]] * w[:, 0, i] for i in range(K)) + b
    ),
    "a sum of shifts": lambda x, w, b: (
        x * w[:, 0, 2] + F.pad(x, (0, 0, 1, -1)) * w[:, 0, 1] + F.pad(x, (0, 0, 2, 0))[:, :-2] * w[:, 0, 0]
    ),
    "a sum with fixed numbers": lambda x, w, b: (
        0.5 * x + 0.25 * F.pad(x, (0, 0, 1, -1)) + 0.25 * F.pad(x, (0, 0, 2, 0))[:, :-2]
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_op(name: str) -> None:
    program, changes, reasons = rewritten(SPELLINGS[name])
    assert changes == 1 and "is a causal_conv" in reasons
    (call,) = calls(program)
    assert call.args[3] is None and call.args[4] == 1
    left = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not {t for t in left if "conv1d" in t or "conv2d" in t or "pad" in t or "cat" in t or "slice" in t}


def test_before_and_after() -> None:
    program, _, reasons = rewritten(SPELLINGS["both sides padded, the end cut at the length"])
    lines = [line.split("  #")[0] for line in text(program).splitlines() if line.startswith("%")]
    assert lines == [
        f"%0: f32[batch, {D}, sequence] = aten.transpose.int(%x, 1, 2)",
        f"%1: (f32[batch, {D}, sequence], f32[batch, {D}, {K - 1}]) = seqc.causal_conv(%0, @weight, @bias, None, 1)",
        f"%2: f32[batch, {D}, sequence] = %1[0]",
    ]
    assert "test_causal_conv.py:" in reasons
    assert f"{K} taps, dilation 1, zeros before the first step" in reasons


def test_dilation_is_kept() -> None:
    for spelling in (
        lambda x, w, b: F.conv1d(first(x), w, b, padding=6, groups=D, dilation=2)[..., :-6],
        lambda x, w, b: sum(F.pad(x, (0, 0, 6, 0))[:, 2 * i : 2 * i + x.shape[1]] * w[:, 0, i] for i in range(K)),
    ):
        program, changes, _ = rewritten(spelling)
        assert changes == 1 and calls(program)[0].args[4] == 2


@pytest.mark.parametrize("steps", [K - 1, K + 1])
def test_a_state_in_front_is_the_initial_state_and_the_last_steps_are_the_final_one(steps: int) -> None:
    def spelling(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        line = torch.cat([history(x, b, steps), first(x)], -1)
        return F.conv1d(line, w, b, groups=D)[..., steps - K + 1 :], line[..., 1 - K :]

    program, changes, reasons = rewritten(spelling)
    assert changes == 1 and "a state before the first step" in reasons
    (call,) = calls(program)
    assert call.args[3].meta["val"].shape[2] == K - 1
    assert {n.args[1] for n in call.users} == {0, 1}
    assert count_ops(program.graph_module, torch.ops.aten.cat.default) == 0


def test_the_last_steps_of_what_was_padded_are_the_final_state_in_their_layout() -> None:
    def spelling(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        line = F.pad(x, (0, 0, K - 1, 0))
        return F.conv1d(line.transpose(1, 2), w, b, groups=D), line[:, 1 - K :]

    program, _, _ = rewritten(spelling)
    assert {n.args[1] for n in calls(program)[0].users} == {0, 1}
    assert count_ops(program.graph_module, torch.ops.aten.pad.default) == 0


def test_what_else_is_added_stays_added() -> None:
    program, changes, _ = rewritten(
        lambda x, w, b: (
            torch.tanh(x)
            + sum(F.pad(x, (0, 0, K - 1, 0))[:, i : i + x.shape[1]] * w[:, 0, K - 1 - i] for i in range(K))
            + b
        )
    )
    assert changes == 1 and count_ops(program.graph_module, torch.ops.aten.add.Tensor) == 1


def test_the_same_convolution_twice_in_a_row() -> None:
    once = SPELLINGS["both sides padded, the end cut at the length"]
    _, changes, _ = rewritten(lambda x, w, b: once(once(x, w, b).transpose(1, 2) + x, w, b))
    assert changes == 2


OTHERS: dict[str, tuple[Spelling, str]] = {
    "centred": (
        lambda x, w, b: F.conv1d(F.pad(first(x), (2, 1)), w, b, groups=D),
        "1 steps after",
    ),
    "of same length by torch": (lambda x, w, b: F.conv1d(first(x), w, b, padding="same", groups=D), "2 steps after"),
    "the front cut off": (
        lambda x, w, b: F.conv1d(first(x), w, b, padding=K - 1, groups=D)[..., K - 1 :],
        "3 steps after",
    ),
    "both sides kept": (lambda x, w, b: F.conv1d(first(x), w, b, padding=K - 1, groups=D), "more steps"),
    "cut too late": (lambda x, w, b: F.conv1d(first(x), w, b, padding=K - 1, groups=D)[..., :-2], "more steps"),
    "read whole elsewhere": (
        lambda x, w, b: (lambda y: (y[..., : x.shape[1]], y.sum(-1)))(
            F.conv1d(first(x), w, b, padding=K - 1, groups=D)
        ),
        "more steps",
    ),
    "summed before the cut": (
        lambda x, w, b: F.conv1d(first(x), w, b, padding=K - 1, groups=D).cumsum(-1)[..., : x.shape[1]],
        "more steps",
    ),
    "not depthwise": (
        lambda x, w, b: F.conv1d(F.pad(first(x), (K - 1, 0)), w.expand(D, D, K), b),
        "not depthwise",
    ),
    "strided": (lambda x, w, b: F.conv1d(F.pad(first(x), (K - 1, 0)), w, b, stride=2, groups=D), "stride"),
    "padded with ones": (
        lambda x, w, b: F.conv1d(F.pad(first(x), (K - 1, 0), value=1.0), w, b, groups=D),
        "other than zeros or a state",
    ),
    "padded by repeating the edge": (
        lambda x, w, b: F.conv1d(F.pad(first(x), (K - 1, 0), mode="replicate"), w, b, groups=D),
        "other than zeros or a state",
    ),
    "weights that depend on the input": (
        lambda x, w, b: sum(F.pad(x, (0, 0, K - 1, 0))[:, i : i + x.shape[1]] * x for i in range(K)),
        "",
    ),
    "two taps": (lambda x, w, b: x * b + F.pad(x, (0, 0, 1, -1)) * (1 - b), "two taps"),
    "a gap among the taps": (
        lambda x, w, b: x * b + F.pad(x, (0, 0, 1, -1)) * w[:, 0, 0] + F.pad(x, (0, 0, 3, 0))[:, :-3] * w[:, 0, 1],
        "not evenly spaced",
    ),
    "slices of the future": (
        lambda x, w, b: x * b + F.pad(x, (0, 0, 0, 1))[:, 1:] * b + F.pad(x, (0, 0, 0, 2))[:, 2:] * b,
        "",
    ),
    "weights that differ by step": (
        lambda x, w, b: sum(
            F.pad(x, (0, 0, K - 1, 0))[:, i : i + x.shape[1]]
            * torch.arange(x.shape[1], dtype=x.dtype)[:, None]
            * w[:, 0, i]
            for i in range(K)
        ),
        "",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_causal_depthwise_convolution_stays(name: str) -> None:
    spelling, reason = OTHERS[name]
    program, changes, reasons = rewritten(spelling, (4, 17))
    assert changes == 0 and not calls(program)
    assert reason in reasons and (bool(reason) == bool(reasons))


def test_a_wrong_rewrite_is_caught_by_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are a lie here: shapes agree, numbers do not."""
    honest = causal_conv.convolution

    def lying(node: Any) -> Any:
        found = honest(node)
        return found and dataclasses.replace(found, weight=lambda emit: emit(torch.ops.aten.neg.default, node.args[1]))

    monkeypatch.setattr(causal_conv, "convolution", lying)
    program, changes, reasons = rewritten(SPELLINGS["padded in front"])
    assert changes == 0 and "differs by" in reasons and not calls(program)
