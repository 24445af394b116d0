"""``seqc::selective_scan``: a state-space model whose step size, input and output matrices change with the input.

    h_t = exp(dt_t[:, None] * a) * h_{t-1} + x_t[:, None] * b_t[None, :]        h_0 = state, [D, N]
    y_t = h_t @ c_t
    returns (y_1 .. y_T, h_T)

``x``      [T, B, D]  input of each channel, times the step size where the model discretises it so (Mamba: dt * u)
``dt``     [T, B, D]  step size
``a``      [D, N]     continuous-time decay of each channel and state, usually negative; the same for all steps
``b, c``   [T, B, N]  input and output vectors, shared by all channels
``state``  [B, D, N]  initial state

``reverse`` walks time from the end. The decay [T, B, D, N] need never exist as a whole.
Source: Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces" (2023), algorithm 2.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("seqc::selective_scan", mutates_args=())
def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference implementation: a loop over time. Raises RuntimeError where the shapes do not fit."""
    y = torch.empty_like(x)
    times = range(x.shape[0])
    final = state.clone()
    for t in reversed(times) if reverse else times:
        final = torch.exp(dt[t].unsqueeze(-1) * a) * final + x[t].unsqueeze(-1) * b[t].unsqueeze(-2)
        y[t] = torch.matmul(final, c[t].unsqueeze(-1)).squeeze(-1)
    return y, final


@selective_scan.register_fake
def _(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(state)
