"""``seqc::ort_linear_attention``: ONNX Runtime's operator com.microsoft.LinearAttention, version 1, with scale 1;
where ``standard``, the operator of that name of ONNX 27, which takes and gives the same.

``query, key``  [B, T, H * K]        ``value``  [B, T, H * V]       ``state``  [B, H, K, V]
``decay``       log decay [B, T, H] or [B, T, H * K], None for the rules without
``beta``        [B, T, H], None for the rules without
returns (out [B, T, H * V], final state)

The rules are those of ``seqc::linear_attention``, which is the reference. Sources: ONNX Runtime's contrib
operators, ONNX's operator LinearAttention.
"""

from __future__ import annotations

import torch

from seqc.ops.linear_attention import linear_attention


@torch.library.custom_op("seqc::ort_linear_attention", mutates_args=())
def ort_linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    heads: int,
    rule: str,
    standard: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference implementation. Raises RuntimeError where the shapes do not fit."""

    def unpacked(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 1)

    g = None if decay is None else unpacked(decay)
    rate = None if beta is None else unpacked(beta).squeeze(-1)
    out, final = linear_attention(unpacked(query), unpacked(key), unpacked(value), state, g, rate)
    return out.transpose(0, 1).flatten(2).contiguous(), final


@ort_linear_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    heads: int,
    rule: str,
    standard: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(value, memory_format=torch.contiguous_format), torch.empty_like(state)
