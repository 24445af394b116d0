"""GroupQueries: which repeated keys and values are read where they are, and which repetitions are others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import seqc
from seqc.passes import GroupQueries
from seqc.pipeline import run_passes
from seqc.program import Program
from seqc.verify import verify
from tests.helpers.modules import Applied

HEADS, GROUPS, SIZE = 2, 3, 4
Function = Callable[[torch.Tensor], torch.Tensor]


def parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries of all heads, keys and values of a third of them: [batch, heads, sequence, size]."""
    return tuple(p.transpose(1, 2) for p in x.unflatten(-1, (-1, SIZE)).split([HEADS * GROUPS, HEADS, HEADS], 2))


def repeated(x: torch.Tensor) -> torch.Tensor:
    batch, heads, steps, size = x.shape
    return x[:, :, None].expand(batch, heads, GROUPS, steps, size).reshape(batch, heads * GROUPS, steps, size)


def attention(keys: Function, values: Function, **settings: bool) -> Function:
    def function(x: torch.Tensor) -> torch.Tensor:
        q, k, v = parts(x)
        return F.scaled_dot_product_attention(q, keys(k), values(v), is_causal=True, **settings)

    return function


def masked(x: torch.Tensor) -> torch.Tensor:
    q, k, v = parts(x)
    at = torch.arange(x.shape[1])
    mask = (at[None, :] <= at[:, None]).expand(x.shape[0], 1, -1, -1)
    return F.scaled_dot_product_attention(q, repeated(k), repeated(v), attn_mask=mask)


GROUPED: dict[str, Function] = {
    "expand and reshape": attention(repeated, repeated),
    "repeat_interleave": attention(lambda x: x.repeat_interleave(GROUPS, 1), lambda x: x.repeat_interleave(GROUPS, 1)),
    "with a copy": attention(lambda x: repeated(x).contiguous(), repeated),
    "with a mask": masked,
}
OTHERS: dict[str, Function] = {
    "heads in another order": attention(lambda x: x.repeat(1, GROUPS, 1, 1), lambda x: x.repeat(1, GROUPS, 1, 1)),
    "values in another order": attention(repeated, lambda x: x.repeat(1, GROUPS, 1, 1)),
    "grouped already": attention(lambda x: x, lambda x: x, enable_gqa=True),
    "something between": attention(lambda x: repeated(x) * 2, repeated),
}


def passed(function: Function) -> tuple[Program, Program, int]:
    program = seqc.trace(Applied(function), (torch.randn(2, 7, (GROUPS + 2) * HEADS * SIZE),))
    before = program.copy()
    (record,) = run_passes(program, [GroupQueries()])
    verify(program)
    return before, program, record.changes


@pytest.mark.parametrize("name", GROUPED)
def test_repeated_keys_and_values_are_read_where_they_are(name: str) -> None:
    before, program, changes = passed(GROUPED[name])
    assert changes == 1
    assert not any(n.target is torch.ops.aten.expand.default and n.meta["val"].dim() == 5 for n in program.graph.nodes)
    x = torch.randn(3, 11, (GROUPS + 2) * HEADS * SIZE)
    torch.testing.assert_close(program(x)[0], before(x)[0], rtol=1e-5, atol=1e-6)
    compiled = seqc.compile(Applied(GROUPED[name]), (x,))
    assert not any(n.op_type == "Expand" and len(n.outputs[0].shape or ()) == 5 for n in compiled.model.graph)


@pytest.mark.parametrize("name", OTHERS)
def test_other_repetitions_stay(name: str) -> None:
    _, _, changes = passed(OTHERS[name])
    assert changes == 0
