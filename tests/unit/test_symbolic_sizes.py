"""No size is frozen by operators that read sizes as numbers: each is right at lengths that were never traced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqc
from seqc.errors import VerificationError

SHAPES = {"x": {0: "batch", 1: "sequence"}}

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "kron": lambda x: torch.kron(x, torch.ones(1, 2, 2)),
    "take_along_dim": lambda x: torch.take_along_dim(x, x.argsort(1), 1),
    "last_two": lambda x: x[..., -2:, :],
    "first_half": lambda x: x[:, : x.shape[1] // 2 + 1].sum(1),
    "chunk_in_two": lambda x: x.chunk(2, dim=1)[0].sum(1),
    "chunk_in_three": lambda x: torch.cat(x.chunk(3, dim=1)[::-1], 1),
    "tensor_split": lambda x: x.tensor_split(2, dim=1)[1].sum(1),
    "split_in_the_middle": lambda x: x.split([x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], 1)[1].sum(1),
    "unfold": lambda x: F.pad(x, (0, 0, 3, 0)).unfold(1, 4, 1).mean(-1),
    "crop_to_four": lambda x: x[:, :4].sum(1),
    "scale_by_length": lambda x: x.sum(1) / x.shape[1] ** 0.5,
}


class Module(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_right_at_lengths_never_traced(name: str) -> None:
    program = seqc.trace(Module(FUNCTIONS[name]), (torch.randn(2, 9, 6),), SHAPES)
    for length in (5, 6, 30, 51, 64):
        x = torch.randn(3, length, 6)
        torch.testing.assert_close(program(x)[0], FUNCTIONS[name](x))


@pytest.mark.parametrize(
    "function",
    [lambda x: x * 2 if x.shape[1] > 50 else x * 3, lambda x: x * 2 if x.shape[1] % 11 == 0 else x * 3],
    ids=["at a length of 51", "at multiples of 11"],
)
def test_a_branch_on_the_length_is_found_by_the_check_where_it_flips(
    function: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """The example's length, 1, a prime and four times the example all take the same branch."""
    with pytest.raises(
        VerificationError, match=r"sequence=(51|11|101).*branches on a size.*test_symbolic_sizes\.py:\d+"
    ):
        seqc.compile(Module(function), (torch.randn(2, 9, 6),), dynamic_shapes=SHAPES)


def test_a_comparison_with_a_length_too_long_to_check_is_told() -> None:
    module = Module(lambda x: x * 2 if x.shape[1] > 5000 else x * 3)
    compiled = seqc.compile(module, (torch.randn(2, 9, 6),), dynamic_shapes=SHAPES)
    assert any("5000" in note and "NOT checked" in note for note in compiled.manifest["notes"])
