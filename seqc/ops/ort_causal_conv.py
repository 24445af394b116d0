"""``seqc::ort_causal_conv``: ONNX Runtime's operator com.microsoft.CausalConvWithState, version 1, over one axis;
where ``standard``, the operator of that name of ONNX 27, which has no dilation.

Arguments and results are those of ``seqc::causal_conv``, which is the reference: channels first, no activation, and a
state that may be missing. Sources: ONNX Runtime's contrib operators, ONNX's operator CausalConvWithState.
"""

from __future__ import annotations

import torch

from seqc.ops.causal_conv import causal_conv, reach


@torch.library.custom_op("seqc::ort_causal_conv", mutates_args=())
def ort_causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    dilation: int,
    standard: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference implementation. Raises RuntimeError where the shapes do not fit."""
    y, final = causal_conv(x, weight, bias, state, dilation)
    return y, final


@ort_causal_conv.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    dilation: int,
    standard: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty((*x.shape[:2], reach(weight, dilation)))
