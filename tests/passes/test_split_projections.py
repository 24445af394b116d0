"""SplitProjections: products of concatenated parts, told apart by the carries they depend on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from seqc.passes.split_projections import SplitProjections
from seqc.program import Program
from seqc.verify import verify
from tests.helpers.programs import body_of, count_ops, equal_at, loop_program

aten = torch.ops.aten
D, H = 5, 6


def split(step: Callable[..., tuple[torch.Tensor, ...]], weight: torch.Tensor) -> tuple[Program, int]:
    program = loop_program(step, [torch.randn(2, 7, D)], [torch.zeros(H), torch.ones(H)], [weight, torch.randn(H)])
    before = program.copy()
    changes = SplitProjections()(program)
    verify(program)
    assert equal_at(before, program, [(1, 1), (3, 8)], (D,)) < 1e-5
    return program, changes


SPELLINGS: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {
    "linear": lambda h, c, x, w, b: (torch.tanh(F.linear(torch.cat([x, h], -1), w, b)), c),
    "state first": lambda h, c, x, w, b: (torch.tanh(F.linear(torch.cat([h, x], 1), w, b)), c),
    "product": lambda h, c, x, w, b: (torch.tanh(torch.cat([x, h], -1) @ w.t() + b), c),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_input_and_the_state_get_a_product_each(name: str) -> None:
    program, changes = split(SPELLINGS[name], torch.randn(H, D + H) / 4)
    if name == "product":  # its weight is transposed in each step: Hoist moves that out first
        assert changes == 0
        return
    assert changes == 1
    assert count_ops(body_of(program), aten.linear.default) == 2
    assert count_ops(body_of(program), aten.cat.default) == 0


def test_parts_that_depend_on_the_same_states_stay_together() -> None:
    program, changes = split(
        lambda h, c, x, w, b: (torch.tanh(F.linear(torch.cat([x, x * 2, h, h * c], -1), w, b)), c),
        torch.randn(H, 2 * D + 2 * H) / 4,
    )
    assert changes == 1
    assert count_ops(body_of(program), aten.linear.default) == 3


def test_parts_of_the_state_alone_are_not_split() -> None:
    _, changes = split(
        lambda h, c, x, w, b: (torch.tanh(F.linear(torch.cat([h, h.neg()], -1), w, b)) + x.sum(-1, keepdim=True), c),
        torch.randn(H, 2 * H) / 4,
    )
    assert changes == 0


def test_rows_put_together_along_another_axis_are_not_split() -> None:
    _, changes = split(
        lambda h, c, x, w, b: (torch.tanh(F.linear(torch.cat([h[:1], x[:, :1].expand(-1, H)], 0), w, b))[1:], c),
        torch.randn(H, H) / 4,
    )
    assert changes == 0
