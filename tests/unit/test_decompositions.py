"""Operators without an ONNX form are decomposed exactly, whatever the routing."""

from __future__ import annotations

import pytest
import torch

from seqc.frontend.decompositions import grouped_product, table


@pytest.mark.parametrize("offs", [[2, 2, 5, 9], [0, 0, 0, 9], [9, 9, 9, 9], [1, 3, 4, 7]])
def test_a_grouped_product_equals_one_product_per_group(offs: list[int]) -> None:
    x, weight = torch.randn(9, 3), torch.randn(4, 3, 5)
    expected, start = torch.zeros(9, 5), 0
    for group, end in enumerate(offs):
        expected[start:end] = x[start:end] @ weight[group]
        start = end
    found = grouped_product(x, weight, torch.tensor(offs, dtype=torch.int32))
    torch.testing.assert_close(found, expected)


def test_what_another_group_overflows_to_does_not_leak() -> None:
    weight = torch.stack([torch.eye(2), torch.full((2, 2), float("inf"))])
    assert torch.equal(grouped_product(torch.ones(3, 2), weight, torch.tensor([3, 3])), torch.ones(3, 2))


def test_library_operators_are_in_the_table_where_the_library_is_imported() -> None:
    pytest.importorskip("transformers.integrations.moe")
    decomposition = table()[torch.ops.transformers.grouped_mm_fallback.default]
    x, weight, offs = torch.randn(5, 3), torch.randn(2, 3, 4), torch.tensor([2, 5])
    library = torch.ops.transformers.grouped_mm_fallback(x, weight, offs)
    torch.testing.assert_close(decomposition(x, weight, offs), library)


def test_a_grouped_product_without_groups_keeps_its_own_translation() -> None:
    assert table()[torch.ops.aten._grouped_mm.default](torch.randn(2, 3, 4), torch.randn(2, 4, 5)) is NotImplemented
