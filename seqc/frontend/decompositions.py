"""How operators that no ONNX translation covers are written with operators that one does cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from seqc import _torch

Decomposition = Callable[..., Any]

# Operators of libraries that compute what aten._grouped_mm computes, with the arguments (input, weight, offs).
_GROUPED = (("transformers", "grouped_mm_fallback"),)


def table() -> dict[Any, Decomposition]:
    """The decompositions of torch.onnx and our own, by operator; those of libraries only where these are imported."""
    result = _torch.onnx_decompositions()
    result[torch.ops.aten._grouped_mm.default] = _grouped_mm
    for namespace, name in _GROUPED:
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is not None:
            result[packet.default] = grouped_product
    return result


def grouped_product(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Row i of ``input`` [S, K] times the matrix of its group in ``weight`` [G, K, N]; the result is [S, N].

    ``offs`` [G] holds where each group of rows ends, in rising order; rows behind the last group give 0. Library
    implementations slice by these values, which no static graph can follow. Here each row meets every matrix and the
    right product is kept: G times the work, exact for any routing, and the same number of operations for any G.
    Source: the reference of torch.nn.functional.grouped_mm for a 2-D input and 3-D weights.
    """
    rows = torch.arange(input.shape[0], device=input.device, dtype=offs.dtype)
    behind = rows >= offs.unsqueeze(1)  # [G, S]: row i lies behind the end of group g
    before = torch.cat([torch.ones_like(behind[:1]), behind[:-1]])  # row i lies at or behind its start
    mine = torch.logical_and(before, torch.logical_not(behind)).unsqueeze(-1)
    products = torch.matmul(input, weight)
    return torch.where(mine, products, torch.zeros_like(products)).sum(0)


def _grouped_mm(
    self: torch.Tensor,
    mat2: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    if offs is None or self.dim() != 2 or mat2.dim() != 3:
        return NotImplemented
    result = grouped_product(self, mat2, offs)
    if bias is not None:
        result = result + bias
    return result if out_dtype is None else result.to(out_dtype)
