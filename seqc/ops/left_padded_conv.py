"""``seqc::left_padded_conv``: ONNX's Conv with one group per channel and zeros in front of the first step only.

    y[b, d, t] = bias[d] + sum_j weight[d, 0, j] * line[b, d, t + j * dilation]

``x`` [B, D, T], ``weight`` [D, 1, k], ``bias`` [D] or None; ``line`` is ``left`` zeros followed by x; y has
T + left - (k - 1) * dilation steps. torch's own convolutions pad both sides alike.
"""

from __future__ import annotations

import torch

from seqc.ops.causal_conv import reach


@torch.library.custom_op("seqc::left_padded_conv", mutates_args=())
def left_padded_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, left: int, dilation: int
) -> torch.Tensor:
    """The reference implementation. Raises RuntimeError where the shapes do not fit."""
    line = torch.nn.functional.pad(x, (left, 0))
    return torch.nn.functional.conv1d(line, weight, bias, dilation=dilation, groups=weight.shape[0])


@left_padded_conv.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, left: int, dilation: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:2], x.shape[2] + left - reach(weight, dilation)))
