"""``seqc::causal_conv``: a depthwise convolution over time that reads the present and the past only.

    y[b, d, t] = bias[d] + sum_j weight[d, 0, j] * line[b, d, t - (k - 1 - j) * dilation]
    returns (y, final)

``x``       [B, D, T]  channels first: T is the axis that is read in windows
``weight``  [D, 1, k]  the last tap meets the present step, as in torch's and ONNX's Conv with D groups
``bias``    [D], or None
``state``   [B, D, n], n = (k - 1) * dilation: the steps before the first, oldest first; None stands for zeros

``line`` is the state followed by x, and ``final`` [B, D, n] its last n steps: the state with which the next piece of the
sequence goes on, also where T is less than n. An activation is an operation of its own behind this one. Layout and
states are those of CausalConvWithState of ONNX 27 (there without dilation) and of ONNX Runtime's com.microsoft domain.
"""

from __future__ import annotations

import torch


def reach(weight: torch.Tensor, dilation: int) -> int:
    """How many steps before the present one are read: the length n of the state."""
    return (int(weight.shape[2]) - 1) * dilation


@torch.library.custom_op("seqc::causal_conv", mutates_args=())
def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    dilation: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference implementation. Raises RuntimeError where the shapes do not fit."""
    steps = reach(weight, dilation)
    before = x.new_zeros((*x.shape[:2], steps)) if state is None else state
    line = torch.cat([before, x], 2)
    y = torch.nn.functional.conv1d(line, weight, bias, dilation=dilation, groups=weight.shape[0])
    return y, line[:, :, line.shape[2] - steps :].clone()


@causal_conv.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor | None,
    dilation: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty((*x.shape[:2], reach(weight, dilation)))
