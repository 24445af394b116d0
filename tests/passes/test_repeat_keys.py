"""RepeatKeys: which grouped attention takes repeated keys and values, and which is left grouped."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import seqc
from seqc.passes import RepeatKeys
from seqc.pipeline import run_passes
from seqc.text import text
from seqc.verify import verify
from tests.helpers.modules import Applied

HEADS, GROUPS, SIZE = 2, 3, 4


def grouped(x: torch.Tensor) -> torch.Tensor:
    q, k, v = (p.transpose(1, 2) for p in x.unflatten(-1, (-1, SIZE)).split([HEADS * GROUPS, HEADS, HEADS], 2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def last(x: torch.Tensor) -> torch.Tensor:
    q, k, v = (p.transpose(1, 2) for p in x.unflatten(-1, (-1, SIZE)).split([HEADS * GROUPS, HEADS, HEADS], 2))
    return F.scaled_dot_product_attention(q[:, :, -1:], k, v, enable_gqa=True)


def given(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 7, (GROUPS + 2) * HEADS * SIZE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grouped_attention_of_several_steps_takes_repeated_keys_and_values(dtype: torch.dtype) -> None:
    program = seqc.trace(Applied(grouped), (given(dtype),))
    before = program.copy()
    (record,) = run_passes(program, [RepeatKeys()])
    verify(program)
    written = text(program)
    assert record.changes == 1
    assert "enable_gqa" not in written
    assert written.count("expand") == 2
    x = torch.randn(3, 11, (GROUPS + 2) * HEADS * SIZE).to(dtype)
    torch.testing.assert_close(program(x)[0], before(x)[0])


def test_float32_stays_grouped() -> None:
    program = seqc.trace(Applied(grouped), (given(torch.float32),))
    (record,) = run_passes(program, [RepeatKeys()])
    assert record.changes == 0


def test_one_step_reads_its_cache_where_that_is() -> None:
    program = seqc.trace(Applied(last), (given(torch.float16),))
    (record,) = run_passes(program, [RepeatKeys()])
    assert record.changes == 0
