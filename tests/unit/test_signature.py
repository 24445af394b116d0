"""Inputs by name or position, dynamic axes with their ranges, and the inputs that tracing and checking make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from seqc.errors import UsageError
from seqc.frontend.signature import Signature, bind


class Two(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return x if mask is None else x * mask


X, MASK = torch.randn(2, 9, 4), torch.ones(2, 9, 1)
SHAPES: dict[str, Any] = {"x": {0: "batch", 1: "sequence"}, "mask": {0: "batch", 1: "sequence"}}


def test_a_tuple_and_a_dict_bind_the_same_inputs() -> None:
    by_place = bind(Two(), (X, MASK), SHAPES)
    by_name = bind(Two(), {"x": X, "mask": MASK}, SHAPES)
    assert list(by_place.examples) == list(by_name.examples) == ["x", "mask"]
    assert by_place.axes == by_name.axes
    assert by_place.positional and not by_name.positional


def test_batch_and_sequence_are_dynamic_unless_told_otherwise() -> None:
    assert bind(Two(), (X,), None).axes == {"x": {0: "batch", 1: "sequence"}}
    assert bind(Two(), (X,), {}).axes == {}


def test_shapes_by_position_and_negative_axes() -> None:
    assert bind(Two(), (X, MASK), [{0: "batch"}, {-2: "sequence"}]).axes == {"x": {0: "batch"}, "mask": {1: "sequence"}}


@pytest.mark.parametrize(
    ("examples", "shapes", "message"),
    [
        ((X, MASK, MASK), None, "forward takes 2 inputs, 3 examples were given"),
        ((), None, "at least one example input is needed"),
        ((X, 3), None, "'mask' is a int; seqc takes tensors"),
        ((X,), {"y": {0: "batch"}}, "names 'y', but the inputs are x"),
        ((X,), {"x": {3: "batch"}}, "'x' has 3 axes, dynamic_shapes names axis 3"),
        ((X,), {"x": {0: "not a name"}}, "'not a name' is not an identifier"),
        ((X,), {"x": {0: 1.5}}, "takes names or torch.export.Dim, not 1.5"),
        ((X, MASK[:, :5]), SHAPES, "'sequence' is 9 in one example input and 5 in 'mask'"),
    ],
)
def test_wrong_usage_is_one_clear_line(examples: Any, shapes: Any, message: str) -> None:
    with pytest.raises(UsageError, match=r"^[^\n]*$") as error:
        bind(Two(), examples, shapes)
    assert message in str(error.value)


def test_one_name_with_two_ranges_is_refused() -> None:
    shapes = {"x": {1: torch.export.Dim("sequence", max=64)}, "mask": {1: torch.export.Dim("sequence", max=32)}}
    with pytest.raises(UsageError, match="declared twice"):
        bind(Two(), (X, MASK), shapes)


def ranged() -> Signature:
    return bind(Two(), (X,), {"x": {0: "batch", 1: torch.export.Dim("sequence", min=4, max=32)}})


def test_sizes_are_clamped_to_the_declared_range() -> None:
    assert [ranged().clamp("sequence", size) for size in (1, 20, 400)] == [4, 20, 32]
    assert [ranged().clamp("batch", size) for size in (1, 20, 400)] == [1, 20, 400]


def test_trace_sizes_of_different_dimensions_differ() -> None:
    shapes = {"x": {0: "batch", 1: "sequence", 2: "width"}}
    sizes = bind(Two(), (X,), shapes).trace_sizes()
    assert set(sizes) == {"batch", "sequence", "width"} and len(set(sizes.values())) == 3


def test_resized_examples_are_cropped_or_repeated() -> None:
    resized = ranged().resized({"batch": 3, "sequence": 5})["x"]
    assert torch.equal(resized, X[[0, 1, 0], :5])


def test_random_inputs_are_like_the_examples_and_repeatable() -> None:
    ids = torch.tensor([[3, 7, 7, 3]])
    signature = bind(Two(), (ids, 100 + torch.randn(1, 4)), SHAPES)
    one, same, other = (signature.random({"batch": 2, "sequence": 50}, seed) for seed in (1, 1, 2))
    assert one["x"].dtype == torch.int64 and set(one["x"].flatten().tolist()) == {3, 7}
    assert 98 < one["mask"].mean() < 102 and one["mask"].shape == (2, 50)
    assert torch.equal(one["mask"], same["mask"]) and not torch.equal(one["mask"], other["mask"])
