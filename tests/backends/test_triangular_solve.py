"""Triangular solves in blocks: in every spelling, at lengths on both sides of a block, what substitution gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import seqc
from seqc.lowerings.triangular_solve import SIZE
from tests.models.compare import relative_error

LENGTHS = (1, 7, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE + 5)
BLOCKS = {"lowering.linalg_solve_triangular": "blocks"}
SPELLINGS = [(upper, left, unit) for upper in (False, True) for left in (False, True) for unit in (False, True)]


class Solves(nn.Module):
    """With x x^T, whose rows are far from orthogonal to each other, over twice its mean diagonal."""

    def __init__(self, upper: bool, left: bool, unitriangular: bool) -> None:
        super().__init__()
        self.spelling = {"upper": upper, "left": left, "unitriangular": unitriangular}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        products = x @ x.transpose(1, 2) / 24
        b = x if self.spelling["left"] else x.transpose(1, 2)
        return torch.linalg.solve_triangular(products + torch.eye(x.shape[1]), b, **self.spelling)


def form_of(made: seqc.Compiled) -> str:
    reasons = [reason for record in made.report["passes"] for reason in record["reasons"]]
    (told,) = (r for r in reasons if "linalg_solve_triangular as " in r)
    return told.partition("linalg_solve_triangular as ")[2].partition(":")[0]


@pytest.mark.parametrize(("upper", "left", "unit"), SPELLINGS)
def test_blocks_give_what_substitution_gives(upper: bool, left: bool, unit: bool) -> None:
    torch.manual_seed(0)
    model = Solves(upper, left, unit)
    made = seqc.compile(model, (torch.randn(2, 9, 6),), options=BLOCKS)
    assert form_of(made) == "blocks"
    for length in LENGTHS:
        x = torch.randn(3, length, 6)
        exact = model.double()(x.double()).float()
        assert relative_error([made(x).numpy()], [exact]) < 1e-5


def test_one_block_has_no_loop_and_several_have_one_step_each() -> None:
    shapes = {"x": {0: "batch"}}
    for length, loops in ((SIZE, 0), (SIZE + 1, 1)):
        made = seqc.compile(
            Solves(False, True, True), (torch.randn(2, length, 6),), dynamic_shapes=shapes, options=BLOCKS
        )
        assert sum(node.op_type in ("Scan", "Loop") for node in made.model.graph.all_nodes()) == loops


@pytest.mark.parametrize("length", [2 * SIZE, 1000])
def test_rows_that_are_alike_lose_no_more_than_by_substitution(length: int) -> None:
    """The Neumann series of a whole block would be off by any amount."""

    class Alike(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            keys = torch.nn.functional.normalize(x[..., :4] + 5, dim=-1)
            return torch.linalg.solve_triangular(keys @ keys.transpose(1, 2), x, upper=False, unitriangular=True)

    model, x = Alike(), torch.randn(2, length, 6)
    made = seqc.compile(model, (torch.randn(2, 9, 6),), options=BLOCKS)
    exact = model(x.double())
    ours, own = (float((y.double() - exact).abs().max() / exact.abs().max()) for y in (made(x), model(x)))
    assert ours < 1e-5 and ours < 20 * own


def test_targets_without_loops_take_blocks_and_others_rows() -> None:
    for target, options, form in (("tensorrt", {"engines": "off"}, "blocks"), ("onnx", {}, "rows")):
        made = seqc.compile(Solves(False, True, True), (torch.randn(2, 9, 6),), target=target, options=options)
        assert form_of(made) == form
