"""CausalMasks: which masks are the causal one, in any spelling, and which only look like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqc
from seqc.passes import CausalMasks
from seqc.pipeline import run_passes
from seqc.text import text
from seqc.verify import verify
from tests.helpers.modules import Applied
from tests.helpers.programs import capture_program

Mask = Callable[[int], torch.Tensor]


def behind(n: int) -> torch.Tensor:
    """How many steps each place lies behind each step."""
    places = torch.arange(n)
    return places[:, None] - places[None, :]


def documents(n: int) -> torch.Tensor:
    """As for rows that hold several documents, whose positions begin anew; here there is one."""
    places = torch.arange(n)[None]
    jumps = torch.cat([places[:, :1] - 1, places], 1)
    document = (jumps[:, 1:] - jumps[:, :n] != 1).cumsum(-1)
    return (document[:, :, None] == document[:, None, :]) & (behind(n) >= 0)


CAUSAL: dict[str, Mask] = {
    "positions compared": lambda n: behind(n) >= 0,
    "a triangle of True": lambda n: torch.ones(n, n, dtype=torch.bool).tril(),
    "not later": lambda n: ~torch.ones(n, n, dtype=torch.bool).triu(1),
    "minus infinity": lambda n: torch.full((n, n), float("-inf")).triu(1),
    "the least float": lambda n: torch.zeros(n, n).masked_fill(behind(n) < 0, torch.finfo(torch.float32).min),
    "documents": documents,
}
OTHERS: dict[str, Mask] = {
    "a window": lambda n: (behind(n) >= 0) & (behind(n) < 100),
    "a window wider than what is looked at": lambda n: (behind(n) >= 0) & (behind(n) < 4096),
    "one step ahead": lambda n: behind(n) >= -1,
    "not itself": lambda n: (behind(n) > 0) | (behind(n) == behind(n).min()),
    "a bias": lambda n: torch.full((n, n), float("-inf")).triu(1) + 0.5 * behind(n).clamp(min=0),
    "a finite penalty": lambda n: torch.full((n, n), -100.0).triu(1),
    "everything": lambda n: behind(n) < n,
}


def attends(mask: Mask) -> Applied:
    return Applied(lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=mask(x.shape[1])))


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask_is_not_computed(name: str) -> None:
    model = attends(CAUSAL[name])
    program = capture_program(model, torch.randn(2, 9, 4))
    (record,) = run_passes(program, [CausalMasks()])
    verify(program)
    assert record.changes == 1
    (attention,) = (n for n in program.graph.nodes if "attention" in str(n.target))
    assert set(attention.all_input_nodes) == set(program.input_nodes)
    for length in (1, 2, 31):
        x = torch.randn(3, length, 4)
        torch.testing.assert_close(program(x)[0], model(x))


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_stay(name: str) -> None:
    program = capture_program(attends(OTHERS[name]), torch.randn(2, 9, 4))
    before = text(program)
    (record,) = run_passes(program, [CausalMasks()])
    assert record.changes == 0 and text(program) == before


class GivenMask(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        later = behind(x.shape[1]) >= 0
        return F.scaled_dot_product_attention(x, x, x, attn_mask=later & mask[:, None, :])


def test_a_mask_that_reads_an_input_stays() -> None:
    shapes = {name: {0: "batch", 1: "sequence"} for name in ("x", "mask")}
    inputs = {"x": torch.randn(2, 9, 4), "mask": torch.ones(2, 9, dtype=torch.bool)}
    program = seqc.trace(GivenMask(), inputs, shapes)
    (record,) = run_passes(program, [CausalMasks()])
    assert record.changes == 0


def test_a_mask_that_layers_share_goes_with_the_last_of_them() -> None:
    def layers(x: torch.Tensor) -> torch.Tensor:
        mask = behind(x.shape[1]) >= 0
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return x

    program = capture_program(Applied(layers), torch.randn(2, 9, 4))
    (record,) = run_passes(program, [CausalMasks()])
    assert record.changes == 3
    assert "arange" not in text(program)
